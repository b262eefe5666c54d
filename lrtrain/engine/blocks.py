"""Compilation and recomputation of a model's blocks, for all engines."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lrtrain.model.structure import blocks, factorized_layers

GRAPHS_PER_BLOCK = 16


def prepare_blocks(model: PreTrainedModel, every: int, keep: str, compile: bool = False) -> int:
    """Give blocks a forward function that is compiled, recomputed in the backward pass, or both.

    Args:
        every: recompute every `every`-th block (0: none).
        keep: activations that recomputed blocks keep: `inputs`, or `bottleneck` (also the products A x of factorized
            layers, which are then not recomputed).
        compile: compile each block separately.

    Returns:
        The number of recomputed blocks.
    """
    contexts = {"context_fn": keeping_latents(model)} if keep == "bottleneck" else {}
    again = list(blocks(model))[::every] if every else []
    if compile:
        _configure_compiler(len(blocks(model)))
    for block in again if not compile else blocks(model):
        forward = block.forward  # without the module's hooks, by which the engine gathers parameters
        if block in again:
            forward = partial(checkpoint, forward, use_reentrant=False, **contexts)
        block.forward = torch.compile(forward) if compile else forward
    return len(again)


def _configure_compiler(number: int) -> None:
    # All blocks share one function, so the limit has to allow graphs for each block's ranks and modes.
    torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK * number
    torch._dynamo.config.accumulated_recompile_limit = 4 * torch._dynamo.config.recompile_limit
    # Graphs with hand-written backward passes can be cached on disk: their key covers both passes.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True


def keeping_latents(model: PreTrainedModel) -> Callable[[], Any]:
    """A context function for activation checkpointing that keeps products with a transposed A, recognized by its shape
    (in, rank)."""
    shapes = sorted({(layer.in_features, layer.rank) for layer in factorized_layers(model).values()})
    contexts = partial(create_selective_checkpoint_contexts, partial(latents_only, shapes))
    # With a hash compiled graphs are cached on disk; change it when the policy changes.
    contexts.cache_hash = f"lrtrain latents 1 {shapes}"  # pyright: ignore[reportAttributeAccessIssue]
    return contexts


def latents_only(shapes: list[tuple[int, int]], ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The checkpoint policy that keeps products with matrices of these shapes."""
    latent = operator == torch.ops.aten.mm.default and tuple(args[1].shape) in shapes
    return CheckpointPolicy.MUST_SAVE if latent else CheckpointPolicy.PREFER_RECOMPUTE
