"""No checkpoint is taken of a model that may be lost, so that none that is sound has to make room for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lrtrain import distributed
from lrtrain.checkpoint.checkpointer import whole_checkpoints
from lrtrain.checkpoint.meta import CheckpointMeta, DataState, Progress
from lrtrain.run import saver
from lrtrain.run.saver import Saver


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As much of a run as is saved; it keeps one checkpoint."""
    values = {"keep": 1, "keep_every": None, "asynchronous": False, "minutes": 1e9}
    state = {"model": {"w": torch.ones(3)}, "optim": {"w.exp_avg": torch.ones(3)}}
    run: Any = SimpleNamespace(
        dir=tmp_path,
        world=distributed.start(),
        config=SimpleNamespace(checkpoint=SimpleNamespace(**values)),
        progress=Progress(),
        state=state,
        engine=SimpleNamespace(state_dict=lambda: state),
        tracker=SimpleNamespace(sync=lambda: None),
        log=lambda metrics: None,
    )
    meta = CheckpointMeta(0, run.progress, DataState("", None), {}, "", "", {}, 1)
    monkeypatch.setattr(saver, "meta_of", lambda run: meta)
    yield run
    distributed.stop()


def steps(folder: Path) -> list[str]:
    return [path.name for path in whole_checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize("where", ["model w", "optim w.exp_avg"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_not_saved_and_is_named(run: Any, where: str, bad: float, capsys):
    """Not even at the end or on a signal: the run then ends with 1, since `saved` is false."""
    keeper = Saver(run)
    run.progress.step = 10
    keeper.save(run)
    run.progress.step = 20
    part, name = where.split()
    run.state[part][name][1] = bad
    keeper.save(run, final=True)
    assert steps(run.dir) == ["step-00000010"] and not keeper.checkpointer.saved
    assert capsys.readouterr().err == f"step 20 is not saved: {where} is not finite\n"


def test_while_steps_are_skipped_only_the_last_checkpoint_is_taken(run: Any):
    keeper = Saver(run)
    run.progress.step = 10
    keeper.save(run)
    run.progress.step, run.progress.skipped_in_a_row = 20, 1
    keeper.save(run)
    assert steps(run.dir) == ["step-00000010"]
    keeper.save(run, final=True)
    assert steps(run.dir) == ["step-00000020"]
