"""A sink that fails is told of once, switched off after three failures, and stops nobody."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from crew import metrics_of

import lrtrain.tracking as tracking
from lrtrain.core.metrics import Metric
from lrtrain.tracking import Tracker, TrackingConfig, open_tracker
from lrtrain.tracking.fanout import FanOut
from lrtrain.tracking.jsonl import read_metrics


class Recording(Tracker):
    def __init__(self):
        self.steps: list[int] = []
        self.finished = False

    def log(self, step: int, tokens: int, metrics: Sequence[Metric]) -> None:
        self.steps.append(step)

    def finish(self, summary, exit_code) -> None:
        self.finished = True


class Failing(Recording):
    def log(self, step: int, tokens: int, metrics: Sequence[Metric]) -> None:
        super().log(step, tokens, metrics)
        raise OSError("disk full")


def test_a_failing_sink_is_switched_off_and_the_others_go_on(capsys: pytest.CaptureFixture[str]):
    broken, healthy = Failing(), Recording()
    tracker = FanOut({"broken": broken, "healthy": healthy})
    for step in range(6):
        tracker.log(step, step, [])
    tracker.finish({}, 0)

    assert healthy.steps == [0, 1, 2, 3, 4, 5]
    assert broken.steps == [0, 1, 2]
    assert broken.finished and healthy.finished
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "broken" in told[0] and "disk full" in told[0]


def test_an_interrupt_is_not_a_failure():
    class Interrupted(Tracker):
        def log(self, step: int, tokens: int, metrics: Sequence[Metric]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FanOut({"sink": Interrupted()}).log(1, 1, {})


def config(wandb: str) -> TrackingConfig:
    return TrackingConfig(wandb=wandb, project="p", entity=None, group=None, tags=[])


def test_without_wandb_there_are_jsonl_and_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tracker = open_tracker(config("disabled"), tmp_path, "id", {}, total_steps=10)
    tracker.log(1, 100, metrics_of({"train/loss": 2.0}))
    tracker.finish({}, 0)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["metrics"] == {"train/loss": 2.0}
    assert "step 1/10  loss 2.000" in capsys.readouterr().out


def test_a_run_starts_without_wandb_if_wandb_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def no_network(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(tracking, "WandbTracker", no_network)
    tracker = open_tracker(config("online"), tmp_path, "id", {}, total_steps=10)
    tracker.log(1, 100, metrics_of({"train/loss": 2.0}))
    assert "no network" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
