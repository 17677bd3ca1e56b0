#!/usr/bin/env bash
# logs.sh NAME [--worker W] [--state] [--slices N] [--zone Z] [--project P] [--dry_run]
#
# Follows the output of run.sh on one worker (of the first slice) until it is interrupted.
#   --worker W   its number (default 0, which shows the progress), or `all`
#   --state      prints the state of the queued resource instead

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
worker=0 state=false
begin 'worker' 'state' "$@"
[[ "$worker" =~ ^([0-9]+|all)$ ]] || fail "--worker $worker: give a number, or all"
if "$state"; then
  run gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format 'value(state.state)'
else
  [[ "$slices" == 1 ]] || name="$name-0"
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker "$worker" --command 'tail -n 100 -F launch.log'
fi
