"""Next-token cross-entropy, summed: whoever sums over processes and micro-batches divides once, by all tokens.

With a vocabulary of 32,000 the logits are the largest tensor of a small model. Here they never exist as a whole: the
head takes some tokens at a time from logits to losses and gradients, within its forward pass, when every engine has
its weight gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lrtrain.errors import ConfigError

CHUNK = 1024
"""Tokens whose logits exist at a time. Fewer make the products slower, and add up the weight's gradient more often."""


def next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Sum of the cross-entropies (nats) of each row's tokens 1..seq_len given those before.

    Args:
        model: a causal language model of transformers.
        rows: token ids (sequences, seq_len + 1), int64.
    """
    return _loss_and_output(model, rows)[0]


def training_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """What is trained, as transformers adds it up: `next_token_loss`, and with it a mixture of experts' auxiliary loss
    where the model's config asks for it (`output_router_logits`), times its coefficient.

    An auxiliary loss is one number for all tokens of a forward pass. Times their number it averages over micro-batches
    and processes as the token losses do.

    Returns:
        The sum that is trained (1,), or with an auxiliary loss also the token losses' share of it and the auxiliary
        loss times the number of tokens (3,).
    """
    loss, output = _loss_and_output(model, rows)
    if getattr(output, "aux_loss", None) is None:
        return loss[None]
    auxiliary = rows[:, 1:].numel() * output.aux_loss
    return torch.stack([loss + _auxiliary_coefficient(model) * auxiliary, loss, auxiliary])


def _loss_and_output(model: nn.Module, rows: Tensor) -> tuple[Tensor, Any]:
    """The sum of the cross-entropies, and the model's output."""
    if ends_with_head(model, rows):
        output, _ = _losses_of_head(model, rows)
        return output.logits.view(()), output
    output = _output(model, rows)  # logits (sequences, seq_len, vocabulary)
    return F.cross_entropy(output.logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum"), output


def _output(model: nn.Module, rows: Tensor) -> Any:
    return model(input_ids=rows[:, :-1], use_cache=False)


def _auxiliary_coefficient(model: Any) -> float:
    """By which transformers multiplies the auxiliary loss.

    Raises:
        ConfigError: if the model keeps it under none of the known names.
    """
    for owner in (model, model.config.get_text_config()):
        for key in ("router_aux_loss_coef", "aux_loss_coef"):
            if (found := getattr(owner, key, None)) is not None:
                return found
    raise ConfigError(
        f"model.config.output_router_logits=true asks for the auxiliary loss of model_type={model.config.model_type}, "
        "which has no router_aux_loss_coef; set it to false"
    )


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


# --- the head that gives losses ----------------------------------------------------------------------------------


_verdicts: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def ends_with_head(model: nn.Module, rows: Tensor) -> bool:
    """Whether the model's logits are what its head puts out, and not that scaled or capped; seen once, on one token."""
    if _head(model) is None:
        return False
    if model not in _verdicts:
        # As a run without this look: same random numbers, no graph compiled for a length of one.
        devices = [rows.device] if rows.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output, made = _losses_of_head(model, rows[:1, :2])
        found = output.logits
        _verdicts[model] = found is made and found._version == 0  # not changed in place either
    return _verdicts[model]


def _losses_of_head(model: nn.Module, rows: Tensor) -> tuple[Any, Tensor]:
    """What the model returns if its head gives the sum of losses, and that sum as the head gave it, (1, 1, 1): a model
    may expect three dimensions."""
    made: list[Tensor] = []
    head = _head(model)
    assert head is not None

    def give(compute: Any, hidden: Tensor) -> Tensor:
        made.append(head_loss(head, compute, hidden.flatten(0, -2), rows[:, 1:].flatten()))
        return made[0]

    with replaced_forward(head, give):
        output = _output(model, rows)
    return output, made[0]


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Meanwhile the module computes `forward(<its own forward>, …)`; hooks on it, such as an engine's, stay."""
    own = vars(module).get("forward")
    module.forward = partial(forward, module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


# --- the chunks --------------------------------------------------------------------------------------------------


def head_loss(head: nn.Module, compute: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of `compute(hidden)` to `targets`, `CHUNK` tokens at a time; (1, 1, 1).

    Args:
        head: whose parameters `compute` uses.
        compute: hidden states (tokens, d) → logits (tokens, vocabulary).
        hidden: (tokens, d).
        targets: (tokens,), int64.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    return cast(Tensor, _HeadLoss.apply(compute, targets, torch.is_grad_enabled(), hidden, *parameters))


class _HeadLoss(torch.autograd.Function):
    """The gradients are computed with the losses and wait for the backward pass, which scales them in place: it can run
    once. Softmax and all sums are in float32 at least."""

    @staticmethod
    def forward(ctx, compute, targets, train, hidden, *parameters):
        total = hidden.new_zeros(1, 1, 1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradients: list[Tensor] = []
        d_hidden = torch.empty_like(hidden)
        chunks = -(-len(hidden) // CHUNK)
        for x, target, dx in zip(*(t.tensor_split(chunks) for t in (hidden, targets, d_hidden)), strict=True):
            with torch.set_grad_enabled(train):
                x = x.detach().requires_grad_(train)
                logits = compute(x)
            loss, d_logits = _cross_entropy(logits.detach(), target, train)
            total = total + loss  # its version stays 0: see `ends_with_head`
            if train:
                first, *more = torch.autograd.grad(logits, (x, *parameters), d_logits)
                dx.copy_(first)
                gradients = _added(gradients, more, total.dtype)
        if train:
            ctx.gradients = [d_hidden, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.gradients
        del ctx.gradients  # so that autograd takes them over instead of copying them
        return None, None, None, *(gradient.mul_(grad_outputs[0].view(())) for gradient in gradients)


def _added(sums: list[Tensor], new: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The sums with the new terms, in place where there are sums already."""
    return [a.add_(b) for a, b in zip(sums, new, strict=True)] if sums else [b.to(dtype) for b in new]


def _cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross-entropies of logits (tokens, vocabulary) to targets (tokens,), and its gradient, which takes the
    place of float32 logits."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at_target = targets[:, None]
    scores.sub_(scores.amax(1, keepdim=True))  # all in place: one tensor of this size
    of_target = scores.gather(1, at_target)
    total = scores.exp_().sum(1, keepdim=True)
    loss = (total.log() - of_target).sum()
    if not with_gradient:
        return loss, None
    softmax = scores.div_(total)
    softmax.scatter_add_(1, at_target, softmax.new_full((1, 1), -1.0).expand_as(at_target))
    return loss, softmax.to(logits.dtype)
