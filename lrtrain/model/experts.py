"""Experts in transformers' models: modules with weights (experts, out, in), or transposed, behind a router.

Factorized experts are computed through transformers' `ExpertsInterface`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.experts import FactorizedExperts, even_split
from lrtrain.model.architecture import computes_experts
from lrtrain.model.structure import factorized_layers, linears

FACTORIZED = "lrtrain_factorized"


class DenseExperts(nn.Module):
    """A view of one weight of a layer's experts, with the attributes of an nn.Linear.

    Args:
        weight: (experts, out, in), or with `transposed` (experts, in, out).
        per_token: number of experts that process a token.
    """

    bias = None

    def __init__(self, weight: nn.Parameter, transposed: bool, per_token: int):
        super().__init__()
        self.weight = weight
        self.transposed = transposed
        self.per_token = per_token
        self.batch = weight.shape[0]
        self.out_features, self.in_features = weight.shape[:0:-1] if transposed else weight.shape[1:]

    def factorized(self, one: FactorizedLinear) -> FactorizedExperts:
        """Factorized experts in place of this weight, as a batch of layers like `one`."""
        return FactorizedExperts(one, self.batch, self.per_token, self.transposed)


def dense_experts(model: Any, pattern: str) -> dict[str, DenseExperts]:
    """The experts' weights whose qualified name matches `pattern`, by name, in modules that use transformers'
    interface."""
    found: dict[str, DenseExperts] = {}
    for name, module in model.named_modules():
        if computes_experts(module):
            per_token = experts_per_token(module.config)
            for key, p in module.named_parameters(recurse=False):
                if p.ndim == 3 and re.search(pattern, f"{name}.{key}"):
                    found[f"{name}.{key}"] = DenseExperts(p, module.is_transposed, per_token)
    return found


def measured(model: nn.Module, pattern: str) -> Mapping[str, FactorizedLinear | nn.Linear | DenseExperts]:
    """The layers whose spectra are measured: `matrices`, and in a dense model the experts matching `pattern`."""
    layers = factorized_layers(model)
    return layers or {**linears(model, pattern, subclasses=True), **dense_experts(model, pattern)}


def experts_per_token(config: PreTrainedConfig) -> int:
    """The number of experts per token, from any of transformers' keys for it."""
    for key in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"):
        value = getattr(config, key, None)
        if value is not None:
            return value[0] if isinstance(value, list) else value
    return 1


def replace_experts(model: nn.Module, name: str, layer: FactorizedExperts) -> None:
    """Put factorized experts in place of the weight of this qualified name."""
    parent, _, key = name.rpartition(".")
    experts: Any = model.get_submodule(parent)
    del experts._parameters[key]
    experts.add_module(key, layer)
    experts.config._experts_implementation = FACTORIZED


def factorized_experts_forward(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """transformers' `grouped_mm_experts_forward` for experts with all, some or no weights factorized.

    Args:
        hidden: (tokens, d).
        chosen: the experts of each token (tokens, k).
        weights: and their weights (tokens, k).
    """
    tokens, k = chosen.shape
    expert, order = chosen.flatten().sort(stable=True)
    sizes = torch.zeros(experts.num_experts, dtype=torch.int64, device=expert.device)
    sizes = sizes.scatter_add(0, expert, torch.ones_like(expert))

    def projected(name: str, x: Tensor) -> Tensor:
        y = _projected(getattr(experts, name), x, sizes, experts.is_transposed)
        return y + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else y

    x = hidden[order // k]
    if experts.has_gate:
        y = experts._apply_gate(projected("gate_up_proj", x))
    else:
        y = experts.act_fn(projected("up_proj", x))
    y = projected("down_proj", y)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = y * weights.flatten()[order, None]
    in_place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y[in_place].view(tokens, k, -1).sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(FACTORIZED, factorized_experts_forward)


def _projected(weight: FactorizedExperts | Tensor, x: Tensor, sizes: Tensor, transposed: bool) -> Tensor:
    """x (tokens, in), sorted by expert, multiplied by each expert's weight."""
    if isinstance(weight, FactorizedExperts):
        return weight(x, sizes)
    lengths = even_split(len(x), len(weight)) if sizes.is_meta else sizes.tolist()
    parts = zip(weight.unbind(0), x.split(lengths), strict=True)
    return torch.cat([F.linear(part, w.T if transposed else w) for w, part in parts])
