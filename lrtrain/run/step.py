"""One optimizer step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lrtrain.core.seeds import generator_for, integer_seed
from lrtrain.run.batches import Said

if TYPE_CHECKING:
    from lrtrain.run.state import Run


@dataclass(frozen=True)
class StepLog:
    """The log of one step."""

    loss: float
    """The loss that is trained: mean per target token over all processes (nats), including an auxiliary loss."""
    cross_entropy: float
    aux_loss: float | None
    """The auxiliary loss of a mixture of experts, if its config enables it."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float
    skipped: bool
    """Whether the step was skipped because loss or gradient was not finite."""
    tokens: int
    """Target tokens of the batch, over all processes."""
    seconds: float
    """Time of the step on this process, including the wait for a batch, without callbacks."""
    waited: float
    """Part of `seconds` that the processes waited for the batch of any of them."""


def take_step(run: Run, rows: torch.Tensor, waited: float) -> StepLog:
    """Take one optimizer step and advance `run.progress`. A collective.

    Args:
        rows: this process's token ids of the global batch (sequences, seq_len + 1).
        waited: seconds that the processes waited for the batch.
    """
    config, progress, engine = run.config, run.progress, run.engine
    started = time.perf_counter()
    tokens = config.train.batch_size * config.data.seq_len
    lr = config.optim["lr"] * run.schedule(progress.step, config.train.steps)
    seed_step(run)
    engine.begin_step(progress.step, lr, config.train.clip, config.train.clip_by)
    micros = rows.split(config.train.micro_batch_size)
    losses = [engine.forward_backward(micro, tokens, micro is micros[-1]) for micro in micros]
    share = (torch.stack(losses).double().sum(0) / tokens).reshape(-1)
    aside = run.each(lambda callback: callback.after_backward(run))
    result = engine.clip_and_step(torch.cat([share, run.batches.say().on(share.device)]))
    loss, *parts = result.sums[: len(share)]
    run.batches.agreed = Said(*result.sums[len(share) :])

    progress.step += 1
    progress.position = run.batches.first() + config.train.batch_size
    engine.revise(progress.step)
    run.resize_layers()
    seconds = time.perf_counter() - started - aside + waited
    progress.seconds += seconds
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0
    progress.skipped += result.skipped
    progress.tokens += 0 if result.skipped else tokens
    cross_entropy, aux_loss = parts or (loss, None)
    return StepLog(loss, cross_entropy, aux_loss, result.grad_norm, lr, result.skipped, tokens, seconds, waited)


def seed_step(run: Run) -> None:
    """Seed a step's random numbers from (seed, step), so that no generator state has to be saved.

    Dropout differs between processes; the layers' draws are the same on all.
    """
    seed, step = run.config.train.seed, run.progress.step
    torch.manual_seed(integer_seed(seed, f"step {step} process {run.world.dist_rank}"))
    for layer in run.layers.values():
        layer.draw(generator_for(seed, f"draw of step {step}"))
