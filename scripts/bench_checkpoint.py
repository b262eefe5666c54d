"""Time of checkpoints: how long training is blocked, how long until the checkpoint is on disk, and how long resuming
takes, compared with plain writing and reading of as many bytes; and the time of a step with and without a save.

    python scripts/bench_checkpoint.py model=llama_1b param=sltrain train.micro_batch_size=1
    torchrun --nproc_per_node=2 scripts/bench_checkpoint.py --folder /scratch model=llama_350m
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain import distributed
from lrtrain.checkpoint.checkpointer import Checkpointer, damage_of, whole_checkpoints
from lrtrain.checkpoint.meta import CheckpointMeta, DataState, Progress
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.config.dtypes import compute_dtype
from lrtrain.config.schema import Config
from lrtrain.core.streams import never_fail_to_print
from lrtrain.distributed.collectives import broadcast_from_rank0, run_on_rank0
from lrtrain.distributed.sharding import local
from lrtrain.distributed.world import World
from lrtrain.engine.base import Engine
from lrtrain.model.build import make_model

BLOCK = 2**24  # bytes
STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("bench_checkpoint"), help="temporary folder; must not exist"
    )
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration")
    args = parser.parse_args()
    world = distributed.start()
    if args.folder.exists():
        sys.exit(f"--folder {args.folder} exists; choose another folder")
    try:
        measure(args.overrides, args.folder, world)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
        distributed.stop()


def measure(overrides: list[str], folder: Path, world: World) -> None:
    config = compose(*overrides)
    dtype = compute_dtype(config, world.device)
    engine = choice(config.engine)(world=world, dtype=dtype, compile=False, recompute_every=0, recompute_keep="inputs")
    engine.prepare(make_model(config), 0, choice(config.optim))
    step = a_step(engine, config)
    step()  # creates the optimizer state
    state = engine.state_dict()
    size = sum(local(t).nbytes for part in state.values() for t in part.values()) * world.size
    data = DataState(fingerprint="", state=None)
    meta = CheckpointMeta(0, Progress(), data, {}, support_hash="", executed="", versions={}, world_size=world.size)
    checkpointer = Checkpointer(folder, world, keep=1, keep_every=None, asynchronous=True)

    def whole() -> Path:
        return whole_checkpoints(folder)[-1]

    def show(what: str, seconds: float) -> None:
        if world.main:
            print(f"{what:44} {seconds:7.2f} s  {size / seconds / 1e9:6.2f} GB/s", flush=True)

    for number, which in enumerate(("first", "second")):
        show(f"{which} save: the loop stands still", timed(partial(checkpointer.save, state, number, meta)))
        show("  then until it is on the disk", timed(checkpointer.wait))
    alone = [timed(step) for _ in range(STEPS)]
    checkpointer.save(state, 2, meta)
    beside = []
    while not broadcast_from_rank0((folder / "step-00000002").exists()):
        beside.append(timed(step))
    checkpointer.wait()
    if world.main:
        at_rest, writing = statistics.median(alone), statistics.mean(beside)
        print(f"{'a step':44} {at_rest:7.2f} s")
        print(f"{'  while a checkpoint is written':44} {writing:7.2f} s  {len(beside)} of them", flush=True)
    run_on_rank0(lambda: forget(folder))
    show("resume: checksums, from the disk", timed(lambda: run_on_rank0(lambda: damage_of(whole()))))
    show("  then filling model and optimizer", timed(lambda: checkpointer.load(state, whole())))
    if world.main:
        file = folder / "plain"
        show("plain write and fsync", timed(lambda: write(file, size)))
        forget(folder)
        show("plain read", timed(lambda: read(file)))


def a_step(engine: Engine, config: Config) -> Callable[[], None]:
    """An optimizer step on one micro-batch of random tokens on each process."""
    rows = torch.randint(config.model.vocab_size, (config.train.micro_batch_size, config.data.seq_len + 1))
    tokens = rows[:, 1:].numel() * engine.world.size

    def step() -> None:
        engine.begin_step(0, 1e-4, None, "global")
        engine.clip_and_step(engine.forward_backward(rows, tokens).item())

    return step


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def write(path: Path, size: int) -> None:
    block = torch.randint(256, (BLOCK,), dtype=torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        for _ in range(-(-size // BLOCK)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that they are read from the disk."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        print("reading is timed from the page cache, which this system cannot drop", file=sys.stderr)
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    never_fail_to_print()
    main()
