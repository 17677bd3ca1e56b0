#!/usr/bin/env bash
# job.sh [flags of `python -m launch`]: what submit.sh queues. Runs on the first node and starts one process a GPU; they find
# each other.
#
# Exit code 75, or a signal's, means that a process was lost: the job queues again and goes on from the last checkpoint.
# So it does at SIGUSR1, which Slurm sends before the time limit: the processes get SIGTERM and save first.

set -euo pipefail
again=false
trap 'again=true; scancel --signal TERM "$SLURM_JOB_ID"' USR1

# The processes stop each other, each with its reason and exit code; killed by Slurm they would end as if one were lost.
# What cannot stop ends ten minutes after the first.
step=(srun --kill-on-bad-exit=0 --wait=600)
[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK") # srun no longer takes it over
"${step[@]}" python -m launch "$@" &
srun=$!
code=0
wait "$srun" || code=$?
while kill -0 "$srun" 2> /dev/null; do # the signal ended the wait, not the processes
  code=0
  wait "$srun" || code=$?
done
if ((code == 75 || code > 128)) || { "$again" && [[ "$code" == 0 ]]; }; then
  if ((${SLURM_RESTART_COUNT:-0} < ${MAXLIKE_RESTARTS:-20})); then
    echo "queueing again: $("$again" && echo 'the time was up' || echo 'a process was lost')"
    exec scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
