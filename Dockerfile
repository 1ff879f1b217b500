# docker build -t dpm-scales .
# docker run --gpus all --shm-size 4g -v "$PWD/runs:/app/runs" dpm-scales train.py process=blurring
#
# torch's wheels bring CUDA's libraries of the same major version; the base image adds the runtime and the driver check.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLBACKEND=Agg \
    MPLCONFIGDIR=/tmp/matplotlib \
    WANDB_MODE=offline

# g++ and the headers are for torch.compile, which builds small extensions when it runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --create-home --uid 10001 dpm

WORKDIR /app

# The dependencies come first, against an empty package: editing the code does not install them again.
COPY pyproject.toml constraints.txt LICENSE ./
RUN mkdir dpm_scales \
    && touch dpm_scales/__init__.py \
    && pip install --no-cache-dir -e . -c constraints.txt

COPY . .
RUN mkdir -p runs samples multirun outputs && chown dpm:dpm . runs samples multirun outputs

USER 10001
ENTRYPOINT ["python"]
CMD ["train.py"]
