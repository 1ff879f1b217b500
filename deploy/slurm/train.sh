#!/bin/bash
#SBATCH --job-name=dpm-scales
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@120 --requeue --open-mode=append
#SBATCH --output=slurm-%j.log

# One run, on one device or many; it is requeued until it is finished.
#
#     sbatch deploy/slurm/train.sh process=blurring data=folder data.root=DIR data.image_size=64 run_dir=runs/mine
#     sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 deploy/slurm/train.sh ... run_dir=runs/large
#
# One task per device: keep --ntasks-per-node and --gpus-per-node equal. 120 seconds before the time is up the run
# writes a checkpoint and requeues the job, which finds its run_dir and resumes.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export SLURM_KILL_BAD_EXIT=1 # if one process dies, the others do not wait for it
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
exec srun "${PYTHON:-python}" -m dpm_scales train "$@"
