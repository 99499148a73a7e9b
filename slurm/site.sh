# shellcheck shell=bash disable=SC2034
# All settings of your cluster. Edit this file, or keep a copy elsewhere and export SINK_SITE=/path/of/it.
#
# It is read twice: you read it on the login node (`. slurm/site.sh`) before sbatch, and every job reads it in the
# folder from which it was submitted. No other file in this folder depends on the cluster.

# ---- The queue. sbatch reads these variables. They override the #SBATCH lines; options of sbatch override them.
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=a100
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_GPUS_PER_NODE=8   # if GPUs must be requested; then give --gpus-per-node=1 to eval, 0 to prepare, push

# ---- The node: number of processes that srun starts on each, one per GPU.
SINK_TASKS_PER_NODE=${SINK_TASKS_PER_NODE:-8}

# ---- The software: modules, then a virtual environment …
# module load cuda/12.8
if [ -r .venv/bin/activate ]; then . .venv/bin/activate; fi

# … or a container: a prefix of every command, or options of srun (pyxis). It need not have scontrol.
SINK_PREFIX=() # (apptainer exec --nv --bind "$PWD" sinkmodel.sif)
SINK_SRUN=()   # (--container-image="$PWD/sinkmodel.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# ---- The network: the interface between the nodes, if it is not the first one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# ---- If compute nodes have no network: files are fetched on the login node and read from the cache.
# export HF_HOME=/scratch/me/huggingface HF_HUB_OFFLINE=1
# export WANDB_MODE=offline
