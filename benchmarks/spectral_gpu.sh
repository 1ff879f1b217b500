#!/usr/bin/env bash
# Compare all processes on one GPU at an equal number of images, several trainings side by side on the card.
#   benchmarks/spectral_gpu.sh OUT [MINUTES [JOBS [IMAGES [further options of benchmarks.spectral]]]]
# It stops after MINUTES (12); the same command resumes with the rows that are left. Tables and plots are in OUT. The exit
# status is 1 if a row failed. DEVICE=cpu and a small number of images try the script without a GPU; PYTHON names another
# interpreter, TABLES the seconds that the tables are given of MINUTES (60).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?give the folder of the results} minutes=${2:-12} jobs=${3:-6} images=${4:-1500000}
shift $(($# < 4 ? $# : 4))
device=${DEVICE:-cuda}
common=(--set "${SET:-mnist}" --images "$images" --device "$device" --out "$out" "$@")
if [[ $device == cuda ]]; then common+=(--override trainer.accelerator=gpu); else common+=(--override trainer.accelerator=cpu); fi

mkdir -p "$out"
set -m # a process group for each job, so that its training ends with it
groups=()
stop() { for group in "${groups[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done; }
trap stop EXIT
for ((i = 0; i < jobs; i++)); do
    "${PYTHON:-python}" -m benchmarks.spectral "${common[@]}" >"$out/job$i.log" 2>&1 &
    groups+=($!)
done
deadline=$((SECONDS + minutes * 60 - ${TABLES:-60}))
while ((SECONDS < deadline)) && kill -0 "${groups[@]}" 2>/dev/null; do sleep 1; done
stop
failed=0
for group in "${groups[@]}"; do
    status=0
    wait "$group" || status=$?
    ((status == 0 || status == 128 + 15)) || failed=1 # 15: stopped above
done
trap - EXIT
"${PYTHON:-python}" -m benchmarks.spectral "${common[@]}" --tables
cat "$out"/*.md 2>/dev/null || echo "no row is finished yet"
tail -n 3 "$out"/job*.log
exit "$failed"
