#!/bin/bash
# A stage on two hosts with four cards each, from the checkout:  sbatch docs/scaling/slurm.sh dpo my.yaml
# One torchrun a host starts a process for each card. All hosts must see the checkout, the data and `output`.
# Once the time is up:  sbatch docs/scaling/slurm.sh dpo my.yaml --resume
#SBATCH --job-name=qalign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
set -eu
stage=$1
shift
read -r first_host < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a host need ports of their own

srun --cpus-per-task "$SLURM_CPUS_PER_TASK" .venv/bin/torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first_host:$port" \
    -m "qalign.$stage" "$@"
