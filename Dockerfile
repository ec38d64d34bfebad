# GPU image:  docker build -t minisgl .
#             docker run --rm --gpus all --ipc host -p 127.0.0.1:1919:1919 -v minisgl-kernels:/var/cache/minisgl \
#                 -v minisgl-models:/home/minisgl/.cache/huggingface minisgl --model Qwen/Qwen3-8B
# More of it in docs/howto/docker.md.
# The `devel` base has nvcc, which kernels built on first use need.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv $VIRTUAL_ENV

WORKDIR /opt/minisgl
ARG PIP_ARGS=""
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY python python
RUN pip install --no-cache-dir -c constraints.txt ${PIP_ARGS} .

# Kernels are compiled for the GPU at hand by the first start, and stay in the volume. A new volume gets owner and mode of
# what the image has at its place.
ENV MINISGL_CACHE_DIR=/var/cache/minisgl
RUN useradd --create-home --uid 10001 minisgl \
    && install -d -o minisgl /var/cache/minisgl /home/minisgl/.cache /home/minisgl/.cache/huggingface
VOLUME /var/cache/minisgl

USER minisgl
EXPOSE 1919
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1919/health', timeout=8)"]
ENTRYPOINT ["minisgl", "--host", "0.0.0.0"]
