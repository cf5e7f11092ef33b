# qalign with the locked requirements, for an NVIDIA GPU (driver 580 or newer, for CUDA 13):
#   docker build -t qalign .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD":/work -v qalign-cache:/cache qalign dpo my.yaml
# PyTorch's wheels bring CUDA's libraries. Triton compiles at run time and needs a C compiler and Python's headers.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# A layer of its own: it changes only with the locks.
COPY requirements.lock requirements-cuda.lock requirements-demo.txt /opt/qalign/
RUN pip install --no-deps --require-hashes -r /opt/qalign/requirements.lock -r /opt/qalign/requirements-cuda.lock \
    && pip install --no-deps --require-hashes -r /opt/qalign/requirements-demo.txt

COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE /opt/qalign/
COPY qalign /opt/qalign/qalign
COPY recipes /opt/qalign/recipes
RUN pip install --no-deps --no-build-isolation /opt/qalign

# Weights of the hub, quantised bases and compiled kernels outlive the container in this volume.
# HOME and LOGNAME: with `--user` there is no such user in the image, and libraries ask for both.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache HOME=/cache LOGNAME=qalign
RUN mkdir -m 1777 /cache
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["qalign"]
CMD ["--help"]
