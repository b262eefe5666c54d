"""What a spike is, and what is read after one."""

import json
from pathlib import Path

import pytest

from lrtrain.checkpoint.checkpointer import MARKER, checksums
from lrtrain.checkpoint.meta import META, CheckpointMeta, DataState, Progress
from lrtrain.config.schema import RollbackConfig
from lrtrain.run.rollback import beyond, checkpoint_before, spike_of, take_back

RULE = RollbackConfig(spike=5.0, window=5, skip=1, most=1)


def test_a_spike_is_far_above_the_median_and_one_spike_before_it_hides_none():
    recent = [3.0, 3.1, 2.9, 3.0, 3.2]  # median 3, median deviation 0.1
    assert spike_of(3.49, recent, RULE) is None
    assert "the loss 3.51 is a spike: above 3 + rollback.spike=5 × 0.1" in str(spike_of(3.51, recent, RULE))
    assert spike_of(3.51, [3.0, 3.1, 2.9, 3.0, 300.0], RULE)
    assert spike_of(3.51, recent[1:], RULE) is None  # too early to tell
    assert spike_of(1e9, recent, RollbackConfig(None, 5, 1, 1)) is None


@pytest.mark.parametrize(("position", "start"), [(0, 0), (8, 8), (12, 24), (16, 24), (20, 24), (24, 24), (37, 50)])
def test_a_batch_touches_nothing_that_is_left_out(position: int, start: int):
    assert beyond(position, 8, [[40, 50], [16, 24]]) == start


def test_a_run_goes_back_to_before_what_it_leaves_out_and_forgets_what_came_after(tmp_path: Path):
    for step in (2, 4, 6):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        progress = Progress(step, position=8 * step)
        (folder / META).write_text(CheckpointMeta(step, progress, DataState("", None), {}, "", "", {}, 1).to_json())
        (folder / MARKER).write_text(json.dumps(checksums([folder / META])))
    assert checkpoint_before(tmp_path, 15) is None
    assert checkpoint_before(tmp_path, 16) == tmp_path / "step-00000002"
    found = checkpoint_before(tmp_path, 47)
    assert found == tmp_path / "step-00000004" == take_back(tmp_path, found)
    assert [path.name for path in tmp_path.iterdir() if path.name > found.name] == []
