#!/bin/bash
# On every machine, with NODE=0, 1, ... and the name of the first in FIRST:
#   NODE=0 FIRST=host0 NODES=2 bash configs/launch/torchrun.sh configs/math_grpo_gpu.yaml run.dir=/shared/runs
# One process a machine: train.ranks says how many ranks each starts. The folder of the run is on storage that all share.
# SIGTERM to torchrun reaches the run, which saves a checkpoint; torchrun kills it after so many seconds, 30 where it is not told.
set -eu
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}"
exec torchrun --nnodes="${NODES:-2}" --node-rank="$NODE" --nproc-per-node=1 --no-python \
  --master-addr="$FIRST" --master-port="${PORT:-29500}" \
  fastreason train "$@"
