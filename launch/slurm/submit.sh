#!/usr/bin/env bash
# submit.sh NAME --nodes N --gpus G [--cpus C] [--time T] [--partition P] [--account A] [--restarts R] [--dry_run] --
#   --experiment E [flags of `python -m launch`]
#
# Queues `python -m launch` with one process a GPU, in the environment that is active here. The run directory must be on
# a disk that all nodes see. Other options of sbatch come as its own variables: SBATCH_QOS, SBATCH_CONSTRAINT, ...
#   --nodes N, --gpus G   nodes, and GPUs on each
#   --cpus C              CPUs for each GPU (default: the cluster's, which may be one: too few to read and pack data)
#   --time T              limit of one allocation, D-HH:MM:SS (default: the partition's); five minutes before it the run
#                         saves a checkpoint, and the job queues again
#   --restarts R          how often it may queue again, after the limit or a lost process (default 20)

set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../shell.sh"
nodes='' gpus='' cpus='' time='' partition='' account='' restarts=20
parse 'nodes gpus cpus time partition account restarts' '' "$@"
[[ -n "$name" ]] || fail 'give the job a NAME first; --help shows the flags'
count --nodes "$nodes"
count --gpus "$gpus"
[[ -z "$cpus" ]] || count --cpus "$cpus"
number --restarts "$restarts"
[[ ${#rest[@]} -gt 0 ]] || fail 'give the flags of python -m launch behind --, such as -- --experiment llama_1b'
command=(sbatch --job-name "$name" --nodes "$nodes" --ntasks-per-node "$gpus" --gpus-per-node "$gpus")
command+=(--requeue --open-mode append --output "$name-%j.log" --signal B:USR1@300)
command+=(--export "ALL,MAXLIKE_RESTARTS=$restarts")
[[ -z "$cpus" ]] || command+=(--cpus-per-task "$cpus")
[[ -z "$time" ]] || command+=(--time "$time")
[[ -z "$partition" ]] || command+=(--partition "$partition")
[[ -z "$account" ]] || command+=(--account "$account")
run "${command[@]}" "$here/job.sh" "${rest[@]}"
