#!/bin/bash
# On the first machine, with a hostfile of lines `host slots=1` and ssh to each of them:
#   HOSTFILE=hosts bash configs/launch/deepspeed.sh configs/math_grpo_gpu.yaml run.dir=/shared/runs train.gpus=0-6
# One process a machine: train.ranks says how many ranks each starts. This launcher shows its process one GPU, so train.gpus and
# rollout.gpus must name those that are meant. The folder of the run is on storage that all share.
# To stop with a checkpoint, signal one `fastreason train` process (pkill -f "bin/fastreason train" on one machine) and not this
# launcher: it would end engine and ranks at once.
set -eu
exec deepspeed --hostfile="${HOSTFILE:-hostfile}" --num_gpus=1 --master_port="${PORT:-29500}" --no_python --no_local_rank \
  fastreason train "$@"
