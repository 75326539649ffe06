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

source launch/groups.sh
pass_signals
start deepspeed "${ranks[@]}" --master_port "$port" launch/train.py --recipe quickstart.yaml "${args[@]}"
await 120
