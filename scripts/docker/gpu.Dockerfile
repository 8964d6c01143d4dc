# mowe on NVIDIA GPUs: JAX brings CUDA, the host has the driver and NVIDIA's
# container toolkit. In the checkout:
#   docker build --file scripts/docker/gpu.Dockerfile --tag mowe-gpu .
#   docker run --rm --gpus all --volume "$PWD/runs:/work" mowe-gpu train ...
FROM python:3.12-slim
RUN useradd --create-home user && mkdir /work && chown user /work
COPY . /src
RUN pip install --no-cache-dir --constraint /src/requirements/ci.txt '/src[gpu,tasks]'
USER user
WORKDIR /work
ENTRYPOINT ["mowe"]
CMD ["--help"]
