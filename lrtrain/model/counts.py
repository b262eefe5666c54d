"""Parameters of a model."""

import math

from torch import nn

from lrtrain.model.structure import factorized_layers


def factorization_table(model: nn.Module) -> list[tuple[str, int, str, int]]:
    """The factorized layers: rows (projection, layers, "out×in, rank", parameters), one per kind of layer."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, layer in factorized_layers(model).items():
        experts = f"{layer.batch} × " if layer.batch > 1 else ""
        shape = f"{experts}{layer.out_features}×{layer.in_features}, rank {layer.rank}"
        rows.setdefault((name.rsplit(".", 1)[-1], shape), []).append(parameter_count(layer))
    return [(kind, len(sizes), shape, sum(sizes)) for (kind, shape), sizes in rows.items()]


def above_break_even(model: nn.Module) -> list[str]:
    """Names of layers that train at least as many parameters as the dense layer that they replace."""
    return [
        name
        for name, layer in factorized_layers(model).items()
        if trainable_count(layer) >= layer.batch * layer.in_features * layer.out_features
    ]


def unaligned(model: nn.Module) -> list[int]:
    """Sides and ranks of the matrices, without embeddings, that are no multiples of 8: tensor cores compute bf16
    products with them more slowly."""
    tables = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    sides = {side for p in model.parameters() if p.ndim > 1 and p not in tables for side in p.shape[-2:]}
    return sorted(side for side in sides if side % 8)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, unsharded, including frozen ones, tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())


def trainable_count(model: nn.Module) -> int:
    """Number of trained parameters, unsharded, tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad)


def dense_parameter_count(model: nn.Module) -> int:
    """Number of parameters of the same architecture with dense linear layers (out·in and the same biases)."""
    saved = 0
    for layer in factorized_layers(model).values():
        own = sum(p.numel() for name, p in layer.named_parameters() if layer.roles[name] != "bias")
        saved += layer.batch * layer.in_features * layer.out_features - own
    return parameter_count(model) + saved
