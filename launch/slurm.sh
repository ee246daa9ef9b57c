#!/bin/sh
# A run on a Slurm cluster; what follows is what train.py takes, and out_dir must be a folder that all nodes see:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh config/mine.py --fsdp=8 --out_dir=/shared/out/mine
# The same command goes on where a job ended: two minutes before its time is over, and when it is pre-empted, the run
# saves and ends; a job that Slurm puts back into the queue goes on by itself.
#SBATCH --job-name=nanofoundry
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -d .venv ]; then . .venv/bin/activate; fi
# srun starts one torchrun a node; they find each other at the first node of the list
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d --rdzv_endpoint="$first:${PORT:-29500}" --rdzv_id="$SLURM_JOB_ID" train.py "$@"
