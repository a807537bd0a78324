#!/bin/bash
# vmjepa pretrain: 2 node(s) x 4 rank(s), cluster profile slurm-apptainer.
# Written by `vmjepa submit`; yours to keep, change and start again:
#   mkdir -p /home/me/runs/a && sbatch THIS-FILE
# Exit codes of the ranks: 0 done; 85 saved, to be continued; 93 cannot work, never retried; others: a crash.
#SBATCH --job-name=pretrain-a
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --output=/home/me/runs/a/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --requeue

set -uo pipefail
cd /home/me/vmjepa || exit 1
export PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1

run=/home/me/runs/a
command=(pretrain /home/me/vmjepa/configs/run.yaml logging.folder=/home/me/runs/a)

# Runs once on every node; its arguments are the command that starts the node's ranks.
# shellcheck disable=SC2329 # srun calls it
run_node() {
    export TRITON_CACHE_DIR=/tmp/vmjepa-$UID/triton
    mkdir -p "$TRITON_CACHE_DIR" || return 1
    local name
    for name in PYTHONSAFEPATH PYTHONNOUSERSITE VMJEPA_ATTEMPT SLURM_JOB_ID SLURM_RESTART_COUNT SLURM_NODEID SLURMD_NODENAME CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_HCA TRITON_CACHE_DIR; do
        if [[ -v $name ]]; then export "APPTAINERENV_$name=${!name}"; fi
    done
    apptainer exec --cleanenv --nv --pwd /home/me/vmjepa \
        --bind /datasets/k400:/datasets/k400:ro \
        --bind /home/me/runs/a:/home/me/runs/a \
        --bind /home/me/vmjepa:/home/me/vmjepa:ro \
        --bind /home/me/vmjepa/configs:/home/me/vmjepa/configs:ro \
        --bind /tmp:/tmp \
        /home/me/vmjepa/vmjepa.sif "$@"
}

say() { printf '%s job %s: %s\n' "$(date '+%F %T')" "$job" "$*" >&2; }

job=$SLURM_JOB_ID
in_queue() { [[ -n $(squeue --noheader --jobs="$1" --format=%i 2>/dev/null) ]]; }

mkdir -p "$run/attempts" "$run/control" || exit 1

# A file with text in it asks the run to save because the machine wants it; an empty one comes from a person.
# shellcheck disable=SC2329 # the traps call it
ask_to_stop() {
    say "signal $1: asking the run to save"
    if [[ ! -e $run/control/stop ]]; then printf 'signal %s\n' "$1" >"$run/control/stop"; fi
    # A run that hangs is given up while there is still time to requeue it.
    if [[ -n $step && -z $watchdog ]]; then
        { sleep 150 && say "no answer from the run; giving up this attempt" && kill -KILL "$step"; } &
        watchdog=$!
    fi
}
step='' watchdog=''
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

first=1
if [[ ${SLURM_RESTART_COUNT:-0} != 0 || -n ${VMJEPA_CHAINED:-} ]]; then first=; fi

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

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node -o "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
endpoint=${address:-$head}:$((20000 + job % 20000))
say "attempt $number on $SLURM_JOB_NODELIST; logs in $attempt"
launch=(python3 -m vmjepa.launch.node --nodes 2 --ranks 4
    --head "$endpoint" --run "$run" --logs "$attempt" -- "${command[@]}")

# Nodes may end at different times, but not long after the first has.
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=32 --kill-on-bad-exit=0 --wait=60 \
    bash -c "$(declare -f run_node); run_node \"\$@\"" run_node "${launch[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
if [[ -n $watchdog ]]; then kill "$watchdog" 2>/dev/null; fi
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
    local state
    state=$(scontrol show job -o "$job" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p')
    if [[ $state != RUNNING ]]; then
        say "not requeued by this script: Slurm says $state"
        finish 85
    fi
    say "requeued"
    scontrol requeue "$job" && sleep 60 # Slurm ends this script
    say "error: the requeue failed; submit the job again to go on after step $(step_done)"
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
