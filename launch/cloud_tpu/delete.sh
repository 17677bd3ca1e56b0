#!/usr/bin/env bash
# delete.sh NAME [--zone Z] [--project P] [--dry_run]
#
# Deletes the queued resource with its nodes, and all that is on their disks, without asking again.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin '' '' "$@"
run rm -rf "${memory:?}" # first: a resume.sh --watch would ask for it again
run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
