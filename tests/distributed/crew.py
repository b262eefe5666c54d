"""Processes that train together, without torchrun: forked from a server that has imported everything, so that a test
can start and kill many of them."""

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lrtrain.plots  # noqa: F401  # by the server, once for all
from lrtrain.config import compose
from lrtrain.train import pretrain

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["crew"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def crew(job: Callable[..., None], arguments: tuple[Any, ...], folder: Path, size: int = 2) -> list[BaseProcess]:
    """Start `job(*arguments)` on `size` processes that find each other; what process k says is in `folder/k.txt`."""
    port = free_port()
    members = [FORKS.Process(target=_member, args=(job, arguments, folder, k, size, port)) for k in range(size)]
    for member in members:
        member.start()
    return members


def _member(job: Callable[..., None], arguments: tuple[Any, ...], folder: Path, rank: int, size: int, port: int):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in place.items()}
    said = (folder / f"{rank}.txt").open("a", buffering=1)
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            job(*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # as launch/pretrain.py: nothing holds up the end
    os._exit(0)


def train(overrides: list[str]) -> None:
    """The job of `launch/pretrain.py`, but for its picture, which takes longer than a tiny training."""
    with patch("lrtrain.plots.plot_run", lambda run: run / "no picture"):
        pretrain(compose(*overrides))
