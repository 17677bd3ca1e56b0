#!/usr/bin/env bash
# job.sh [flags of `python -m launch`]: what submit.sh queues. Runs on the first node and starts one process a GPU.
#
# Exit code 75, or a signal's, means that a process was lost: the job queues again and goes on from the last checkpoint.
# So it does at SIGUSR1, which Slurm sends before the time limit: the processes get SIGTERM and save first.

set -euo pipefail
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first="${hosts%%$'\n'*}"
port=$((20000 + SLURM_JOB_ID % 20000))
again=false
trap 'again=true; scancel --signal TERM "$SLURM_JOB_ID"' USR1

# The variables are the processes' own.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec python -m launch "${@:2}" --coordinator "$1" --processes "$SLURM_NTASKS" \
  --process "$SLURM_PROCID"' launch "$first:$port" "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do # the signal ended the wait, not the processes
  code=0
  wait "$step" || code=$?
done
if ((code == 75 || code > 128)) || { "$again" && [[ "$code" == 0 ]]; }; then
  if ((${SLURM_RESTART_COUNT:-0} < ${MAXLIKE_RESTARTS:-20})); then
    echo "queueing again: $("$again" && echo 'the time was up' || echo 'a process was lost')"
    exec scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
