# shellcheck shell=bash disable=SC2034
# All that is particular to your cluster. Edit this file, or keep a copy elsewhere and export SINK_SITE=/path/of/it.
#
# It is read twice: on the login node, by you (`. slurm/site.sh`), before sbatch, and by every job, from the folder that
# it was submitted from. Nothing else in this folder knows where it runs.

# ---- The queue. sbatch reads these; they win over the lines #SBATCH, and what you type after sbatch wins over them.
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=a100
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_GPUS_PER_NODE=8   # where GPUs must be asked for; then give --gpus-per-node=1 to eval, 0 to prepare, push

# ---- The node: processes that srun starts on each, one a GPU.
SINK_TASKS_PER_NODE=${SINK_TASKS_PER_NODE:-8}

# ---- The software: modules, then a virtual environment …
# module load cuda/12.8
if [ -r .venv/bin/activate ]; then . .venv/bin/activate; fi

# … or a container: a prefix of every command, or options of srun (pyxis). One that lacks scontrol is fine.
SINK_PREFIX=() # (apptainer exec --nv --bind "$PWD" sinkmodel.sif)
SINK_SRUN=()   # (--container-image="$PWD/sinkmodel.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# ---- The network: the interface through which nodes see each other, if the first one is not it.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# ---- What compute nodes cannot reach: fetched on the login node, read from the cache here.
# export HF_HOME=/scratch/me/huggingface HF_HUB_OFFLINE=1
# export WANDB_MODE=offline
