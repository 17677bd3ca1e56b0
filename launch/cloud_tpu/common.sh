# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share; sourced, not run. They speak to Google Cloud through `gcloud`, which must be
# installed and logged in. All take
#   NAME              of the queued resource; with --slices 1 its one node is called the same, else NAME-0, NAME-1, ...
#   --zone ZONE       or $TPU_ZONE
#   --project P       or $TPU_PROJECT (default: gcloud's own)
#   --dry_run         print the commands, quoted for a shell, and run none
# What create.sh, setup.sh and run.sh were asked is kept for resume.sh, in $MAXLIKE_TPUS (default ~/.config/maxlike/tpus).

set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../shell.sh"

zone="${TPU_ZONE:-}" project="${TPU_PROJECT:-}" slices=1
asked=("$@")

# begin "VALUE FLAGS" "SWITCHES" "$@": reads the command line and checks what all scripts need.
begin() {
  local values="$1" switches="$2"
  shift 2
  parse "zone project slices $values" "$switches" "$@"
  [[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "give the TPU's NAME first, of lower-case letters, digits and hyphens; --help shows the flags"
  [[ -n "$zone" ]] || fail 'give --zone, such as europe-west4-b, or set TPU_ZONE'
  count --slices "$slices"
  place=(--zone "$zone")
  [[ -z "$project" ]] || place+=(--project "$project")
  memory="${MAXLIKE_TPUS:-$HOME/.config/maxlike/tpus}/$name"
  "$dry_run" || command -v gcloud > /dev/null || fail 'gcloud is not on PATH: install the Google Cloud CLI and log in'
}

# Keeps the words of this script's command line under its name, with the place they were asked for: another shell may
# have another $TPU_ZONE.
remember() {
  "$dry_run" && return
  mkdir -p "$memory"
  printf '%s\0' "${place[@]}" "${asked[@]}" > "$memory/${0##*/}"
}

# Sets `now` to the state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, FAILED, ...; MISSING where
# gcloud says that there is none. Where it fails otherwise, for want of a network, a permission or a login, that says
# nothing of the TPU: false, with gcloud's own words in `why`.
look() {
  local errors said
  errors="$(mktemp)"
  if now="$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format 'value(state.state)' \
    2> "$errors")"; then
    rm "$errors"
    return
  fi
  said="$(tr '\n' ' ' < "$errors")"
  rm "$errors"
  now=MISSING why="the state of $name is not known: ${said% }"
  [[ "$said" == *NOT_FOUND*"/queuedResources/$name'"* ]]
}

nodes() {
  if [[ "$slices" == 1 ]]; then
    echo "$name"
  else
    seq -f "$name-%.0f" 0 $((slices - 1))
  fi
}

# on_workers WORKERS COMMAND: a shell command on `all` workers, or one, of every slice.
on_workers() {
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker "$1" --command "$2" < /dev/null
  done
}

# patiently COMMAND ...: for what may come before the workers of a new TPU let anybody in.
patiently() {
  local tries=1
  until run "$@"; do
    ((tries++ < 10)) || fail "the workers of $name did not take it in $((tries - 1)) tries: look at the message above"
    sleep 30
  done
}
