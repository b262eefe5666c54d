"""Batches are read while steps run; what goes wrong with one is told when it is due."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lrtrain import distributed
from lrtrain.checkpoint.meta import Progress
from lrtrain.data.faults import Faults
from lrtrain.data.loader import READ_AHEAD
from lrtrain.errors import ConfigError, RunFailed
from lrtrain.run.batches import Batches

LONG = 30.0
SIZE = 4


class Source:
    """Batches of their own position; reading one waits until it may go on, and notes itself."""

    def __init__(self) -> None:
        self.faults = Faults(refuse=False)
        self.begun: list[int] = []
        self.changed = threading.Condition()
        self.may: Callable[[int], bool] = lambda position: True
        self.bad: set[int] = set()
        self.broken: set[int] = set()

    def batch(self, position: int, *_: int) -> Tensor:
        with self.changed:
            self.begun.append(position)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.may(position))
        if position in self.broken:
            raise ConfigError(f"{position} is broken")
        self.faults.rows += position in self.bad
        return torch.full((SIZE, 2), position)

    def has_begun(self, position: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: position in self.begun, LONG)

    def let(self, may: Callable[[int], bool]) -> None:
        with self.changed:
            self.may = may
            self.changed.notify_all()


@pytest.fixture
def run() -> Iterator[Any]:
    """As much of a run of ten steps as batches need; `logged` has its metrics."""
    logged: list[float] = []
    run = SimpleNamespace(
        data=SimpleNamespace(train=Source(), faults=Faults(refuse=False)),
        config=SimpleNamespace(train=SimpleNamespace(batch_size=SIZE, steps=10, timeout_minutes=1.0)),
        world=distributed.start(),
        progress=Progress(),
        stop=SimpleNamespace(signal=None),
        lock=SimpleNamespace(lost=lambda: False),
        saver=SimpleNamespace(overdue=lambda: False),
        dir="run",
        log=lambda metrics: logged.extend(metric.value for metric in metrics),
        logged=logged,
    )
    yield run
    run.data.train.let(lambda position: True)
    distributed.stop()


def taken(batches: Batches) -> int:
    """Take a batch as a step does; its position."""
    found = batches.next()
    assert found is not None
    run, (rows, _) = batches.run, found
    run.progress.step += 1
    run.progress.position = batches.first() + SIZE
    return int(rows[0, 0])


def test_the_next_batches_are_read_while_a_step_runs_and_no_further(run: Any):
    """The source reads the second batch only while the first one's step runs, which waits for that."""
    source, batches = run.data.train, Batches(run)
    source.let(lambda position: position == 0)
    assert taken(batches) == 0
    assert source.has_begun(SIZE)  # in the step
    source.let(lambda position: True)
    assert [taken(batches) for _ in range(9)] == [SIZE * i for i in range(1, 10)]
    assert source.begun == [SIZE * i for i in range(10)]  # in order, none beyond the last step


def test_at_most_as_many_are_read_ahead_as_cursors_are_kept_for(run: Any):
    source, batches = run.data.train, Batches(run)
    assert taken(batches) == 0
    assert batches.reader is not None
    for ahead in batches.reader.ahead:
        ahead.result(LONG)
    assert source.begun == [SIZE * i for i in range(1 + READ_AHEAD)]


def test_what_is_left_out_is_not_read(run: Any):
    run.progress.left_out = [[SIZE, 3 * SIZE]]
    batches = Batches(run)
    assert [taken(batches) for _ in range(3)] == [0, 3 * SIZE, 4 * SIZE]


def test_a_batch_that_cannot_be_read_fails_the_run_when_it_is_due_and_none_is_read_after_it(run: Any):
    source, batches = run.data.train, Batches(run)
    source.broken = {2 * SIZE}
    assert [taken(batches) for _ in range(2)] == [0, SIZE]
    with pytest.raises(ConfigError, match=f"{2 * SIZE} is broken"):
        batches.next()
    assert source.begun[-1] == 2 * SIZE


def test_unreadable_documents_are_counted_when_their_batch_is_due(run: Any):
    source, batches = run.data.train, Batches(run)
    source.bad = {2 * SIZE, 3 * SIZE}
    counts = []
    for i in range(5):
        if i:
            assert batches.reader is not None
            batches.reader.ahead[-1].result(LONG)  # a fault may be read by now, and is not due
        taken(batches)
        counts.append([*run.logged])
    assert counts == [[], [], [1], [1, 2], [1, 2]]


def test_a_signal_stops_and_a_limit_of_time_ends_a_run_whose_source_is_slow(run: Any):
    source, batches = run.data.train, Batches(run)
    source.let(lambda position: False)
    run.stop.signal = "SIGTERM"
    assert batches.next() is None
    run.stop.signal, run.config.train.timeout_minutes = None, 0.0
    with pytest.raises(RunFailed, match="1 of 1 processes have waited for the batch of step 1"):
        batches.next()


def test_the_time_waited_is_that_until_the_batch_is_there(run: Any):
    source, batches = run.data.train, Batches(run)
    source.let(lambda position: False)
    threading.Timer(0.3, lambda: source.let(lambda position: True)).start()
    found = batches.next()
    assert found is not None and found[1] > 0.2
