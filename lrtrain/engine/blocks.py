"""What is done to the blocks of a model whichever engine runs it: compiled, recomputed in the backward pass."""

from collections.abc import Callable
from functools import partial
from inspect import getsource
from typing import Any

import torch
import torch._functorch.config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lrtrain.model.structure import blocks, factorized_layers

GRAPHS_PER_BLOCK = 16


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile each block by itself."""
    # All blocks share one function: each may need graphs of its own, for its ranks and in its modes.
    torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK * len(blocks(model))
    torch._dynamo.config.accumulated_recompile_limit = 4 * torch._dynamo.config.recompile_limit
    # Graphs with backward passes written by hand are kept on disk too: their key holds both passes.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    for block in blocks(model):
        block.forward = torch.compile(block.forward)  # not its hooks, which gather what the engine spreads


def recompute(model: PreTrainedModel, every: int, keep: str) -> int:
    """Run every `every`-th block again in the backward pass (0: none) and keep only the block's inputs (`inputs`) or
    also the products A x of its factorized layers (`bottleneck`), which then are not computed a second time.

    Returns:
        How many blocks that are.
    """
    contexts = {"context_fn": keeping_latents(model)} if keep == "bottleneck" else {}
    again = list(blocks(model))[::every] if every else []
    for block in again:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
    return len(again)


def keeping_latents(model: PreTrainedModel) -> Callable[[], Any]:
    """Contexts of a checkpoint that keep the products of activations and a transposed A (in, rank), told by its
    shape."""
    shapes = sorted({(layer.in_features, layer.rank) for layer in factorized_layers(model).values()})
    contexts = partial(create_selective_checkpoint_contexts, partial(latents_only, shapes))
    # With it compiled graphs are kept on disk, and only taken for this policy.
    contexts.cache_hash = f"{getsource(latents_only)} {shapes}"  # pyright: ignore[reportAttributeAccessIssue]
    return contexts


def latents_only(shapes: list[tuple[int, int]], ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy that keeps products with matrices of these shapes."""
    latent = operator == torch.ops.aten.mm.default and tuple(args[1].shape) in shapes
    return CheckpointPolicy.MUST_SAVE if latent else CheckpointPolicy.PREFER_RECOMPUTE
