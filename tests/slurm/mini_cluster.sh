#!/usr/bin/env bash
# A real Slurm cluster of several nodes on one Linux machine, for tests.
#
#   mini_cluster.sh start [-n NODES] [-g FAKE_GPUS_PER_NODE] [-c CPUS_PER_NODE]
#   mini_cluster.sh status | stop
#   mini_cluster.sh run CMD...        run a client command (sbatch, squeue, ...) on the login node
#   mini_cluster.sh node NODE CMD...  run a command inside a node
#   mini_cluster.sh kill-node NODE    power cut: every process of that node dies at once
#   mini_cluster.sh start-node NODE   bring the node back
#
# Needs root. Every node has its own network, hostname, mount and PID namespace, so its own IP, process table and
# /dev/shm. The controller and the clients live in a further "login" namespace, so nothing is added to the machine's own
# network. No systemd, no slurmdbd. State lives in $MINI_SLURM_DIR (default ${TMPDIR:-/tmp}/mini_slurm).
# shellcheck disable=SC1091,SC2015
set -euo pipefail

DIR=${MINI_SLURM_DIR:-${TMPDIR:-/tmp}/mini_slurm}
PREFIX=${MINI_SLURM_PREFIX:-n}
GRACE=${MINI_SLURM_GRACE:-15}          # GraceTime of the low partition, seconds
KILLWAIT=${MINI_SLURM_KILLWAIT:-5}     # SIGTERM -> SIGKILL, seconds
SUBNET=${MINI_SLURM_SUBNET:-10.213.0}
log() { printf '[mini-slurm %s] %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() { log "ERROR: $*"; exit 1; }
node_names() { local i; for ((i = 1; i <= NODES; i++)); do echo "$PREFIX$i"; done; }
load() { [[ -f $DIR/env ]] || die "no cluster in $DIR (start it first)"; . "$DIR/env"; }
running() { [[ -n ${1:-} ]] && kill -0 "$1" 2>/dev/null && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }
alive() { [[ -f $1 ]] && running "$(cat "$1")"; }
login() { # run in the login namespaces
  nsenter -t "$(cat "$DIR/login.pid")" -n -u -m --wd="$PWD" -- env SLURM_CONF="$DIR/slurm.conf" "$@"
}

write_conf() {
  local i
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=login($SUBNET.254)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
PlugStackConfig=$DIR/plugstack.conf
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SrunPortRange=17500-17999
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=00:00:00
JobRequeue=1
KillWait=$KILLWAIT
InactiveLimit=0
MinJobAge=600
WaitTime=0
CompleteWait=0
SlurmctldTimeout=30
SlurmdTimeout=${MINI_SLURM_NODE_TIMEOUT:-12}
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
UnkillableStepTimeout=30
HealthCheckInterval=0
TmpFS=/tmp
PropagateResourceLimits=NONE
SlurmctldParameters=preempt_send_user_signal
CONF
  i=0
  for n in $(node_names); do
    i=$((i + 1))
    echo "NodeName=$n NodeAddr=$SUBNET.$i NodeHostname=$n CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN"
  done >>"$DIR/slurm.conf"
  cat >>"$DIR/slurm.conf" <<CONF
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=$GRACE MaxTime=INFINITE DefaultTime=30 OverSubscribe=NO State=UP
PartitionName=high Nodes=ALL Default=NO  PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE DefaultTime=30 OverSubscribe=NO State=UP
CONF
  : >"$DIR/plugstack.conf"
  # A gpu line with Count= only is refused (0 reported). File= must exist; it must be a device node
  # (here: clones of /dev/null) for CUDA_VISIBLE_DEVICES to be set, with the number at its end as index.
  : >"$DIR/gres.conf"
  if ((GPUS > 0)); then
    mkdir -p "$DIR/dev"; for ((i = 0; i < GPUS; i++)); do mknod -m 666 "$DIR/dev/fakegpu$i" c 1 3 2>/dev/null || : >"$DIR/dev/fakegpu$i"; done
    echo "Name=gpu File=$DIR/dev/fakegpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
  fi
  # No cgroup plugin is used, but slurmd loads one all the same; "autodetect" finds v2 on most hosts
  # and v2 needs systemd/dbus. v1 initialises without touching anything; 23.02+ knows "disabled".
  local major; major=$(slurmd -V | sed -E 's/.* ([0-9]+)\..*/\1/')
  if ((major >= 23)); then echo "CgroupPlugin=disabled"; else echo "CgroupPlugin=cgroup/v1"; fi >"$DIR/cgroup.conf"
}

start_node() {
  local n=$1 i=${1#"$PREFIX"}
  mkdir -p "$DIR/spool/$n" "$DIR/nodes/$n"
  alive "$DIR/nodes/$n/init.pid" && die "$n already runs"
  # PID 1 of the node is a bash that reaps orphans; killing it kills the whole node.
  setsid unshare --net --uts --mount --pid --fork --kill-child=SIGKILL --mount-proc \
    bash "$0" _node_init "$n" "$i" "$DIR" >"$DIR/log/node-$n.out" 2>&1 </dev/null &
  local outer=$!
  echo "$outer" >"$DIR/nodes/$n/outer.pid"
  local inner="" t=0
  until inner=$(cat /proc/$outer/task/$outer/children 2>/dev/null | tr -d ' ') && [[ -n $inner ]]; do
    sleep 0.05; t=$((t + 1)); ((t < 100)) || die "$n did not start"; done
  echo "$inner" >"$DIR/nodes/$n/init.pid"
  until [[ -e $DIR/nodes/$n/ns_ready ]]; do sleep 0.05; t=$((t + 1)); ((t < 100)) || die "$n: no namespace"; done
  nsenter -t "$(cat "$DIR/login.pid")" -n ip link del "v$i" 2>/dev/null || true
  nsenter -t "$(cat "$DIR/login.pid")" -n ip link add "v$i" type veth peer name eth0 netns "$inner"
  nsenter -t "$(cat "$DIR/login.pid")" -n ip link set "v$i" master br0 up
  touch "$DIR/nodes/$n/net_ready"
}

private_files() { # names come from the cluster's own hosts file, never from DNS
  mount --bind "$DIR/hosts" /etc/hosts
  [[ ! -f /etc/nsswitch.conf ]] || mount --bind "$DIR/nsswitch.conf" /etc/nsswitch.conf
}

node_init() { # runs as PID 1 of a node
  local n=$1 i=$2 t=0
  DIR=$3; load
  hostname "$n"
  private_files
  mount -t tmpfs -o size=50%,mode=1777 shm /dev/shm   # else "nodes" would share memory segments
  ip link set lo up
  rm -f "$DIR/nodes/$n/net_ready"; touch "$DIR/nodes/$n/ns_ready"
  until [[ -e $DIR/nodes/$n/net_ready ]]; do sleep 0.05; t=$((t + 1)); ((t < 100)) || exit 3; done
  ip addr add "$SUBNET.$i/24" dev eth0; ip link set eth0 up
  rm -f "$DIR/nodes/$n/ns_ready" "$DIR/nodes/$n/net_ready"
  trap 'kill $(jobs -p) 2>/dev/null; exit 0' TERM
  while :; do  # one slurmd; if it dies the node stays up (so that a dead slurmd differs from a dead node)
    slurmd -N "$n" -f "$DIR/slurm.conf" -D &
    echo "slurmd pid in node: $!"
    wait $! || echo "slurmd ended with $?"
    until [[ -e $DIR/nodes/$n/restart ]]; do sleep 0.2; done
    rm -f "$DIR/nodes/$n/restart"
  done
}

login_init() { # holder of the login namespaces
  DIR=$1; . "$DIR/env"
  hostname login
  private_files
  ip link set lo up
  ip link add br0 type bridge; ip addr add "$SUBNET.254/24" dev br0; ip link set br0 up
  touch "$DIR/login_ready"
  exec sleep infinity
}

wait_up() {
  local t=0
  until login sinfo -h -N -o '%t' 2>/dev/null | sort | uniq -c | grep -qE "^ *$((NODES * 2)) idle$"; do
    sleep 0.2; t=$((t + 1))
    ((t < 150)) || { login sinfo -N || true; tail -20 "$DIR/log/slurmctld.log" >&2; die "cluster not up after 30 s"; }
  done
}

cmd_start() {
  NODES=2 GPUS=2 CPUS=4 MEM=4000
  while getopts n:g:c:r: o; do case $o in n) NODES=$OPTARG;; g) GPUS=$OPTARG;; c) CPUS=$OPTARG;; r) MEM=$OPTARG;; *) exit 2;; esac; done
  ((EUID == 0)) || die "needs root"
  for b in munged slurmctld slurmd sinfo; do command -v $b >/dev/null || die "$b is not installed (apt-get install -y slurmctld slurmd slurm-client munge)"; done
  alive "$DIR/slurmctld.pid" && die "already running in $DIR"
  trap 'rc=$?; ((rc == 0)) || { tail -n 20 "$DIR"/log/*.out "$DIR"/log/*.log >&2 2>/dev/null || true; cmd_stop; }' EXIT
  rm -rf "$DIR"; mkdir -p "$DIR"/{state,spool,log,run,nodes,munge}; chmod 755 "$DIR"
  printf '%s=%q\n' NODES "$NODES" GPUS "$GPUS" CPUS "$CPUS" MEM "$MEM" PREFIX "$PREFIX" SUBNET "$SUBNET" DIR "$DIR" >"$DIR/env"
  { echo "127.0.0.1 localhost"; echo "$SUBNET.254 login"
    i=0; for n in $(node_names); do i=$((i + 1)); echo "$SUBNET.$i $n"; done; true; } >"$DIR/hosts"
  { sed '/^hosts:/d' /etc/nsswitch.conf 2>/dev/null || true; echo "hosts: files"; } >"$DIR/nsswitch.conf"
  write_conf
  setsid unshare --net --uts --mount bash "$0" _login_init "$DIR" >"$DIR/log/login.out" 2>&1 </dev/null &
  echo $! >"$DIR/login.pid"
  for _ in $(seq 100); do [[ -e $DIR/login_ready ]] && break; sleep 0.05; done
  [[ -e $DIR/login_ready ]] || { cat "$DIR/log/login.out" >&2; die "login namespace"; }
  # munge: key 0400, its directory and socket directory owned by the user that runs munged
  dd if=/dev/urandom of="$DIR/munge/munge.key" bs=128 count=1 status=none
  chmod 700 "$DIR/munge/munge.key"; chmod 400 "$DIR/munge/munge.key"
  chmod 711 "$DIR/munge"
  munged --key-file="$DIR/munge/munge.key" --socket="$DIR/munge/munge.sock" --pid-file="$DIR/munge/munged.pid" \
    --log-file="$DIR/munge/munged.log" --seed-file="$DIR/munge/munged.seed"
  login slurmctld -f "$DIR/slurm.conf" -i >>"$DIR/log/slurmctld.out" 2>&1
  for n in $(node_names); do start_node "$n"; done
  wait_up
  trap - EXIT
  log "up: $NODES nodes, $CPUS cpus and $GPUS fake gpus each, dir $DIR"
  echo "export SLURM_CONF=$DIR/slurm.conf"
}

cmd_stop() {
  load
  local p n f pids=()
  login timeout 10 scancel -u root 2>/dev/null || true
  # Remember the pids first: the daemons delete their pid files before they are gone.
  for f in "$DIR/slurmctld.pid" "$DIR/munge/munged.pid"; do alive "$f" && pids+=("$(cat "$f")") || true; done
  for n in $(node_names); do
    f=$DIR/nodes/$n/init.pid; alive "$f" && pids+=("$(cat "$f")") || true
  done
  for p in "${pids[@]}"; do kill -TERM "$p" 2>/dev/null || true; done
  for _ in $(seq 30); do
    f=; for p in "${pids[@]}"; do running "$p" && f=1 || true; done
    [[ -n $f ]] || break; sleep 0.1
  done
  for n in $(node_names); do f=$DIR/nodes/$n/outer.pid; alive "$f" && pids+=("$(cat "$f")") || true; done
  alive "$DIR/login.pid" && pids+=("$(cat "$DIR/login.pid")") || true
  for p in "${pids[@]}"; do running "$p" && kill -KILL "$p" 2>/dev/null || true; done
  rm -f "$DIR/env" "$DIR/slurmctld.pid"
  log "stopped (logs in $DIR/log)"
}

cmd_kill_node() { load; local n=$1
  kill -KILL "$(cat "$DIR/nodes/$n/init.pid")"; log "$n: power cut"; }
cmd_start_node() { load; local n=$1
  if alive "$DIR/nodes/$n/init.pid"; then touch "$DIR/nodes/$n/restart"; else start_node "$n"; fi
  log "$n: started"; }
cmd_node() { load; local n=$1; shift
  nsenter -t "$(cat "$DIR/nodes/$n/init.pid")" -n -u -m -p --wd="$PWD" -- env SLURM_CONF="$DIR/slurm.conf" "$@"; }

case ${1:-} in
  start) shift; cmd_start "$@";;
  stop) cmd_stop;;
  status) load; login sinfo -N -o '%N %t %P %c %G %E'; login squeue;;
  run) load; shift; login "$@";;
  node) shift; cmd_node "$@";;
  kill-node) cmd_kill_node "$2";;
  start-node) cmd_start_node "$2";;
  _node_init) shift; node_init "$@";;
  _login_init) shift; login_init "$@";;
  *) sed -n '2,14p' "$0"; exit 2;;
esac
