#!/bin/bash
#SBATCH --job-name=dpm-scales-array
#SBATCH --array=0-5
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=08:00:00 --signal=USR1@120 --requeue --open-mode=append
#SBATCH --output=slurm-%A-%a.log

# Runs side by side as a job array: each process with each seed. Keep --array as long as the product of both lists.
#
#     sbatch deploy/slurm/array.sh data=folder data.root=DIR data.image_size=64
#     PROCESSES="vp ve" SEEDS="0 1 2" sbatch --array=0-5 deploy/slurm/array.sh
#
# hydra/launcher=slurm does the same from one command, with a table of results; this script needs no extra package.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
read -r -a processes <<<"${PROCESSES:-vp heat blurring}"
read -r -a seeds <<<"${SEEDS:-0 1}"
number=$((${#processes[@]} * ${#seeds[@]}))
task="${SLURM_ARRAY_TASK_ID:?start it with sbatch --array=0-$((number - 1))}"
if ((task >= number)); then
    echo "error: task $task of the array, but there are $number runs; use --array=0-$((number - 1))" >&2
    exit 2
fi
process="${processes[task / ${#seeds[@]}]}"
seed="${seeds[task % ${#seeds[@]}]}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
exec srun "${PYTHON:-python}" -m dpm_scales train "process=$process" "seed=$seed" \
    "run_dir=runs/array/$process-$seed" "$@"
