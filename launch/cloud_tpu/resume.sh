#!/usr/bin/env bash
# resume.sh NAME [--watch] [--poll S] [--zone Z] [--project P] [--dry_run]
#
# After a preemption: deletes what is left of the TPU, and repeats create.sh, setup.sh and run.sh as they were last
# asked. Where the TPU is there and only the command ended, repeats run.sh. The run goes on from its last checkpoint.
#   --poll S    seconds between looks at the state while the TPU is waited for (default 60)
#   --watch     goes on looking, and resumes each time the TPU is taken back, until it is interrupted or delete.sh is
#               run. A command that is running is left alone; what fails on the way is tried again
#   --dry_run   looks at the state too

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
watch=false poll=60
begin 'poll' 'watch' "$@"
count --poll "$poll"

# Refuses to repeat what was not asked here.
remembered() {
  [[ -f "$memory/$1" ]] || fail "$name was not started from here, or is deleted since: there is no $memory/$1"
}

# Runs a script with the words it was last given.
repeat() {
  local words
  remembered "$1"
  mapfile -d '' -t words < "$memory/$1"
  run "$here/$1" "${words[@]}"
}

tell() {
  echo "${0##*/}: $1" >&2
}

requested=false anew=false started=false # whether the TPU was asked for here; is to be set up; has its command

ask() {
  repeat create.sh && requested=true anew=true started=false
}

# Does what the state asks for; false where a command failed. It is called in a condition, where `set -e` does nothing.
act() {
  case "$now" in
    ACTIVE)
      if "$anew"; then
        repeat setup.sh && anew=false || return 1
      elif "$watch" && ! "$seen"; then
        repeat run.sh || tell 'taken for running'
        started=true
      fi
      "$started" || { repeat run.sh && started=true; }
      ;;
    SUSPENDED | FAILED)
      if "$requested" && ! "$watch"; then # refused, or taken back before it could be used
        fail 'the TPU is refused or was taken back at once: try later, or with --watch'
      fi
      run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet && ask
      ;;
    MISSING) ask ;;
    *) "$started" || anew=true ;; # on its way, or on its way out: SUSPENDING cannot be deleted yet
  esac
}

for script in create.sh setup.sh run.sh; do
  remembered "$script"
done
seen=false
while true; do
  if look; then
    if ! act; then
      "$watch" || exit 1
      tell "that failed: again in $poll s"
    fi
    seen=true
  elif "$seen"; then
    tell "$why: looking again in $poll s"
  else
    fail "$why"
  fi
  if "$dry_run"; then # as if it were there now
    now=ACTIVE
    act
    exit
  fi
  if "$started" && ! "$watch"; then
    exit
  fi
  sleep "$poll"
done
