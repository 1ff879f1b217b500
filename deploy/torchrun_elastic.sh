#!/bin/bash
# One run on machines that come and go: start it on each of them, with the address of one that stays.
#
#     HEAD=machine1:29500 deploy/torchrun_elastic.sh data=folder data.root=DIR data.image_size=64 run_dir=runs/elastic
#
# torchrun waits for MIN machines and takes up to MAX. When one leaves, or a process dies, it starts all processes again,
# at most RESTARTS times; they resume from the last checkpoint, on however many devices there are. data.batch_size is per
# device, so the total batch changes with the number of devices. run_dir must be on a disk that all machines share.

set -euo pipefail
exec torchrun --nnodes "${MIN:-1}:${MAX:-4}" --nproc-per-node "${DEVICES:-gpu}" --max-restarts "${RESTARTS:-10}" \
    --rdzv-backend c10d --rdzv-id "${RUN_ID:-dpm-scales}" --rdzv-endpoint "${HEAD:-localhost:29500}" \
    -m dpm_scales train "$@"
