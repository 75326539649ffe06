#!/usr/bin/env bash
# Set-up, then the tests. Without a suite: ruff, mypy and every test that needs nothing but this machine's CPU.
#
#   bash launch/test.sh [--fast] [--slow] [--gpu] [--slurm] [--sglang] [-- arguments for pytest]
#
# --slow    also start engines and several ranks; minutes
# --gpu     needs an NVIDIA GPU, and is named alone: on a machine with one, the other suites run in .venv-cpu
# --slurm   starts SLURM and ssh daemons of its own and needs root for network namespaces; on Debian and Ubuntu the
#           packages slurm-wlm, iproute2, openssh-client, dropbear-bin and pdsh are installed
#           (what takes longest: --slurm -- -m 'slurm and slow')
# --sglang  makes the environment .venv-sglang first
# Several other suites may be named. A skipped test counts as failed: a suite that cannot run here is not asked for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "test: $*" >&2; exit 2; }

has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; }

# need PACKAGE COMMAND...: installs Debian's package when a command is missing and this user may, else says what to do.
need() {
    local package=$1 missing=() command
    for command in "${@:2}"; do command -v "$command" >/dev/null || missing+=("$command"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "test: apt-get install $package"
        export DEBIAN_FRONTEND=noninteractive
        local install=(apt-get install -y -qq --no-install-recommends "$package")
        "${install[@]}" >/dev/null || { apt-get update -qq && "${install[@]}" >/dev/null; } ||
            die "apt-get could not install $package"
    else
        die "missing: ${missing[*]}; on Debian and Ubuntu: apt-get install $package"
    fi
}

suites=()
while [ $# -gt 0 ]; do
    case $1 in
        --fast|--slow|--gpu|--slurm|--sglang) suites+=("${1#--}") ;;
        -h|--help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --) shift; break ;;
        *) die "unknown argument '$1'; known are --fast, --slow, --gpu, --slurm and --sglang" ;;
    esac
    shift
done
[ ${#suites[@]} -gt 0 ] || suites=(fast)

venv=.venv setup=()
case " ${suites[*]} " in
    " gpu ") has_gpu || die "--gpu needs an NVIDIA GPU, and there is none on this machine" ;;
    *" gpu "*) die "--gpu runs on the CUDA packages and every other suite on those for the CPU: name it alone" ;;
    *" sglang "*) ! has_gpu || die "--sglang is pinned for CPU machines: run it on one without an NVIDIA GPU" ;;&
    *)
        if has_gpu; then
            # Two ranks would want two GPUs, and what is tested are the numbers of a CPU in float32.
            venv=.venv-cpu
            setup=(--device cpu --venv "$venv")
            export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
        fi
        ;;
esac
bash launch/setup.sh "${setup[@]}"
export PATH="$PWD/$venv/bin:$PATH" VIRTUAL_ENV="$PWD/$venv" GRPO_DS_NO_SKIP=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-17179869184}"

marks=''
for suite in "${suites[@]}"; do
    mark=$suite
    case $suite in
        fast)
            mark='(not slow and not gpu and not slurm and not sglang)'
            echo "test: ruff" && ruff check --config .ci/ruff.toml --quiet .
            ruff format --config .ci/ruff.toml --check --quiet . || die "run: ruff format --config .ci/ruff.toml ."
            echo "test: mypy" && mypy
            ;;
        slow) mark='(slow and not gpu and not slurm and not sglang)' ;;
        slurm)
            mark='(slurm and not slow)'
            # Debian's daemons lie outside of most users' PATH.
            export PATH=$PATH:/usr/sbin:/sbin
            need slurm-wlm slurmctld slurmd srun sbatch scontrol
            need iproute2 ip tc
            need openssh-client ssh ssh-keygen
            need dropbear-bin dropbear dropbearkey
            need pdsh pdsh
            unshare --net true 2>/dev/null ||
                die "--slurm makes network namespaces: run it as root (in a container with the capability SYS_ADMIN)"
            ;;
        sglang) bash launch/setup.sh --engine sglang ;;
    esac
    marks="${marks:+$marks or }$mark"
done

# Two halves side by side: most of an engine's or a rank's start is one thread importing, and SLURM waits a lot.
case "${suites[*]}" in
    fast) all=tests half=(tests/e2e tests/dist) ;;
    slurm) all=tests/slurm half=(tests/slurm/test_quick_start.py tests/slurm/test_engine_nodes.py) ;;
    *) all=tests half=() ;;
esac
if [ ${#half[@]} = 0 ] || [ $# -gt 0 ]; then
    echo "test: pytest -m '$marks'"
    exec python -m pytest -q -m "$marks" "$all" "$@"
fi
everything_else() {
    python -m pytest -q -m "$marks" "$all" "${half[@]/#/--ignore=}" || return
    # The examples in docstrings are tests too. They import a module under its own name, as the product does.
    [ "$all" != tests ] ||
        grep -rlE --include='*.py' '^ *>>> ' grpo_ds | xargs python -m pytest -q --import-mode=prepend --doctest-modules
}
echo "test: pytest, in two halves: ${half[*]}, and everything else (its output comes second)"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# pytest cleans up after an interrupt, so that is what any signal becomes.
source launch/groups.sh
pass_signals INT
start python -m pytest -q -m "$marks" "${half[@]}"
start everything_else >"$log" 2>&1
code=0
await 60 || code=$?
cat "$log"
exit "$code"
