#!/bin/bash
# Trains under SLURM, a process for each GPU; stops in time, is queued again and goes on:
#   sbatch launch/slurm.sh configs/hope_380m.yaml mesh=auto training.folder=/shared/runs
# The run's folder and data.cache have to be on a disk that all nodes see.
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
srun --kill-on-bad-exit=1 python train.py "$@" --distributed auto
