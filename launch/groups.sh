# Sourced by the scripts that start long commands: every signal reaches all of what was started, and it is waited for.
# Each command is a process group (that is what set -m does): without job control the shell has what runs in the
# background ignore an interrupt, and `deepspeed` dies of a signal without passing it on, and its ranks would train on.

set -euo pipefail
groups=() stopped=''

# pass_signals [SIGNAL]: from now on signals go to all groups, as what they are or as SIGNAL.
pass_signals() {
    trap "pass_on ${1:-INT} 130" INT
    trap "pass_on ${1:-TERM} 143" TERM HUP
}

pass_on() {
    stopped=$2
    local group
    for group in "${groups[@]}"; do kill "-$1" -- "-$group" 2>/dev/null || true; done
}

# start COMMAND...
start() {
    [ -z "$stopped" ] || return 0
    set -m
    "$@" </dev/null &
    groups+=($!)
    set +m
}

# await SECONDS: until all have ended; what is alive so long after them is killed. Returns the exit code of a command
# that failed, or the signal's.
await() {
    local code=0 group deadline
    for group in "${groups[@]}"; do
        [ -n "$stopped" ] || wait "$group" || code=$?
    done
    deadline=$((SECONDS + $1))
    for group in "${groups[@]}"; do
        while kill -0 -- "-$group" 2>/dev/null; do
            if [ "$SECONDS" -ge "$deadline" ]; then
                echo "$(basename "$0"): processes are alive $1 s after the end, they are killed now" >&2
                kill -KILL -- "-$group" 2>/dev/null || true
                break
            fi
            sleep 0.2
        done
    done
    return "${stopped:-$code}"
}
