"""What becomes of freed memory on a CPU."""

from pathlib import Path

import psutil
import pytest
import torch
from crew import together

from lrtrain import distributed

MIB = 2**20


def freed(save_memory: bool, folder: Path) -> None:
    """Write how many MiB of 96 that were allocated by 12s and freed this process has given back."""
    distributed.start(save_memory=save_memory)
    process = psutil.Process()
    held = [torch.ones(3 * MIB) for _ in range(8)]
    before = process.memory_info().rss
    held.clear()
    (folder / "given_back").write_text(str((before - process.memory_info().rss) / MIB))
    distributed.stop()


@pytest.mark.parametrize("save_memory", [True, False])
def test_freed_memory_is_given_back_if_memory_is_to_be_saved_and_else_kept(save_memory: bool, tmp_path: Path):
    together(freed, (save_memory, tmp_path), tmp_path, size=1)
    given_back = float((tmp_path / "given_back").read_text())
    assert given_back > 80 if save_memory else given_back < 10
