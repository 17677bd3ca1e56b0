#!/usr/bin/env bash
# run.sh NAME [--slices N] [--zone Z] [--project P] [--dry_run] -- --experiment E [flags of `python -m launch`]
#
# Starts the same command on all workers, in the background; logs.sh follows it. The workers find each other. Refuses
# where one is still running. After SIGTERM, a kill or a preemption the same command goes on from the last checkpoint.
#   --stop   ends what is running, after it has saved a checkpoint, and starts nothing

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stop=false
begin '' 'stop' "$@"
# What stands in single quotes is for the shells of the workers.
# shellcheck disable=SC2016
if "$stop"; then
  on_workers all 'kill -TERM "$(cat launch.pid)"'
  exit
fi
[[ ${#rest[@]} -gt 0 ]] || fail 'give the flags of python -m launch behind --, such as -- --experiment llama_1b'
words="$(printf '%q ' "${rest[@]}")"
# By its command line: the number may be another process's since a restart, or one that ended and nobody waited for.
# shellcheck disable=SC2016
alive='if [ -f launch.pid ] && grep -aqs launch "/proc/$(cat launch.pid)/cmdline"; then echo "still running" >&2; exit 1; fi'
start="(cd maxlike && exec nohup ../maxlike-env/bin/python -m launch $words) > launch.log 2>&1 < /dev/null &"
on_workers all "$alive; $start echo \$! > launch.pid"
remember
