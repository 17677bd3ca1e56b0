# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share; sourced, not run. They speak to Google Cloud through `gcloud`, which must be
# installed and logged in. All take
#   NAME              of the queued resource; with --slices 1 its one node is called the same, else NAME-0, NAME-1, ...
#   --zone ZONE       or $TPU_ZONE
#   --project P       or $TPU_PROJECT (default: gcloud's own)
#   --dry_run         print the commands, quoted for a shell, and run none
# What create.sh, setup.sh and run.sh were asked is kept in $MAXLIKE_TPUS (default ~/.config/maxlike/tpus), for resume.sh.

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
}

# Keeps the words of this script's command line under its name.
remember() {
  "$dry_run" && return
  mkdir -p "$memory"
  printf '%s\0' "${asked[@]}" > "$memory/${0##*/}"
}

# The state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, FAILED, ...; MISSING where there is none.
state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format 'value(state.state)' 2> /dev/null ||
    echo MISSING
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
