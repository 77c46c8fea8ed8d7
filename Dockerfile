# CUDA where the host has it (docker run --gpus all), CPU elsewhere: PyPI's torch brings both.
#   docker build -t ddpm .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/data":/ddpm/data \
#       -v "$PWD/lightning_logs":/ddpm/lightning_logs ddpm train.py configs/cifar10.yml
# A smaller image for the CPU alone:
#   docker build -t ddpm --build-arg INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
ARG INDEX=https://pypi.org/simple
COPY requirements.txt requirements-extras.txt /opt/
RUN pip install --no-cache-dir --index-url "$INDEX" --extra-index-url https://pypi.org/simple \
    -r /opt/requirements.txt
ARG EXTRAS=
RUN if [ -n "$EXTRAS" ]; then pip install --no-cache-dir -r /opt/requirements-extras.txt; fi
COPY . /ddpm
WORKDIR /ddpm
ENTRYPOINT ["python"]
