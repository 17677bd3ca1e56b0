#!/usr/bin/env bash
# create.sh NAME --type TYPE [--spot] [--runtime R] [--slices N] [--zone Z] [--project P] [--dry_run]
#
# Asks for a TPU as a queued resource and returns; `logs.sh NAME --state` tells whether it is there.
#   --type TYPE   accelerator type: v5litepod-16, v5p-128, v6e-64, ...
#   --runtime R   software of the workers (default: the one for the type)
#   --slices N    that many slices of the type, joined by the data-centre network (default 1)
#   --spot        cheaper, and taken back at any time: see resume.sh

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
type='' runtime='' spot=false
begin 'type runtime' 'spot' "$@"
[[ -n "$type" ]] || fail 'give --type, such as v5litepod-16 or v6e-64'
if [[ -z "$runtime" ]]; then
  case "$type" in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "--type $type: its runtime is not known here, name it with --runtime" ;;
  esac
fi
command=(gcloud compute tpus queued-resources create "$name" "${place[@]}")
command+=(--accelerator-type "$type" --runtime-version "$runtime")
if [[ "$slices" == 1 ]]; then
  command+=(--node-id "$name")
else
  command+=(--node-count "$slices" --node-prefix "$name")
fi
if "$spot"; then
  command+=(--spot)
fi
run "${command[@]}"
remember
