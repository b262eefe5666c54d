"""What a person sees while a run goes on."""

import io

import pytest
from crew import metrics_of

from lrtrain.tracking import console
from lrtrain.tracking.console import ConsoleTracker, print_summary


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TRAIN = {"train/loss": 4.2131, "train/lr": 2.9e-3, "perf/tokens_per_second": 12345.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_plain_line_per_log_interval(clock: list[float]):
    out = io.StringIO()
    tracker = ConsoleTracker(800, out)
    tracker.log(110, 0, metrics_of(TRAIN))
    clock[0] = 1.735
    tracker.log(120, 0, metrics_of(TRAIN))
    assert out.getvalue().splitlines() == [
        "step 110/800  loss 4.213  lr 2.9e-3  12.3k tok/s",
        "step 120/800  loss 4.213  lr 2.9e-3  12.3k tok/s  eta 1m58s",
    ]


def test_evaluations_and_spectra_have_lines_of_their_own():
    out = io.StringIO()
    tracker = ConsoleTracker(800, out)
    tracker.log(100, 0, metrics_of({"eval/loss": 4.061, "eval/perplexity": 58.03}))
    tracker.log(
        100,
        0,
        metrics_of(
            {f"spectra/summary/all/{of}": value for of, value in (("erank_mean", 101.23), ("erank_rel_mean", 0.791))}
        ),
    )
    tracker.log(100, 0, metrics_of({"perf/memory_gib": 1.0}))
    assert out.getvalue().splitlines() == [
        "eval 100/800  loss 4.061  perplexity 58.03",
        "spectra 100/800  mean effective rank 101.2, 79% of the possible",
    ]


def test_spectra_that_are_all_estimated_have_a_line_too():
    out = io.StringIO()
    ConsoleTracker(800, out).log(100, 0, metrics_of({"spectra/summary/all/erank_estimated_mean": 1012.34}))
    assert out.getvalue() == "spectra 100/800  mean effective rank 1012.3, estimated\n"


def test_a_terminal_has_one_live_line(clock: list[float]):
    terminal = Terminal()
    tracker = ConsoleTracker(10, terminal)
    for step in range(1, 11):
        tracker.log(step, 0, metrics_of(TRAIN))
    tracker.log(10, 0, metrics_of({"eval/loss": 4.061}))
    tracker.finish({}, 0)
    shown = terminal.getvalue()
    assert "step 10/10  loss 4.213" in shown
    assert shown.count("\n") == 2  # the evaluation's and the last one
    assert "eval 10/10  loss 4.061\n" in shown


def test_the_end_is_a_table():
    out = io.StringIO()
    print_summary({"eval/loss": 3.51234, "parameters": 58_000_000, "method": "lowrank"}, out)
    assert out.getvalue().splitlines() == [
        "eval/loss      3.512",
        "parameters  58000000",
        "method       lowrank",
    ]


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0s"), (58, "58s"), (118, "1m58s"), (119.7, "2m00s"), (11100, "3h05m"), (187200, "2d04h")],
)
def test_durations_show_two_units(seconds: float, text: str):
    assert console._duration(seconds) == text


@pytest.mark.parametrize("value, text", [(950, "950"), (12345, "12.3k"), (1.2e6, "1.2M")])
def test_rates_are_compact(value: float, text: str):
    assert console._compact(value) == text
