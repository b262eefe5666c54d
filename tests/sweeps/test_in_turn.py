"""The outcome of a job from how its processes ended."""

import math

import pytest

from lrtrain.sweeps.in_turn import combine

LOST = {"failed": "RuntimeError: connection closed by peer", "at": 12.1}
LET_GO = {"failed": "killed by SIGKILL", "at": math.inf}
SUMMARY = {"step": 4}


@pytest.mark.parametrize(
    "ended,detail",
    [
        ([LOST, {"failed": "MemoryError: none", "at": 12.0}], "process 1: MemoryError: none"),
        ([{"failed": "MemoryError: none", "at": 12.0}, LOST], "process 0: MemoryError: none"),
        ([LOST, {"failed": "killed by SIGKILL"}], "process 1: killed by SIGKILL"),
        ([LET_GO, LOST], "process 1: RuntimeError: connection closed by peer"),
        ([SUMMARY, LOST], "process 1: RuntimeError: connection closed by peer"),
        ([{"failed": "param.rank=900 is wrong", "at": at} for at in (1.0, 2.0)], "param.rank=900 is wrong"),
    ],
)
def test_the_failure_that_came_first_is_told(ended: list[dict], detail: str):
    found = combine(ended)
    assert (found["status"], found["detail"]) == ("failed", detail)
    assert ended[found["failed_on"]]["failed"] == detail.removeprefix("process 0: ").removeprefix("process 1: ")


def test_processes_that_finished_give_the_summary_of_the_first():
    assert combine([SUMMARY, SUMMARY]) == {"status": "finished", "summary": SUMMARY}
    stopped = SUMMARY | {"stopped_by": "SIGTERM"}
    assert combine([stopped, stopped]) == {"status": "stopped", "detail": "at step 4"}
