"""Tensor parallelism that moves only latents: the recipe for LLaMA's blocks.

A group of processes shares its sequences. Between the linear layers of a block each process has a part of the tokens,
so norms and residuals are local. For q, k, v and gate, up it computes the latents A x of its tokens; these are
gathered, and B, cut along its rows, gives its heads (or part of the intermediate width) for all tokens. For o and
down, A is cut along its columns; the partial latents are summed and scattered over the tokens, and B is applied to a
process's own. A of q, k, v, gate, up and B of o, down are whole in use. Per block and pass latents of 7 ranks travel
for each token (BOOST, arXiv 2512.12131, has the idea of moving latents).

A dense layer is the case A = 1 for q, k, v, gate, up and B = 1 for o, down, which is Megatron's tensor parallelism with
sequence parallelism (Korthikanti et al., arXiv 2205.05198): 4 widths for each token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lrtrain.distributed.tokens import TokenGroup
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.loss import TokenLoss
from lrtrain.model.structure import blocks

Linear = FactorizedLinear | nn.Linear

PARTS = {
    "self_attn": (("q_proj", "k_proj", "v_proj"), "o_proj"),
    "mlp": (("gate_proj", "up_proj"), "down_proj"),
}
"""Part of a block → (its layers that read the residual stream, the one that writes to it)."""


def parts_of(block: nn.Module) -> Iterator[tuple[list[Any], Any]]:
    """(the layers that read the residual stream, the one that writes to it) for each part of a block."""
    for name, (readers, writer) in PARTS.items():
        part = block.get_submodule(name)
        yield [part.get_submodule(reader) for reader in readers], part.get_submodule(writer)


def cut_dimensions(block: nn.Module) -> Iterator[tuple[Linear, str, int]]:
    """(layer, name of its parameter, dimension) for the parameters of a block that are cut."""
    for readers, writer in parts_of(block):
        for layer in readers:
            yield from ((layer, name, 0) for name, _ in layer.named_parameters() if not _is_right(layer, name))
        yield from ((writer, name, 1) for name, _ in writer.named_parameters() if _is_right(writer, name))
        if isinstance(writer, nn.Linear):
            yield writer, "weight", 1


def latent_width(block: nn.Module) -> int:
    """The number of values that travel for each token in a block's forward pass."""
    width = 0
    for readers, writer in parts_of(block):
        x = torch.empty(1, readers[0].in_features, dtype=next(writer.parameters()).dtype, device="meta")
        distinct = {id(z): z for z in [latents(reader, x) for reader in readers]}
        width += sum(z.shape[-1] for z in distinct.values())
        inner = torch.empty(1, writer.in_features, dtype=x.dtype, device="meta")
        width += latents(writer, inner).shape[-1] if isinstance(writer, FactorizedLinear) else writer.out_features
    return width


def _is_right(layer: Linear, name: str) -> bool:
    return isinstance(layer, FactorizedLinear) and layer.roles[name] == "factor_right"


def cut_parameters(model: PreTrainedModel, parts: int, made: Callable[[Tensor, int], Tensor]) -> None:
    """Cut the parameters of a model on meta into equal parts, as many as processes; `made(part, dimension)` replaces
    each."""
    for block in blocks(model):
        for layer, name, dim in [*cut_dimensions(block)]:
            p = layer.get_parameter(name)
            part = made(p.detach().chunk(parts, dim)[0].contiguous(), dim)
            owner, _, key = name.rpartition(".")
            layer.get_submodule(owner).register_parameter(key, nn.Parameter(part, p.requires_grad))


def split_computation(loss: TokenLoss, tokens: TokenGroup) -> None:
    """Split a model's forward pass over a group, whose processes call `loss` with as many rows each in training.

    In training `loss` is of this process's part of the tokens; in eval mode of its own rows.
    """
    batch = _Batch(loss, tokens)
    assert loss.head is not None
    loss.register_forward_pre_hook(batch.gather_rows)
    loss.model.base_model.register_forward_pre_hook(batch.cut_tokens, with_kwargs=True)
    loss.head.register_forward_pre_hook(batch.match_targets)
    for block in blocks(loss.model):
        for name, layers in PARTS.items():
            part = block.get_submodule(name)
            part.forward = _SplitPart(part, layers, tokens)


class _Batch:
    """The rows of a forward pass: the group's instead of the process's, and their tokens cut."""

    def __init__(self, loss: TokenLoss, tokens: TokenGroup):
        self.loss = loss
        self.tokens = tokens

    def gather_rows(self, module: nn.Module, args: tuple[Tensor]) -> Tensor:
        (rows,) = args
        self.own, self.length = len(rows), rows.shape[1] - 1
        if not module.training:  # the last batch may be uneven: the first row fills it
            missing = self.tokens.most(len(rows), rows.device) - len(rows)
            rows = rows[[*range(len(rows)), *[0] * missing]]
        return self.tokens.gather_rows(rows)

    def cut_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids: Tensor = kwargs["input_ids"]
        positions = torch.arange(self.length, device=ids.device)[None]  # attention sees all tokens
        return args, kwargs | {"input_ids": self.tokens.cut(ids), "position_ids": positions}

    def match_targets(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, targets = args[0], args[1].view(-1, self.length)
        if self.loss.training:
            return hidden, self.tokens.cut(targets).flatten()
        whole = self.tokens.own_rows(hidden.unflatten(0, (len(targets), -1)))
        mine = self.tokens.cut(targets, 0)
        return whole[: self.own].flatten(0, 1), mine[: self.own].flatten()


def latents(reader: Linear, x: Tensor) -> Tensor:
    """What travels for a layer that reads the residual stream x (..., width): (..., k)."""
    return reader.latents(x) if isinstance(reader, FactorizedLinear) else x


class _SplitPart:
    """A part's forward function: its layers get the latents of all of them for all tokens instead of hidden states."""

    def __init__(self, part: nn.Module, names: tuple[Sequence[str], str], tokens: TokenGroup):
        self.part = part
        self.forward = part.forward
        self.tokens = tokens
        readers, writer = names
        self.readers = {name: _Reader(part.get_submodule(name), tokens) for name in readers}
        self.stand_ins = {**self.readers, writer: _Writer(part.get_submodule(writer), tokens)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = self._latents(args[0]), *args[1:]
        else:
            kwargs["hidden_states"] = self._latents(kwargs["hidden_states"])
        own = {name: self.part._modules[name] for name in self.stand_ins}
        try:
            self.part._modules.update(self.stand_ins)
            return self.forward(*args, **kwargs)
        finally:
            self.part._modules.update(own)

    def _latents(self, x: Tensor) -> Tensor:
        """Gathered latents (rows, tokens, k of all readers) for x (rows, part of the tokens, width)."""
        width, found, columns = 0, [], {}
        for reader in self.readers.values():
            z = latents(reader.layer, x)
            if id(z) not in columns:  # x itself only once
                columns[id(z)] = slice(width, width := width + z.shape[-1])
                found.append(z)
            reader.columns = columns[id(z)]
        return self.tokens.gather(torch.cat(found, dim=-1))


class _Reader(nn.Module):
    """In place of a layer that reads the residual stream: gathered latents → this process's output features."""

    columns: slice
    """Of the layer's latents among those of all layers."""

    def __init__(self, layer: Any, tokens: TokenGroup):
        super().__init__()
        self.layer = layer
        self.tokens = tokens

    def forward(self, gathered: Tensor) -> Tensor:
        layer, z = self.layer, gathered[..., self.columns]
        with local_parameters(layer):
            if isinstance(layer, FactorizedLinear):
                return layer.expand(z, self.tokens.index * layer.out_features // self.tokens.size)
            return F.linear(z, layer.weight, layer.bias)


class _Writer(nn.Module):
    """In place of the layer that writes to the residual stream: this process's input features → all output features of
    its tokens."""

    def __init__(self, layer: Any, tokens: TokenGroup):
        super().__init__()
        self.layer = layer
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        layer, tokens = self.layer, self.tokens
        with local_parameters(layer):
            if isinstance(layer, FactorizedLinear):
                return layer.expand(tokens.sum(layer.latents(x, tokens.index * layer.in_features // tokens.size)))
            y = tokens.sum(F.linear(x, layer.weight))
        return y if layer.bias is None else y + layer.bias


@contextmanager
def local_parameters(layer: nn.Module) -> Iterator[None]:
    """Within it the layer's parameters that are DTensors are this process's parts."""
    cut = [(m, name, p) for m in layer.modules() for name, p in m._parameters.items() if isinstance(p, DTensor)]
    try:
        for module, name, p in cut:
            module._parameters[name] = p.to_local()  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for module, name, p in cut:
            module._parameters[name] = p
