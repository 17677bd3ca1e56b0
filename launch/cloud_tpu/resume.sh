#!/usr/bin/env bash
# resume.sh NAME [--watch] [--poll S] [--slices N] [--zone Z] [--project P] [--dry_run]
#
# After a preemption: deletes what is left of the TPU, and repeats create.sh, setup.sh and run.sh as they were last
# asked. Where the TPU is there and only the command ended, repeats run.sh. The run goes on from its last checkpoint.
#   --poll S    seconds between looks at the state while the TPU is waited for (default 60)
#   --watch     goes on looking, and resumes each time the TPU is taken back, until it is interrupted

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
watch=false poll=60
begin 'poll' 'watch' "$@"
count --poll "$poll"
for script in create.sh setup.sh run.sh; do
  [[ -f "$memory/$script" ]] || fail "$name was not started from here: there is no $memory/$script"
done

# Runs a script with the words it was last given.
repeat() {
  local words
  mapfile -d '' -t words < "$memory/$1"
  run "$here/$1" "${words[@]}"
}

start() {
  case "$(state)" in
    ACTIVE)
      if [[ "$1" == first ]]; then
        repeat run.sh
      fi
      return
      ;;
    SUSPENDED | SUSPENDING | FAILED)
      run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
      repeat create.sh
      ;;
    MISSING) repeat create.sh ;;
    *) ;; # it is on its way
  esac
  until "$dry_run"; do
    case "$(state)" in
      ACTIVE) break ;;
      SUSPENDED | FAILED) # refused, or taken back before it could be used
        "$watch" || fail "the TPU is refused or was taken back at once: try later, or with --watch"
        sleep "$poll"
        start again
        return
        ;;
    esac
    sleep "$poll"
  done
  repeat setup.sh
  repeat run.sh
}

start first
while "$watch"; do
  sleep "$poll"
  start again
done
