"""Parameters and FLOPs of a model."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.experts import experts_per_token
from lrtrain.model.structure import factorized_layers

UNUSED = re.compile(r"encoder_attn|crossattention|cross_attn")
"""Modules of a decoder that only process an encoder's output."""
NO_PRODUCT = re.compile(r"Linear|Lightning|Rwkv|Output|Cross")
"""Classes of attention that do not multiply every token with every other."""


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


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward and backward pass, per token."""

    model: float
    """FLOPs of the model, by each layer's own count."""
    dense_equivalent: float
    """FLOPs of the same architecture with dense linear layers."""


def training_flops(model: PreTrainedModel, seq_len: int) -> Flops:
    """FLOPs per token, forward and backward (three times the forward pass if all parameters are trained).

    Every matrix multiplies each token once, experts only the tokens routed to them; attention has two
    products over the whole context (not halved for causality). Vector operations, such as a state-space scan, norms and
    embedding lookups, are not counted.
    """
    attention = 3 * attention_flops(model, seq_len)
    chosen = experts_per_token(model.config.get_text_config())
    own = dense = 0
    for module in called_modules(model):
        if isinstance(module, FactorizedLinear):
            own += module.training_flops(1)
            dense += 3 * module.dense_flops(1)
        else:
            matrices = 6 * matrix_entries(module, chosen)
            own, dense = own + matrices, dense + matrices
    return Flops(model=float(own + attention), dense_equivalent=float(dense + attention))


def called_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that run when a causal model processes text alone (no cross-attention), without those inside
    factorized layers."""
    inner = {id(child) for m in model.modules() if isinstance(m, FactorizedLinear) for child in m.children()}
    idle = {id(child) for name, m in model.named_modules() if UNUSED.search(name) for child in m.modules()}
    return (module for module in model.modules() if id(module) not in inner | idle)


def matrix_entries(module: nn.Module, chosen: int) -> int:
    """Entries of a module's own matrices that multiply a token: for experts (experts, out, in) those of its `chosen`
    experts, for a convolution over time the whole kernel."""
    if isinstance(module, nn.Embedding):
        return 0
    found = 0
    for p in module.parameters(recurse=False):
        routed = p.ndim == 3 and not isinstance(module, nn.Conv1d)
        share = min(chosen, len(p)) / len(p) if routed else 1
        found += round(share * p.numel()) if p.ndim > 1 else 0
    return found


def attention_flops(model: PreTrainedModel, seq_len: int) -> int:
    """FLOPs per token of the forward products of queries with keys and of attention weights with values (two per entry
    of heads · width), summed over the attention modules."""
    found = 0
    for module in called_modules(model):
        projects = any(hasattr(child, "in_features") or isinstance(child, Conv1D) for child in module.children())
        kind = type(module).__name__
        if projects and "Attention" in kind and not NO_PRODUCT.search(kind):
            found += 2 * seq_len * sum(product_widths(module, model.config.get_text_config()))
    return found


def product_widths(module: nn.Module, config: PreTrainedConfig) -> tuple[int, int]:
    """The widths of a token's queries and of its values, over all heads."""
    own = [getattr(module, name, None) for name in ("num_heads", "num_attention_heads", "n_heads", "n_head")]
    heads = next((n for n in own if isinstance(n, int)), None) or config.num_attention_heads
    width = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    query, value = getattr(module, "qk_head_dim", None) or width, getattr(module, "v_head_dim", None) or width
    return heads * query, heads * value


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
