"""Processes that train together, without torchrun: forked from a server that has imported everything, so that a test
can start and kill many of them."""

import atexit
import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

from launching import ROOT

from lrtrain.config.check import check, check_directories
from lrtrain.config.compose import compose, default_composition
from lrtrain.config.schema import Config
from lrtrain.core.metrics import Metric
from lrtrain.distributed.world import environment_rank, environment_world_size, rendezvous
from lrtrain.run.loop import pretrain


def metrics_of(values: Mapping[str, float]) -> list[Metric]:
    """Metrics from the names under which they are logged."""
    named = {name: re.fullmatch(r"(\w+(?:/summary)?)/(?:(.+)/)?(\w+)", name) for name in values}
    return [Metric(*found.groups(), values[name]) for name, found in named.items() if found]


FORKS = multiprocessing.get_context("forkserver")
# What the server imports, once for all: this file, and with it most, and what a run imports as it goes.
PRELOADED = [
    "crew",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "lrtrain.layers.sltrain",
    "lrtrain.analysis.plots",
    "matplotlib.backends.backend_agg",
    "deepspeed.runtime.engine",
    "torch._inductor.compile_fx",
    "wandb.apis.public",
]
sys.path.append(str(ROOT / "launch"))  # its sweepers and launchers are there
default_composition("train.steps=1", "param.rank={a: 1}")  # so that Hydra has its plugins, and its parser its tables
_configurations = itertools.count()


class Place(NamedTuple):
    """Where a process runs, with what more in its environment, and the files that get its stdout and stderr."""

    folder: Path
    environment: Mapping[str, Any]
    out: Path
    err: Path


@functools.cache
def start_server() -> None:
    """Start the server that forks. It does not know our sys.path: it is given this clone's lrtrain, whichever is
    installed."""
    FORKS.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join((str(ROOT), str(Path(__file__).parent)))):
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def crew(job: Callable[..., None], arguments: tuple[Any, ...], folder: Path, size: int = 2) -> list[BaseProcess]:
    """Start `job(*arguments)` on `size` processes that find each other; what process k says is in `folder/k.txt`."""
    said = [folder / f"{k}.txt" for k in range(size)]
    environments = torchruns(size)
    return [forked(job, arguments, Place(folder, environments[k], said[k], said[k])) for k in range(size)]


def wait_until_ended(members: list[BaseProcess], timeout: float) -> None:
    """Until all have ended well, one of them badly, or `timeout` seconds are over."""
    deadline = time.monotonic() + timeout
    while (running := [m.sentinel for m in members if m.exitcode is None]) and not any(m.exitcode for m in members):
        if not connection.wait(running, deadline - time.monotonic()):
            return


def torchruns(size: int) -> list[dict[str, Any]]:
    """What torchrun would add to the environment of each process."""
    meeting_point = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return [meeting_point | sizes | {"RANK": k, "LOCAL_RANK": k} for k in range(size)]


def together(job: Callable[..., None], arguments: tuple[Any, ...], folder: Path, size: int = 2) -> None:
    """`crew`, to its end, which has to be a good one."""
    members = crew(job, arguments, folder, size)
    wait_until_ended(members, 1200)
    codes = [member.exitcode for member in members]
    for member in members:
        member.kill()  # what waits for one that failed
        member.join()
    assert codes == [0] * size, "\n".join((folder / f"{k}.txt").read_text() for k in range(size))


class Command:
    """`python path *arguments` in `folder`, or `torchrun`, without the seconds that imports take; used as a Popen.

    What all processes say is its stdout and stderr, or with `merged` all of it stdout.
    """

    def __init__(self, path: Path, arguments: list[str], folder: Path, size: int = 1, merged: bool = False):
        self.args = [str(path), *arguments]
        self.folder = TemporaryDirectory()
        out = [Path(self.folder.name, f"{k}.out") for k in range(size)]
        err = out if merged else [file.with_suffix(".err") for file in out]
        environments = [{}] if size == 1 else torchruns(size)
        self.said = (out, [] if merged else err)
        places = [Place(folder, environments[k], out[k], err[k]) for k in range(size)]
        self.members = [forked(script, (path, arguments), place) for place in places]
        self.pid = self.members[0].pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while it runs. Where a process fails the others are ended, as by torchrun."""
        codes = [member.exitcode for member in self.members]
        failed = [code for code in codes if code]
        if self.returncode is None and (failed or None not in codes):
            self.kill()
            self.returncode = failed[0] if failed else 0
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        wait_until_ended(self.members, timeout)
        if (code := self.poll()) is None:
            self.kill()
            raise TimeoutExpired(self.args, timeout, *self.outputs())
        return code

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        return self.outputs()

    def outputs(self) -> tuple[str, str]:
        """What has been said on stdout and stderr so far, process by process."""
        out, err = ("".join(file.read_text() for file in files if file.exists()) for files in self.said)
        return out, err

    def kill(self) -> None:
        for member in self.members:
            member.kill()
            member.join()

    def result(self, timeout: float = 240) -> CompletedProcess[str]:
        """As of subprocess.run."""
        return CompletedProcess(self.args, self.wait(timeout), *self.outputs())


def forked(job: Callable[..., None], arguments: tuple[Any, ...], place: Place) -> BaseProcess:
    """Start `job(*arguments)` at a place."""
    start_server()
    environment = dict(os.environ) | {key: str(value) for key, value in place.environment.items()}
    process = FORKS.Process(target=_run, args=(job, arguments, place._replace(environment=environment)))
    process.start()
    atexit.register(process.kill)  # where a test failed: else its end would be waited for
    return process


def _run(job: Callable[..., None], arguments: tuple[Any, ...], place: Place) -> None:
    gc.freeze()  # what the server has imported is not searched for garbage again and again,
    gc.set_threshold(50_000)  # and what little comes in a test only now and then
    os.chdir(place.folder)
    os.environ.clear()
    os.environ |= place.environment
    with place.out.open("a", buffering=1) as stdout, place.err.open("a", buffering=1) as stderr:
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = _end_of(job, arguments)
    os._exit(code)  # as launch/pretrain.py: nothing holds up the end


def _end_of(job: Callable[..., None], arguments: tuple[Any, ...]) -> int:
    """Run `job(*arguments)`; the exit code of a Python that does only that."""
    try:
        job(*arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


# --- what they do ------------------------------------------------------------------------------------------------


def script(path: Path, arguments: list[str]) -> None:
    """A script as `python path *arguments` runs it."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def train(overrides: list[str]) -> None:
    """The job of `launch/pretrain.py`, but for its picture, which takes longer than a tiny training."""
    with patch("lrtrain.analysis.plots.plot_run", lambda run: run / "no picture"):
        train_and_draw(overrides)


@patch("lrtrain.run.callbacks.log.matmul_peak", lambda *_: 1e12)
def train_and_draw(overrides: list[str]) -> None:
    """The job of `launch/pretrain.py`, but that it does not measure the peak that its MFU is a share of."""
    config = composed_by_one(overrides)
    check(config, environment_world_size())
    check_directories(config)
    pretrain(config)


def composed_by_one(overrides: list[str]) -> Config:
    """`compose(*overrides)`, which takes Hydra a tenth of a second, by process 0 for all."""
    store, key = rendezvous(), f"configuration {next(_configurations)}"
    if environment_rank() == 0:
        store.set(key, pickle.dumps(compose(*overrides)))
    return pickle.loads(store.get(key))


def train_all(jobs: list[list[str]]) -> None:
    """One job after another in the same processes; the last one draws its picture."""
    for job in jobs[:-1]:
        train(job)
    train_and_draw(jobs[-1])
