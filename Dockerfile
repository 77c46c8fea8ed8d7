# CUDA where the host has it, the CPU elsewhere: PyPI's torch brings both.
#   docker build -t ddpm .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/data":/ddpm/data \
#       -v "$PWD/lightning_logs":/ddpm/lightning_logs ddpm train.py configs/cifar10.yml
# Smaller, for the CPU alone: --build-arg PIP_EXTRA_INDEX_URL= with PyTorch's index of CPU wheels.
# With evaluate.py's and convert.py's packages: --build-arg REQUIREMENTS=requirements-test.txt
FROM python:3.12-slim
# g++ compiles the CPU's kernel on first use
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /ddpm
ARG PIP_EXTRA_INDEX_URL
ARG REQUIREMENTS=requirements.txt
COPY requirements*.txt ./
RUN pip install --no-cache-dir -r "$REQUIREMENTS"
COPY . .
ENTRYPOINT ["python"]
