"""Profiling one step, and a snapshot of GPU memory when it runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROWS = 10
ALLOCATIONS = 100_000  # number of last allocations kept with their stacks, in host memory


@contextmanager
def profiled(folder: Path) -> Iterator[None]:
    """Profile the context and write to `folder`: trace.json.gz for chrome://tracing or Perfetto, and top.txt, the ten
    operators with the most self time."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as recorded:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(folder / "trace.json.gz"))
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    top = recorded.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
    (folder / "top.txt").write_text(top)


@contextmanager
def snapshot_when_out_of_memory(folder: Path) -> Iterator[None]:
    """On a GPU, if memory runs out in the context: write all allocations with their stacks to `folder`/memory.pickle,
    for pytorch.org/memory_viz."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
