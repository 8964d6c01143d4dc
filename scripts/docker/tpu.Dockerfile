# mowe on the hosts of a TPU slice, for GKE (scripts/launch/gke_tpu.yaml). In the
# checkout:
#   docker build --file scripts/docker/tpu.Dockerfile --tag mowe-tpu .
#   docker tag mowe-tpu REGION-docker.pkg.dev/PROJECT/REPOSITORY/mowe-tpu
#   docker push REGION-docker.pkg.dev/PROJECT/REPOSITORY/mowe-tpu
FROM python:3.12-slim
RUN useradd --create-home user && mkdir /work && chown user /work
COPY . /src
RUN pip install --no-cache-dir --constraint /src/requirements/ci.txt '/src[tasks,tpu]'
USER user
WORKDIR /work
ENTRYPOINT ["mowe"]
CMD ["--help"]
