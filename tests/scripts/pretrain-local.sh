#!/bin/bash
# vmjepa pretrain: 1 node(s) x 2 rank(s), cluster profile local.
# Written by `vmjepa submit`; yours to keep, change and start again:
#   bash THIS-FILE
# Exit codes of the ranks: 0 done; 85 saved, to be continued; 93 cannot work, never retried; others: a crash.

set -uo pipefail
cd /home/me/vmjepa || exit 1
export PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1

run=/home/me/runs/a
command=(pretrain /home/me/vmjepa/configs/run.yaml logging.folder=/home/me/runs/a)

# Runs once on every node; its arguments are the command that starts the node's ranks.
# shellcheck disable=SC2329 # srun calls it
run_node() {
    "$@"
}

say() { printf '%s job %s: %s\n' "$(date '+%F %T')" "$job" "$*" >&2; }

job=$$
in_queue() { kill -0 "$1" 2>/dev/null; }

mkdir -p "$run/attempts" "$run/control" || exit 1

# A file with text in it asks the run to save because the machine wants it; an empty one comes from a person.
# shellcheck disable=SC2329 # the traps call it
ask_to_stop() {
    say "signal $1: asking the run to save"
    if [[ ! -e $run/control/stop ]]; then printf 'signal %s\n' "$1" >"$run/control/stop"; fi
}
step=''
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM
trap 'ask_to_stop INT' INT

first=1

# One job at a time per run directory.
lease=$run/control/lease
holder=$(cat "$lease" 2>/dev/null)
if [[ -n $holder && $holder != "$job" && $holder != "${VMJEPA_CHAINED:-}" ]] && in_queue "$holder"; then
    say "error: job $holder is at work on $run; wait for it, cancel it, or choose another run directory (if it has ended: rm $lease)"
    exit 93
fi
printf '%s\n' "$job" >"$lease"
finish() {
    rm -f "$lease" "$run/control/stop"
    exit "$1"
}

# The step that status.json tells.
step_done() {
    local step
    step=$(sed -n 's/^ "step": \([0-9][0-9]*\),*$/\1/p' "$run/status.json" 2>/dev/null)
    printf '%s\n' "${step:-0}"
}
if [[ -n $first ]]; then
    rm -f "$run/control/stop" "$run/control/save" "$run/control/crashes"
elif [[ -e $run/control/stop && ! -s $run/control/stop ]]; then
    say "stopped by request while it waited"
    finish 0
else
    rm -f "$run/control/stop"
fi

number=1
until mkdir "$run/attempts/$number" 2>/dev/null; do
    [[ -d $run/attempts/$number ]] || exit 1
    number=$((number + 1))
done
started_at=$(step_done)
ln -sfn "$number" "$run/attempts/latest"
attempt=$run/attempts/$number
export VMJEPA_ATTEMPT=$attempt

endpoint=127.0.0.1:$((20000 + job % 20000))
say "attempt $number; logs in $attempt"
launch=(/home/me/vmjepa/.venv/bin/python -m vmjepa.launch.node --nodes 1 --ranks 2 --cpu
    --head "$endpoint" --run "$run" --logs "$attempt" -- "${command[@]}")

# Nodes may end at different times, but not long after the first has.
run_node "${launch[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
trap '' USR1 TERM

# What the nodes said of themselves goes before srun's code, which is only the highest.
codes=" $(head -qn 1 "$attempt"/node_*.exit 2>/dev/null | tr '\n' ' ')"
for known in 93 85; do
    if [[ $codes == *" $known "* ]]; then
        code=$known
        break
    fi
done
reason=$(for file in "$attempt"/node_*.exit; do
    if [[ $(head -n 1 "$file" 2>/dev/null) == "$code" ]]; then sed -n 2p "$file"; fi
done | head -n 1)

again() {
    say "saved after step $(step_done); start the script again to go on"
    finish 85
}

case $code in
0)
    say "done, step $(step_done)"
    finish 0
    ;;
85)
    if [[ -e $run/control/stop && ! -s $run/control/stop ]]; then
        say "stopped by request after step $(step_done); submit the job again to go on"
        finish 0
    fi
    say "saved after step $(step_done)"
    again
    ;;
93)
    say "never retried: ${reason:-see $attempt}"
    finish 93
    ;;
*)
    now=$(step_done)
    crashes=$(cat "$run/control/crashes" 2>/dev/null)
    crashes=${crashes:-0}
    say "crashed (exit code $code) after step $now: ${reason:-see $attempt}"
    if ((now > started_at && crashes < 3)); then
        printf '%s\n' "$((crashes + 1))" >"$run/control/crashes"
        again
    elif ((now > started_at)); then
        say "error: given up after 3 retries: ${reason:-see $attempt}"
    else
        say "error: not retried, because no step was done: ${reason:-see $attempt}"
    fi
    finish "$code"
    ;;
esac
