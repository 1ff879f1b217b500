#!/usr/bin/env bash
# Compare all processes on one GPU at an equal number of images, several trainings side by side on the card.
#   benchmarks/spectral_gpu.sh OUT [MINUTES [JOBS [IMAGES [further options of benchmarks.spectral]]]]
# It stops after MINUTES (12); the same command resumes with the rows that are left. Tables and plots are in OUT.
# DEVICE=cpu and a small number of images try the script without a GPU; PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?give the folder of the results} minutes=${2:-12} jobs=${3:-6} images=${4:-1500000}
shift $(($# < 4 ? $# : 4))
device=${DEVICE:-cuda}
common=(--set "${SET:-mnist}" --images "$images" --device "$device" --out "$out" "$@")
if [[ $device == cuda ]]; then common+=(--override trainer.accelerator=gpu); else common+=(--override trainer.accelerator=cpu); fi

mkdir -p "$out"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < jobs; i++)); do
    "${PYTHON:-python}" -m benchmarks.spectral "${common[@]}" >"$out/job$i.log" 2>&1 &
    pids+=($!)
done
# a minute for the tables
deadline=$((SECONDS + minutes * 60 - 60))
while ((SECONDS < deadline)) && kill -0 "${pids[@]}" 2>/dev/null; do sleep 1; done
kill -TERM "${pids[@]}" 2>/dev/null || true
wait "${pids[@]}" || true
trap - EXIT
"${PYTHON:-python}" -m benchmarks.spectral "${common[@]}" --tables
cat "$out"/*.md 2>/dev/null || echo "no row is finished yet"
tail -n 3 "$out"/job*.log
