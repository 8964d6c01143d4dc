# mowe on NVIDIA GPUs: JAX brings CUDA, the host has the driver and NVIDIA's
# container toolkit. In the checkout:
#   docker build --file scripts/docker/gpu.Dockerfile --tag mowe-gpu .
#   mkdir -p runs
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --env HOME=/work \
#     --volume "$PWD/runs:/work" mowe-gpu quickstart --output quickstart
FROM python:3.12-slim
RUN useradd --create-home user && mkdir /work && chown user /work
COPY . /src
RUN pip install --no-cache-dir --constraint /src/requirements/ci.txt '/src[gpu,tasks]'
USER user
WORKDIR /work
ENTRYPOINT ["mowe"]
CMD ["--help"]
