#!/usr/bin/env bash
# run.sh NAME [--restarts R] [--slices N] [--zone Z] [--project P] [--dry_run] -- --experiment E [flags]
#
# Starts `python -m launch` with the same flags on all workers, in the background; logs.sh follows it. The workers find
# each other. Refuses where one is still running. Where a process is lost, the others stop and all start again by
# themselves; after --stop or a preemption the same command goes on from the last checkpoint.
#   --restarts R   how often they start again (default 20)
#   --stop         ends what is running, after it has saved a checkpoint, and starts nothing

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stop=false restarts=20
begin 'restarts' 'stop' "$@"
number --restarts "$restarts"
# What stands in single quotes is for the shells of the workers. By its command line: the number may be another
# process's since a restart of the machine, or one that ended and nobody waited for.
# shellcheck disable=SC2016
alive='[ -f launch.pid ] && grep -aqs launch "/proc/$(cat launch.pid)/cmdline"'
if "$stop"; then
  # shellcheck disable=SC2016
  on_workers all "if $alive; then kill -TERM \"\$(cat launch.pid)\"; else echo 'nothing is running' >&2; fi"
  exit
fi
[[ ${#rest[@]} -gt 0 ]] || fail 'give the flags of python -m launch behind --, such as -- --experiment llama_1b'
# All are asked before any is started: some alone would wait for the others.
ready='[ -x maxlike-env/bin/python ] || { echo "run setup.sh first" >&2; exit 1; }'
on_workers all "if $alive; then echo 'still running' >&2; exit 1; fi; $ready"
words="$(printf '%q ' launch/restart.sh --restarts "$restarts" -- ../maxlike-env/bin/python -m launch "${rest[@]}")"
on_workers all "(cd maxlike && exec nohup $words) >> launch.log 2>&1 < /dev/null & echo \$! > launch.pid"
remember
