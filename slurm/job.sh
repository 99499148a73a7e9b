# shellcheck shell=bash
# What all jobs share: the site's settings, the health of the nodes, programs on all of them. Sourced by the sbatch files.
set -euo pipefail

say() { echo "$(date +%FT%T) $SLURM_JOB_ID: $*" >&2; }

cd "$SLURM_SUBMIT_DIR"
site=${SINK_SITE:-slurm/site.sh}
[ -r "$site" ] || {
  say "the site file $site cannot be read; submit from the checkout, or export SINK_SITE=/path/of/it"
  exit 2
}
set +u # environment modules and old virtual environments look at variables that are not set
# shellcheck source=slurm/site.sh
. "$site"
set -u
: "${SINK_TASKS_PER_NODE:=1}"

# start NODES TASKS-A-NODE COMMAND…: with srun, in the site's environment, each task with its share of the node's cores.
start() {
  local nodes=$1 tasks=$2 cores=$((SLURM_CPUS_ON_NODE / $2))
  shift 2
  ((cores)) || cores=1
  # Without this each process would start as many threads as the whole node has cores.
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores} srun --kill-on-bad-exit=1 --nodes="$nodes" --ntasks=$((nodes * tasks)) \
    --ntasks-per-node="$tasks" --cpus-per-task="$cores" "${SINK_SRUN[@]}" "${SINK_PREFIX[@]}" "$@"
}

# A program that is one process.
run() { start 1 1 "$@"; }

# One line about this node, for the log.
node_line() {
  local gpus free memory
  gpus=$( (nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || true) | sort | uniq -c | xargs)
  free=$(df -h --output=avail . | tail -n 1 | xargs)
  memory=$(awk '/^MemAvailable/ {printf "%d GB", $2 / 1048576}' /proc/meminfo)
  echo "node ${SLURMD_NODENAME:-}: ${gpus:-no GPU}; free: memory $memory, disk $free; restart ${SLURM_RESTART_COUNT:-0}"
}

# A line from every node of the job. Fails where one does not answer; `timeout` for one that answers never.
ask_nodes() {
  timeout 120 srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    bash -c "$(declare -f node_line); node_line"
}

# Whether what the controller knows of this job has these words.
job_is() { [[ $(scontrol show job "$SLURM_JOB_ID") == *"$1"* ]]; }

# Give the job back to the queue, where it still runs; SLURM then ends this script in its sleep.
give_back() {
  job_is JobState=RUNNING || return 0
  say "$1: back into the queue"
  if scontrol requeue "$SLURM_JOB_ID"; then sleep 600; fi
  say "it could not be put back; submit it again: it goes on where it stopped"
}

# on_all_nodes PROGRAM ARGUMENTS…: run it on all nodes of the job, and end the job with its exit code.
on_all_nodes() {
  local code=0 since=$SECONDS
  # Signals are for the program, which srun passes them to. This shell lives on, to say how that ended.
  trap : TERM USR1
  ask_nodes || say "not every node has answered"
  start "$SLURM_JOB_NUM_NODES" "$SINK_TASKS_PER_NODE" "$@" || code=$?
  trap - TERM USR1
  case $code in
    0 | 2) ;; # done, or told what is wrong with the input: nothing that another start would mend
    138 | 143)
      # Asked to stop, by SIGUSR1 or SIGTERM. Rank 0 gives the job back, unless its container has no scontrol, or the
      # signal came before Python could take it. But SIGTERM is also how srun ends the others when one cannot even
      # start: a job that has lived for a moment only is given back where SLURM wants its nodes, or it would do so for
      # ever.
      if ((SECONDS - since >= ${SINK_SHORTEST_RUN:-120})) || ! job_is PreemptTime=None; then
        give_back "stopped by a signal"
      fi
      ;;
    *)
      # A node may have died without SLURM knowing of it yet (SlurmdTimeout, minutes): nothing can be started there. A
      # job that ended now would have failed; one that waits is put back into the queue, without that node.
      say "$1 has ended with exit code $code; asking the nodes"
      if ! ask_nodes; then
        say "a node does not answer; waiting for SLURM to take it out"
        sleep "${SINK_NODE_PATIENCE:-900}"
        give_back "SLURM has not noticed the node"
      fi
      ;;
  esac
  say "exit code $code"
  exit "$code"
}
