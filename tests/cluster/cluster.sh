#!/usr/bin/env bash
# A throw-away SLURM cluster on this machine: real slurmctld and slurmd, its own munge, virtual nodes n1 … nN.
#
#   cluster.sh install               installs the Debian packages; without root it prints what to install, and fails
#   cluster.sh start FOLDER NODES    starts it, all files below FOLDER; then:  export SLURM_CONF=FOLDER/slurm.conf
#   cluster.sh kill-node FOLDER n2   as if node n2 lost its power: SIGKILL for its slurmd and all that runs on it
#   cluster.sh boot-node FOLDER n2   starts it again
#   cluster.sh stop FOLDER           ends what start and boot-node have started, and nothing else
#
# No systemd, no cgroups, no accounting. Tested with SLURM 22.05 of Debian 12. It is meant for one process per node: the
# nodes share one machine, and nothing keeps their jobs apart.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin # slurmctld, slurmd and munged are there, and not every PATH has it

PACKAGES=(slurmctld slurmd slurm-client munge)

fail() {
  echo "cluster.sh: $*" >&2
  exit 1
}

install_packages() {
  if type slurmctld slurmd sbatch munged >/dev/null 2>&1; then return; fi
  local how="apt-get install --no-install-recommends ${PACKAGES[*]}"
  [ "$(id -u)" = 0 ] || fail "SLURM is not installed, and only root can: sudo $how"
  type apt-get >/dev/null 2>&1 || fail "SLURM is not installed; on Debian or Ubuntu it is: $how"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${PACKAGES[@]}" >/dev/null
}

# Wait until a command succeeds; false if it does not within some seconds.
within() {
  local tries=$(($1 * 5))
  shift
  until "$@" >/dev/null 2>&1; do
    ((tries-- > 0)) || return 1
    sleep 0.2
  done
}

write_config() {
  local folder=$1 nodes=$2 me host port
  me=$(id -un) host=$(hostname -s)
  # Below the range that the kernel hands out. If another cluster uses these ports, slurmctld logs it and start fails.
  port=$((20000 + RANDOM % 10000))
  cat >"$folder/slurm.conf" <<CONFIG
ClusterName=throwaway
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$me
SlurmdUser=$me
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log

# A credential lives 5 seconds, the least that is allowed: a requeued job waits until its old one has run out, which at
# the default takes two minutes.
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=5

# Without cgroups: with their plugins srun fails if there is no systemd.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none

# Decide often, preempt by partition, and find a dead node within seconds instead of minutes. A job is put back into the
# queue only if it asks for that, since not every site does so by default.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=0
KillWait=5
MinJobAge=3600
SlurmdTimeout=10
MessageTimeout=10

NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=1 RealMemory=500
PartitionName=main Nodes=ALL MaxTime=2-00:00:00 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF
CONFIG
}

all_idle() { [ "$(sinfo --noheader --Node --partition main --format %T | grep -cx idle)" = "$1" ]; }

# With its descriptors redirected: if a daemon kept the caller's pipe open, the caller would wait for it.
boot_node() {
  local folder=$1 node=$2
  mkdir -p "$folder/spool/$node"
  slurmd -N "$node" </dev/null >"$folder/log/slurmd-$node.err" 2>&1
}

start() {
  local folder nodes=$2 node
  mkdir -p "$1"
  folder=$(cd "$1" && pwd)
  [ ! -e "$folder/slurm.conf" ] || fail "$folder has a cluster already; take another folder"
  mkdir -p "$folder"/{state,log,spool}
  head -c 128 /dev/urandom >"$folder/munge.key"
  chmod 400 "$folder/munge.key"
  write_config "$folder" "$nodes"
  munged --force --socket="$folder/munge.sock" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed" --num-threads=2 \
    </dev/null >"$folder/log/munged.err" 2>&1
  within 10 munge --socket="$folder/munge.sock" --no-input || fail "munged does not answer: $folder/log/munged.err"
  export SLURM_CONF=$folder/slurm.conf
  slurmctld -i </dev/null >"$folder/log/slurmctld.err" 2>&1
  for node in $(seq -f n%g "$nodes"); do boot_node "$folder" "$node"; done
  if ! within 30 all_idle "$nodes"; then
    tail -n 20 "$folder"/log/* >&2
    fail "the cluster has not come up; the ends of its logs are above"
  fi
}

no_jobs() { [ -z "$(squeue --noheader)" ]; }

# A process's environment variable, as it was when it started.
variable_of() { tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | sed -n "s/^$2=//p"; }

# The slurmstepd of all nodes look alike. Their children know their node, so we find each by its children.
kill_node() {
  local folder=$1 wanted=$2 process parent
  local tasks=() guards=()
  for process in $(cd /proc && echo [0-9]*); do
    [ "$(variable_of "$process" SLURMD_NODENAME || true)" = "$wanted" ] || continue
    [ "$(variable_of "$process" SLURM_CONF || true)" = "$folder/slurm.conf" ] || continue
    tasks+=("$process")
    parent=$(ps -o ppid= -p "$process" | tr -d ' ') || continue
    if [ "$(ps -o comm= -p "$parent")" = slurmstepd ]; then guards+=("$parent"); fi
  done
  # The daemon first, so that it cannot report the deaths that follow to the controller.
  kill -9 "$(cat "$folder/slurmd-$wanted.pid")"
  if ((${#tasks[@]})); then kill -9 "${guards[@]}" "${tasks[@]}" 2>/dev/null || true; fi
}

all_gone() { ! kill -0 "$@" 2>/dev/null; }

stop() {
  local folder=$1 file jobs
  local processes=()
  [ -s "$folder/slurm.conf" ] || return 0
  export SLURM_CONF=$folder/slurm.conf
  jobs=$(squeue --noheader --format %A 2>/dev/null || true)
  if [ -n "$jobs" ]; then
    # shellcheck disable=SC2086  # one word a job
    scancel --signal=KILL --full $jobs 2>/dev/null || true
    # shellcheck disable=SC2086
    scancel $jobs 2>/dev/null || true
    within 15 no_jobs || true
  fi
  for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
    if [ -s "$file" ]; then processes+=("$(cat "$file")"); fi
  done
  kill "${processes[@]}" 2>/dev/null || true
  within 10 all_gone "${processes[@]}" || kill -9 "${processes[@]}" 2>/dev/null || true
}

case "${1:-} $#" in
  "install 1") install_packages ;;
  "start 3") start "$2" "$3" ;;
  "kill-node 3") kill_node "$(cd "$2" && pwd)" "$3" ;;
  "boot-node 3") SLURM_CONF=$(cd "$2" && pwd)/slurm.conf boot_node "$(cd "$2" && pwd)" "$3" ;;
  "stop 2") stop "$(cd "$2" && pwd)" ;;
  *) fail "cluster.sh install | start FOLDER NODES | kill-node FOLDER NODE | boot-node FOLDER NODE | stop FOLDER" ;;
esac
