#!/usr/bin/env bash
# Trains on several hosts with GPUs, one process for each GPU. The processes find
# each other. In the checkout, which all hosts must see, with mowe in .venv
# (pip install '.[gpu]'):
#
#   sbatch --nodes=4 scripts/launch/slurm.sh --gin_file=gin_configs/examples/... \
#     --gin.MODEL_DIR=/shared/runs/mowe ...
#
# MODEL_DIR and the data must be on a file system of all hosts. Submitted again,
# a run goes on from its newest checkpoint.
#SBATCH --job-name=mowe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Two minutes before the end of its time the run saves, and stops.
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
# shellcheck source=/dev/null
source .venv/bin/activate
# Every process must see all GPUs of its host, of which it takes its own.
srun --gpu-bind=none --kill-on-bad-exit=1 mowe train "$@"
