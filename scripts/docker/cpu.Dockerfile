# mowe on a CPU. In the checkout:
#   docker build --file scripts/docker/cpu.Dockerfile --tag mowe .
#   mkdir -p runs
#   docker run --rm --user "$(id -u):$(id -g)" --env HOME=/work \
#     --volume "$PWD/runs:/work" mowe quickstart --output quickstart
FROM python:3.12-slim
RUN useradd --create-home user && mkdir /work && chown user /work
COPY . /src
RUN pip install --no-cache-dir --constraint /src/requirements/ci.txt '/src[tasks]'
USER user
WORKDIR /work
ENTRYPOINT ["mowe"]
CMD ["--help"]
