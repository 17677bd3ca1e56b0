#!/usr/bin/env bash
# setup.sh NAME [--nfs HOST:/SHARE] [--slices N] [--zone Z] [--project P] [--dry_run]
#
# Installs the committed code of this checkout on all workers, in ~/maxlike with its environment in ~/maxlike-env.
#   --nfs HOST:/SHARE   mounts a network share (Filestore) on ~/shared: the run directory of several workers must be on
#                       one disk that all of them see and can lock

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
nfs=''
begin 'nfs' '' "$@"
checkout="$(git -C "$here" rev-parse --show-toplevel 2> /dev/null)" || fail 'run it from a git checkout of maxlike'
if ! git -C "$checkout" diff --quiet HEAD; then
  echo "${0##*/}: uncommitted changes stay here" >&2
fi
archive="$memory/maxlike.tar.gz"
run mkdir -p "$memory"
run git -C "$checkout" archive --format tar.gz --output "$archive" HEAD
for node in $(nodes); do
  patiently gcloud compute tpus tpu-vm scp "$archive" "$node:maxlike.tar.gz" "${place[@]}" --worker all
done
run rm "$archive"
install='rm -rf maxlike && mkdir maxlike && tar -xzf maxlike.tar.gz -C maxlike && python3 -m pip install -q --user uv'
install+=' && python3 -m uv venv -q --allow-existing --python 3.11 maxlike-env'
install+=" && python3 -m uv pip install -q -p maxlike-env -c maxlike/constraints.txt -e './maxlike[tpu]'"
on_workers all "$install"
if [[ -n "$nfs" ]]; then
  # A new machine installs its own updates first, and holds apt's lock.
  mount='mkdir -p shared && { mountpoint -q shared || { sudo apt-get -o DPkg::Lock::Timeout=600 install -qq nfs-common'
  on_workers all "$mount && sudo mount -t nfs $(printf '%q' "$nfs") shared; }; }"
fi
remember
