"""Processes that train together, without torchrun: forked from a server that has imported everything, so that a test
can start and kill many of them."""

import contextlib
import functools
import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import transformers.models.llama.modeling_llama
import transformers.models.opt.modeling_opt  # noqa: F401  # these by the server, once for all

from lrtrain.config import check, compose
from lrtrain.distributed import environment_world_size
from lrtrain.train import pretrain

FORKS = multiprocessing.get_context("forkserver")


@functools.cache
def start_server() -> None:
    """Start the server that forks; it imports this file, and with it everything. It does not know our sys.path."""
    FORKS.set_forkserver_preload(["crew"])
    with patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def crew(job: Callable[..., None], arguments: tuple[Any, ...], folder: Path, size: int = 2) -> list[BaseProcess]:
    """Start `job(*arguments)` on `size` processes that find each other; what process k says is in `folder/k.txt`."""
    meeting_point = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    members = []
    for k in range(size):
        place = meeting_point | {"RANK": k, "LOCAL_RANK": k, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        members.append(forked(job, arguments, folder, place, (folder / f"{k}.txt", folder / f"{k}.txt")))
    return members


def together(job: Callable[..., None], arguments: tuple[Any, ...], folder: Path, size: int = 2) -> None:
    """`crew`, to its end, which has to be a good one."""
    members = crew(job, arguments, folder, size)
    while any(member.is_alive() for member in members) and not any(member.exitcode for member in members):
        time.sleep(0.01)
    codes = [member.exitcode for member in members]
    for member in members:
        member.kill()  # what waits for one that failed
        member.join()
    assert codes == [0] * size, "\n".join((folder / f"{k}.txt").read_text() for k in range(size))


def python(path: Path, arguments: list[str], folder: Path, timeout: float = 240) -> CompletedProcess[str]:
    """`python path *arguments` in `folder`, without the seconds that imports take."""
    with TemporaryDirectory() as said:
        out, err = Path(said, "out"), Path(said, "err")
        process = forked(script, (path, arguments), folder, {}, (out, err))
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutExpired([str(path), *arguments], timeout, out.read_text(), err.read_text())
        assert process.exitcode is not None
        return CompletedProcess([str(path), *arguments], process.exitcode, out.read_text(), err.read_text())


def forked(
    job: Callable[..., None],
    arguments: tuple[Any, ...],
    folder: Path,
    environment: Mapping[str, Any],
    said: tuple[Path, Path],
) -> BaseProcess:
    """Start `job(*arguments)` in `folder`, with more in its environment; stdout and stderr go to the files `said`."""
    everything = dict(os.environ) | {key: str(value) for key, value in environment.items()}
    start_server()
    process = FORKS.Process(target=_run, args=(job, arguments, folder, everything, said))
    process.start()
    return process


def _run(
    job: Callable[..., None],
    arguments: tuple[Any, ...],
    folder: Path,
    environment: dict[str, str],
    said: tuple[Path, Path],
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    out, err = said
    with out.open("a", buffering=1) as stdout, err.open("a", buffering=1) as stderr:
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
    with patch("lrtrain.plots.plot_run", lambda run: run / "no picture"):
        train_and_draw(overrides)


def train_and_draw(overrides: list[str]) -> None:
    """The job of `launch/pretrain.py`."""
    config = compose(*overrides)
    check(config, environment_world_size())
    pretrain(config)


def train_all(jobs: list[list[str]]) -> None:
    """One job after another in the same processes; the last one draws its picture."""
    for job in jobs[:-1]:
        train(job)
    train_and_draw(jobs[-1])
