"""A real Slurm of two nodes, both this machine, with a munged of its own: nothing of the system's is touched."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crew import free_port

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")

# Requeued jobs wait for `cred_expire` seconds. A busy machine may save late: jobs may exceed their time by ten minutes,
# but are told of its end as ever.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={nodes[0]}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
OverTimeLimit=10
GresTypes=gpu
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=16 RealMemory=4000 Gres=gpu:8
NodeName={nodes[1]} NodeHostname={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=4000 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Slurm's commands work in this environment, with 16 cores and 8 GPUs in each node that do not exist; skips the
    test where Slurm is not installed, or not permitted."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"a real Slurm needs Debian's slurm-wlm: there is no {missing[0]} here")
    if os.geteuid():
        pytest.skip("a real Slurm is started by root")
    before = os.environ.copy()
    os.environ["SLURM_CONF"] = write_configuration(folder)
    daemons: list[subprocess.Popen] = []
    try:
        for command in commands(folder):
            with (folder / "daemons.log").open("a") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            time.sleep(1)
        wait_for_the_nodes(folder, daemons)
        try:
            yield
        finally:
            kill_jobs()
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        os.environ.clear()
        os.environ.update(before)


def names() -> tuple[str, str]:
    """Of the nodes: the machine's own, by which those of a job find the first one, and another."""
    host = socket.gethostname().partition(".")[0]
    return host, f"{host}-2"


def write_configuration(folder: Path) -> str:
    """The path of slurm.conf."""
    (folder / "state").mkdir()
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "key").chmod(0o400)
    ports = {"controller": free_port(), "ports": (free_port(), free_port())}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, nodes=names(), **ports))
    for i in range(8):
        (folder / f"gpu{i}").touch()
    (folder / "gres.conf").write_text(f"NodeName={','.join(names())} Name=gpu File={folder}/gpu[0-7]\n")
    return str(folder / "slurm.conf")


def commands(folder: Path) -> list[list[str]]:
    """The daemons, in the foreground."""
    own = {"socket": "munge.socket", "key-file": "key", "pid-file": "pid", "log-file": "munge.log", "seed-file": "seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in own.items())]
    return [munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in names())]


def wait_for_the_nodes(folder: Path, daemons: list[subprocess.Popen]) -> None:
    """Skips the test, with the reason, where they do not come up."""
    for _ in range(60):
        if any(daemon.poll() is not None for daemon in daemons):
            break
        said = subprocess.run(["sinfo", "--noheader", "--states=idle", "--format=%D"], capture_output=True, text=True)
        if said.stdout.strip() == "2":
            return
        time.sleep(0.5)
    pytest.skip(f"Slurm does not start here: {[log.read_text()[-500:] for log in folder.glob('*.log')]}")


def kill_jobs() -> None:
    """End those that are still there, and wait for it: they would outlive the daemons."""
    for _ in range(20):
        if not subprocess.run(["squeue", "--noheader"], capture_output=True).stdout:
            break
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], capture_output=True)
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        time.sleep(1)


def job(number: str) -> dict[str, str]:
    """What Slurm knows of a job, such as its JobState and how many Restarts it had."""
    said = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True)
    return dict(re.findall(r"(\w+)=(\S*)", said.stdout))


def submit(line: list[str], folder: Path, **environment: str) -> str:
    """The number of a job that `sbatch` was given in a folder."""
    command = ["sbatch", "--parsable", *line]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
