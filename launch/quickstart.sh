#!/usr/bin/env bash
# Set-up, then the smallest complete training run; on a machine without a GPU two processes share the CPU.
#
#   bash launch/quickstart.sh [--short] [more overrides of the recipe, e.g. --train.rounds 20]
#
# --short trains a few rounds only: enough to see that every part works, too few to learn much.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap 'exit 130' INT
trap 'exit 143' TERM HUP

args=()
for arg in "$@"; do
    if [ "$arg" = --short ]; then args+=(--train.rounds 6); else args+=("$arg"); fi
done

bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv" PYTHONUNBUFFERED=1
# A port that is free now, so that a second run on this machine does not collide on DeepSpeed's default one.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

ranks=()
if [ ! -e /dev/nvidia0 ] && ! nvidia-smi -L >/dev/null 2>&1; then
    ranks=(--num_gpus 2)
    # One thread a process: the ranks and the engine share the cores, and OpenMP threads that wait spin.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # glibc would hand large freed blocks back to the kernel and fault every page in again at the next step.
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-17179869184}"
fi

# `deepspeed` dies of a signal without passing it on, and the ranks would train on: so the run gets a process group of
# its own (that is what set -m does), every signal goes to all of it, and it is waited for.
run='' stopped=''
trap 'stopped=130; [ -z "$run" ] || kill -INT -- "-$run" 2>/dev/null || true' INT
trap 'stopped=143; [ -z "$run" ] || kill -TERM -- "-$run" 2>/dev/null || true' TERM HUP
set -m
deepspeed "${ranks[@]}" --master_port "$port" launch/train.py --recipe quickstart.yaml "${args[@]}" </dev/null &
run=$!
set +m
code=0
wait "$run" || code=$?
[ -z "$stopped" ] || code=$stopped
deadline=$((SECONDS + 120))
while kill -0 -- "-$run" 2>/dev/null; do
    if [ "$SECONDS" -ge "$deadline" ]; then
        echo "quickstart: processes of the run are alive 120 s after its end, they are killed now" >&2
        kill -KILL -- "-$run" 2>/dev/null || true
        break
    fi
    sleep 0.2
done
exit "$code"
