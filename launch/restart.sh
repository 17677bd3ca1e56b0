#!/usr/bin/env bash
# restart.sh [--restarts R] [--pause S] [--dry_run] -- COMMAND [ARGUMENT ...]
#
# Runs a command, and again where it ended because a process was lost: with exit code 75, or by a signal. SIGTERM goes
# on to the command, which is then not run again. Ends with the command's last exit code.
#   --restarts R   how often (default 20)
#   --pause S      seconds before that, in which the other processes stop too (default 60)

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
restarts=20 pause=60
parse 'restarts pause' '' "$@"
number --restarts "$restarts"
number --pause "$pause"
[[ ${#rest[@]} -gt 0 ]] || fail 'give the command behind --'
if "$dry_run"; then
  run "${rest[@]}"
  exit
fi

child='' stop=false
trap 'stop=true; [[ -z "$child" ]] || kill -TERM "$child" 2> /dev/null || true' TERM

# Runs a command as a child, which a signal can interrupt, and sets `ended` to its exit code.
await() {
  "$@" &
  child=$!
  ended=0
  wait "$child" || ended=$?
  while kill -0 "$child" 2> /dev/null; do # the signal ended the wait, not the command
    ended=0
    wait "$child" || ended=$?
  done
  child=''
}

for ((count = 0; ; count++)); do
  await "${rest[@]}"
  code=$ended
  if "$stop" || ((count == restarts || (code != 75 && code <= 128))); then
    exit "$code"
  fi
  echo "${0##*/}: a process was lost (exit code $code): again in $pause s, restart $((count + 1)) of $restarts" >&2
  await sleep "$pause"
  if "$stop"; then
    exit "$code"
  fi
done
