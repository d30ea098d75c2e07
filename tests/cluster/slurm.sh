#!/usr/bin/env bash
# A SLURM cluster of this one machine, for tests: slurm.sh install | up FOLDER | down FOLDER. Needs root, no systemd.
# `install` fetches Debian's packages, which `up` never does.
# Everything lies in FOLDER, on free ports; a second `up` changes nothing. Then: export SLURM_CONF=FOLDER/slurm.conf
# Two partitions, of which `urgent` preempts the jobs of `main`; two null devices as GPUs; no accounting.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
PACKAGES=(slurmctld slurmd slurm-client munge)

fail() { echo "slurm.sh: $*" >&2; exit 3; }

waited_for() { for _ in $(seq 150); do "$@" && return 0; sleep 0.1; done; return 1; }

alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

installed() { for each in slurmctld slurmd sbatch munged; do command -v $each >/dev/null || return 1; done; }

install() {
    ! installed || return 0
    [ "$(id -u)" = 0 ] || fail "only root can install ${PACKAGES[*]}"
    command -v apt-get >/dev/null || fail "needs ${PACKAGES[*]}, and there is no apt-get to install them"
    local log; log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    { timeout 60 apt-get update -qq && timeout 150 apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}"; } \
        >"$log" 2>&1 || fail "apt-get could not install ${PACKAGES[*]}: $(tail -n 1 "$log")"
    rm -f "$log"
}

configure() {
    local host cpus memory ports
    host=$(hostname -s) cpus=$(nproc) memory=$(($(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024 - 512))
    ports=$(python3 -c 'import socket as s; a, b = s.socket(), s.socket(); a.bind(("", 0)); b.bind(("", 0))
print(a.getsockname()[1], b.getsockname()[1])')
    for i in 0 1; do mknod "$D/gpu$i" c 1 3; done
    echo "Name=gpu File=$D/gpu[0-1]" >"$D/gres.conf"
    # cred_expire and sched_interval: a job that was put back into the queue otherwise waits minutes for its next start.
    cat >"$D/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$D/munge.socket,cred_expire=5
SlurmctldPort=${ports% *}
SlurmdPort=${ports#* }
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.pid
SlurmctldLogFile=$D/slurmctld.log
SlurmdLogFile=$D/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=1
MinJobAge=300
InactiveLimit=0
Waittime=0
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

idle() { sinfo -h -o %T 2>/dev/null | grep -qE '^(idle|mixed|allocated)'; }

up() {
    installed || fail "${PACKAGES[*]} are not installed; \`tests/cluster/slurm.sh install\` does it"
    [ "$(id -u)" = 0 ] || fail "only root can start slurmctld and slurmd"
    mkdir -p "$D"/{state,spool}
    [ -s "$D/slurm.conf" ] || configure
    export SLURM_CONF=$D/slurm.conf
    [ -s "$D/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$D/munge.key")
    # --force: the folder may be one that only its owner can enter, which munged takes for a mistake
    alive "$D/munged.pid" || munged --force --key-file="$D/munge.key" --socket="$D/munge.socket" \
        --pid-file="$D/munged.pid" --log-file="$D/munged.log" --seed-file="$D/munged.seed" 2>"$D/munged.err"
    alive "$D/slurmctld.pid" || slurmctld
    alive "$D/slurmd.pid" || slurmd
    waited_for idle || fail "no idle node after 15 s: $(tail -n 3 "$D/slurmctld.log" "$D/slurmd.log")"
}

down() {
    export SLURM_CONF=$D/slurm.conf
    scancel -u root 2>/dev/null && waited_for drained || true
    for each in slurmd slurmctld munged; do
        alive "$D/$each.pid" && kill "$(cat "$D/$each.pid")" || true
    done
    waited_for stopped || fail "still running: $(cat "$D"/*.pid)"
    # what stands between slurmd and a job: it would wait for its slurmctld
    for each in $(grep -lzsx "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ); do
        each=${each%/environ}
        [ "$(cat "$each/comm" 2>/dev/null)" != slurmstepd ] || kill -9 "${each#/proc/}" || true
    done
}

drained() { [ -z "$(squeue -h 2>/dev/null)" ]; }

stopped() { ! { alive "$D/slurmd.pid" || alive "$D/slurmctld.pid" || alive "$D/munged.pid"; }; }

D=$(realpath -m "${2:-.}")
case "${1:-}" in
    install) install ;;
    up | down) [ -n "${2:-}" ] || fail "$1 needs a folder"; "$1" ;;
    *) fail "install | up FOLDER | down FOLDER" ;;
esac
