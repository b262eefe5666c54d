"""What is done to the blocks of a model whichever engine runs it: compiled, recomputed in the backward pass."""

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
    """Give blocks a forward function that is compiled, or runs again in the backward pass, or both.

    Args:
        every: recompute every `every`-th block (0: none) in the backward pass,
        keep: and keep for that only the block's inputs (`inputs`), or also the products A x of its factorized layers
            (`bottleneck`), which then are not computed a second time.
        compile: compile each block by itself.

    Returns:
        How many blocks are recomputed.
    """
    contexts = {"context_fn": keeping_latents(model)} if keep == "bottleneck" else {}
    again = list(blocks(model))[::every] if every else []
    if compile:
        _configure_compiler(len(blocks(model)))
    for block in again if not compile else blocks(model):
        forward = block.forward  # without the module's hooks, which gather what the engine shards
        if block in again:
            forward = partial(checkpoint, forward, use_reentrant=False, **contexts)
        block.forward = torch.compile(forward) if compile else forward
    return len(again)


def _configure_compiler(number: int) -> None:
    # All blocks share one function: each may need graphs of its own, for its ranks and in its modes.
    torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK * number
    torch._dynamo.config.accumulated_recompile_limit = 4 * torch._dynamo.config.recompile_limit
    # Graphs with backward passes written by hand are kept on disk too: their key holds both passes.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True


def keeping_latents(model: PreTrainedModel) -> Callable[[], Any]:
    """Contexts of a checkpoint that keep the products of activations and a transposed A (in, rank), told by its
    shape."""
    shapes = sorted({(layer.in_features, layer.rank) for layer in factorized_layers(model).values()})
    contexts = partial(create_selective_checkpoint_contexts, partial(latents_only, shapes))
    # With a hash compiled graphs are cached on disk; change it when the policy changes.
    contexts.cache_hash = f"lrtrain latents 1 {shapes}"  # pyright: ignore[reportAttributeAccessIssue]
    return contexts


def latents_only(shapes: list[tuple[int, int]], ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy that keeps products with matrices of these shapes."""
    latent = operator == torch.ops.aten.mm.default and tuple(args[1].shape) in shapes
    return CheckpointPolicy.MUST_SAVE if latent else CheckpointPolicy.PREFER_RECOMPUTE
