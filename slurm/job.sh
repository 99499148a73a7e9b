# shellcheck shell=bash
# Shared by all jobs, and sourced by the sbatch files: reads the site's settings, checks nodes, runs programs on them.
set -euo pipefail

say() { echo "$(date +%FT%T) $SLURM_JOB_ID: $*" >&2; }

cd "$SLURM_SUBMIT_DIR"
site=${SINK_SITE:-slurm/site.sh}
[ -r "$site" ] || {
  say "the site file $site cannot be read; submit from the checkout, or export SINK_SITE=/path/of/it"
  exit 2
}
set +u # environment modules and old virtual environments read unset variables
# shellcheck source=slurm/site.sh
. "$site"
set -u
: "${SINK_TASKS_PER_NODE:=1}"

# start NODES TASKS-PER-NODE COMMAND…: run with srun in the site's environment; each task gets its share of the cores.
start() {
  local nodes=$1 tasks=$2 cores=$((SLURM_CPUS_ON_NODE / $2))
  shift 2
  ((cores)) || cores=1
  # Without OMP_NUM_THREADS each process would start as many threads as the whole node has cores.
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores} srun --kill-on-bad-exit=1 --nodes="$nodes" --ntasks=$((nodes * tasks)) \
    --ntasks-per-node="$tasks" --cpus-per-task="$cores" "${SINK_SRUN[@]}" "${SINK_PREFIX[@]}" "$@"
}

# Run a program as a single process.
run() { start 1 1 "$@"; }

# Print one line about this node, for the log.
node_line() {
  local gpus free memory
  gpus=$( (nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || true) | sort | uniq -c | xargs)
  free=$(df -h --output=avail . | tail -n 1 | xargs)
  memory=$(awk '/^MemAvailable/ {printf "%d GB", $2 / 1048576}' /proc/meminfo)
  echo "node ${SLURMD_NODENAME:-}: ${gpus:-no GPU}; free: memory $memory, disk $free; restart ${SLURM_RESTART_COUNT:-0}"
}

# Print a line from every node of the job. Fails if a node does not answer; `timeout` bounds a node that hangs.
ask_nodes() {
  timeout 120 srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    bash -c "$(declare -f node_line); node_line"
}

# Whether the controller's record of this job contains this text.
job_is() { [[ $(scontrol show job "$SLURM_JOB_ID") == *"$1"* ]]; }

# Return the job to the queue, if it still runs; SLURM then ends this script during its sleep.
give_back() {
  job_is JobState=RUNNING || return 0
  say "$1: back into the queue"
  if scontrol requeue "$SLURM_JOB_ID"; then sleep 600; fi
  say "it could not be returned to the queue; submit it again: it resumes where it stopped"
}

# on_all_nodes PROGRAM ARGUMENTS…: run it on all nodes of the job, and end the job with its exit code.
on_all_nodes() {
  local code=0 since=$SECONDS
  # srun passes signals on to the program. This shell ignores them, so that it can log how the program ended.
  trap : TERM USR1
  ask_nodes || say "at least one node has not answered"
  start "$SLURM_JOB_NUM_NODES" "$SINK_TASKS_PER_NODE" "$@" || code=$?
  trap - TERM USR1
  case $code in
    0 | 2) ;; # done, or wrong input, which another start would not repair
    138 | 143)
      # Stopped by SIGUSR1 or SIGTERM. Rank 0 has returned the job to the queue, unless its container has no scontrol,
      # or the signal came before Python could handle it. But srun also sends SIGTERM to the other processes if one
      # cannot start. So a job that ran only for a moment is returned only if SLURM wants its nodes; otherwise a job
      # that cannot start would be tried for ever.
      if ((SECONDS - since >= ${SINK_SHORTEST_RUN:-120})) || ! job_is PreemptTime=None; then
        give_back "stopped by a signal"
      fi
      ;;
    *)
      # A node may have died without SLURM having noticed it yet (SlurmdTimeout, minutes). If the job ended now, it
      # would have failed; if it waits, SLURM returns it to the queue, without that node.
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
