"""Parameters and FLOPs of a model."""

import math
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.structure import factorized_layers


def ledger(model: nn.Module) -> list[tuple[str, int, str, int]]:
    """What was replaced: rows (projection, layers, "out×in, rank", parameters), one per kind of layer."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, layer in factorized_layers(model).items():
        experts = f"{layer.batch} × " if layer.batch > 1 else ""
        shape = f"{experts}{layer.out_features}×{layer.in_features}, rank {layer.rank}"
        rows.setdefault((name.rsplit(".", 1)[-1], shape), []).append(parameter_count(layer))
    return [(kind, len(sizes), shape, sum(sizes)) for (kind, shape), sizes in rows.items()]


def above_break_even(model: nn.Module) -> list[str]:
    """Layers that train at least as many parameters as the dense layer that they replace."""
    return [
        name
        for name, layer in factorized_layers(model).items()
        if trainable_count(layer) >= layer.batch * layer.in_features * layer.out_features
    ]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward and backward pass, per token."""

    model: float
    """What the parameterization needs: each layer's own count."""
    dense_equivalent: float
    """What the same architecture with dense linears needs."""


def training_flops(model: PreTrainedModel, seq_len: int) -> Flops:
    """FLOPs per token: linears as they are, plus attention's two products over the whole context (2·2·d·seq_len a
    layer, not halved for causality), forward and backward (three times the forward where all is trained)."""
    config = model.config.get_text_config()
    attention = 4 * config.num_hidden_layers * seq_len * config.hidden_size
    inner = {id(child) for m in model.modules() if isinstance(m, FactorizedLinear) for child in m.modules()}
    own = dense = 0
    for module in model.modules():
        if isinstance(module, FactorizedLinear):
            own += module.training_flops(1)
            dense += 3 * module.dense_flops(1)
        elif isinstance(module, nn.Linear) and id(module) not in inner:
            own += 6 * module.in_features * module.out_features
            dense += 6 * module.in_features * module.out_features
    return Flops(model=float(own + 3 * attention), dense_equivalent=float(dense + 3 * attention))


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, frozen ones too, unsharded, tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())


def trainable_count(model: nn.Module) -> int:
    """Number of parameters that are trained, unsharded, tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad)


def dense_parameter_count(model: nn.Module) -> int:
    """Parameters of the same architecture with dense linears (out·in and the same biases)."""
    saved = 0
    for layer in factorized_layers(model).values():
        own = sum(p.numel() for name, p in layer.named_parameters() if layer.roles[name] != "bias")
        saved += layer.batch * layer.in_features * layer.out_features - own
    return parameter_count(model) + saved
