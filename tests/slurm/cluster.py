"""A real Slurm on one machine: munged, slurmctld and four slurmd, started in about a second, as any user.

As root every node has a host name of its own (and a private /etc/hosts that knows them all); otherwise all nodes carry
the machine's name and 127.0.0.1. Nodes claim four GPUs, which are links to /dev/null.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

NODES = ("n1", "n2", "n3", "n4")

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/run/munge.sock
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
PlugStackConfig=/dev/null
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000,nohold_on_prolog_fail
SlurmctldParameters=preempt_send_user_signal
EnforcePartLimits=ALL
GresTypes=gpu
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
MinJobAge=300
InactiveLimit=0
UnkillableStepTimeout=20
NodeName=DEFAULT CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:8
{nodes}
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=2-0 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n[1-4] MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


class SlurmCluster:
    """Starts on `start`, is gone after `stop`; `run` runs a client command on it."""

    def __init__(self, base: Path):
        self.base = base
        self.own_names = os.geteuid() == 0
        self.environment = dict(os.environ, SLURM_CONF=str(base / "slurm.conf"))
        self._daemons: list[subprocess.Popen] = []
        self._nodes: dict[str, subprocess.Popen] = {}

    @staticmethod
    def missing() -> list[str]:
        """Programs that this machine lacks."""
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        return [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]

    def start(self) -> None:
        """Writes the configuration, starts the daemons, and waits until all nodes are idle."""
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        base = self.base
        for name in ("run", "state", "log", "spool", "dev", *(f"spool/{node}" for node in NODES)):
            (base / name).mkdir(parents=True, mode=0o755)
        self._write_configuration()
        self._start_munge()
        self._spawn("slurmctld", "-D", "-i", "-f", str(base / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def start_node(self, node: str) -> None:
        """Starts the slurmd of one node."""
        daemon = ["slurmd", "-D", "-N", node, "-f", str(self.base / "slurm.conf")]
        if self.own_names:
            setup = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
            daemon = ["unshare", "--uts", "--mount", "sh", "-c", setup, "sh", str(self.base / "hosts"), node, *daemon]
        self._nodes[node] = self._spawn(*daemon)

    def wait_until_idle(self) -> None:
        """Returns once all nodes are idle. Raises RuntimeError after 60 s."""
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-o", "%T %D", check=False).split() != ["idle", "4"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the nodes did not come up; see {self.base}/log: {self.run('sinfo', check=False)}")
            time.sleep(0.1)

    def kill_node(self, node: str) -> None:
        """SIGKILL to slurmd, its step daemons and all they started: a node that lost power."""
        daemon = self._nodes[node]
        log = f"{self.base}/log/slurmd.{node}.log"
        victims = [psutil.Process(daemon.pid)]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "slurmstepd" and log in (file.path for file in process.open_files()):
                    victims += [process, *process.children(recursive=True)]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        daemon.wait()

    def _write_configuration(self) -> None:
        base, host = self.base, socket.gethostname().partition(".")[0]
        ports = free_ports(5)
        lines = []
        for number, (node, port) in enumerate(zip(NODES, ports[1:], strict=True), start=1):
            place = (
                f"NodeHostname={node} NodeAddr=127.0.1.{number}"
                if self.own_names
                else f"NodeHostname={host} NodeAddr=127.0.0.1"
            )
            lines.append(f"NodeName={node} {place} Port={port} State=UNKNOWN")
        conf = _CONF.format(base=base, host=host, user=getpass.getuser(), port=ports[0], nodes="\n".join(lines))
        (base / "slurm.conf").write_text(conf.lstrip())
        for gpu in range(8):
            (base / "dev" / f"gpu{gpu}").symlink_to("/dev/null")
        (base / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-4] Name=gpu File={base}/dev/gpu[0-7]\n")
        (base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = "".join(f"127.0.1.{number} {node}\n" for number, node in enumerate(NODES, start=1))
        (base / "hosts").write_text(Path("/etc/hosts").read_text().rstrip() + "\n" + names)

    def _start_munge(self) -> None:
        run = self.base / "run"
        key = self.base / "munge" / "key"
        key.parent.mkdir(mode=0o700)
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._spawn(
            "munged", "--foreground", "--force", f"--socket={run}/munge.sock", f"--key-file={key}",
            f"--pid-file={run}/munged.pid", f"--log-file={self.base}/log/munged.log", f"--seed-file={key.parent}/seed",
        )  # fmt: skip
        deadline = time.monotonic() + 10
        while not (run / "munge.sock").exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"munged did not start: {(self.base / 'log/daemons.log').read_text()}")
            time.sleep(0.02)

    def _spawn(self, *command: str) -> subprocess.Popen:
        with open(self.base / "log" / "daemons.log", "a") as log:
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
        self._daemons.append(daemon)
        return daemon

    def run(self, *command: str, check: bool = True, timeout: float = 30) -> str:
        """Output of a client command, e.g. run("squeue"). Raises RuntimeError with its words when it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job, by field."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """Cancels every job and ends the daemons that `start` made."""
        with contextlib.suppress(Exception):
            jobs = self.run("squeue", "-h", "-o", "%i").split()
            if jobs:
                self.run("scancel", *jobs)
                self.run("scancel", "--signal=KILL", "--full", *jobs, check=False)
                time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
