"""SIGKILL of any process at any moment of a step or of a save: nothing is lost but the steps since the last checkpoint.

`pytest tests/distributed/test_kills.py --kills 200` for more than a few of them.
"""

import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from crew import crew, together, train
from runs import logged_steps, losses

from lrtrain.checkpoint.checkpointer import damage_of, whole_checkpoints

pytestmark = pytest.mark.full

SOON = 60  # seconds in which a process has noticed that the other is gone


def wait_until(moment, members: list[BaseProcess], deadline: float) -> None:
    """Until `moment()` holds or a process has ended."""
    while not moment() and all(member.is_alive() for member in members):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def a_moment(dice: random.Random, run: Path):
    """A condition to kill at: after some steps, or while a checkpoint is written, or when one just was; and a delay."""
    steps, checkpoints = logged_steps(run), run / "checkpoints"
    before = whole_checkpoints(checkpoints)
    kind = dice.choice(["step", "save", "saved", "start"])
    conditions = {
        "start": lambda: True,
        "step": lambda: logged_steps(run) > steps,
        "save": lambda: logged_steps(run) > steps and any(checkpoints.glob(".*.partial")),
        "saved": lambda: whole_checkpoints(checkpoints) != before,
    }
    delay = {"start": 3.0, "step": 0.5, "save": 0.03, "saved": 0.03}[kind]
    return kind, conditions[kind], dice.uniform(0, delay)


def test_any_process_killed_at_any_moment_costs_nothing_but_steps(tmp_path: Path, tiny: list[str], kills: int):
    """Two processes; the other one ends by itself, and the resumed trace is the uninterrupted one bit for bit."""
    base = [*tiny, "train.steps=30", "checkpoint.every=2", "train.batch_size=2", "train.micro_batch_size=1"]
    base += ["data.seq_len=16", "param.execution=factored", "checkpoint.keep=3"]
    together(train, ([*base, f"run.dir={tmp_path}/whole"],), tmp_path)
    expected = losses(tmp_path / "whole")
    assert len(expected) == 30

    dice = random.Random(kills)
    run, number, round_number = tmp_path / "killed", 0, 0
    while number < kills:
        if len(losses(run) if run.exists() else ()) == 30:  # it got through: once more
            assert losses(run) == expected
            round_number, run = round_number + 1, tmp_path / f"killed-{round_number}"
        kind, moment, delay = a_moment(dice, run)
        before = whole_checkpoints(run / "checkpoints")
        members = crew(train, ([*base, f"run.dir={run}", "resume=auto"],), tmp_path)
        wait_until(moment, members, time.monotonic() + 120)
        time.sleep(delay)
        victim = dice.randrange(2)
        alive = members[victim].is_alive()
        members[victim].kill()
        for member in members:
            member.join(5 if kind == "start" else SOON)
            if kind == "start" and member.is_alive():  # it waits for one that never came: torchrun would end it
                member.kill()
                member.join()
            assert member.exitcode is not None, f"kill {number} ({kind}) left a process that hangs"
        number += alive
        after = whole_checkpoints(run / "checkpoints")
        assert not before or after[-1].name >= before[-1].name
        assert [damage_of(checkpoint) for checkpoint in after] == [None] * len(after)
    together(train, ([*base, f"run.dir={run}", "resume=auto"],), tmp_path)
    assert losses(run) == expected
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
