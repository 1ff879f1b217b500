# docker build -t dpm-scales .
# docker run --gpus all --shm-size 4g -v "$PWD/work:/work" dpm-scales train process=blurring run_dir=runs/first
#
# Two stages: the first builds the wheel and an environment with the versions of constraints.txt, the second has CUDA's
# runtime, the environment and an ordinary user, and no sources. Runs, samples and caches are written below /work.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS build

ENV DEBIAN_FRONTEND=noninteractive PATH=/opt/venv/bin:$PATH

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

WORKDIR /src

# The dependencies come first, against an empty package: editing the code does not install them again.
COPY pyproject.toml setup.py constraints.txt LICENSE ./
RUN mkdir dpm_scales \
    && touch dpm_scales/__init__.py \
    && pip install --no-cache-dir '.[sweep,efflite0,hub]' -c constraints.txt \
    && pip uninstall -y dpm-scales

COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist . \
    && pip install --no-cache-dir --no-deps /dist/*.whl \
    && dpm-scales train --help > /dev/null

FROM nvidia/cuda:13.0.1-base-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLBACKEND=Agg \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/work/.cache \
    WANDB_MODE=offline

# g++ and the headers are for torch.compile, which builds small extensions when it runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 dpm \
    && mkdir /work \
    && chown dpm:dpm /work

COPY --from=build /opt/venv /opt/venv
COPY deploy/entrypoint.sh /usr/local/bin/entrypoint.sh

WORKDIR /work
USER 10001
# Whether the package can be imported and the folder of runs can be read; the state of each run is in `dpm-scales runs`.
HEALTHCHECK --interval=5m --timeout=60s --start-period=2m CMD ["dpm-scales", "runs", "/work"]
ENTRYPOINT ["sh", "/usr/local/bin/entrypoint.sh"]
CMD ["train"]
