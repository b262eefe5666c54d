"""FLOPs of a model."""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrtrain.core.cache import cache_folder, fingerprint, make_shared
from lrtrain.core.memo import read_memo, write_memo
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.architecture import new_model
from lrtrain.model.attention import CAUSAL, KNOWN
from lrtrain.model.experts import FACTORIZED, experts_per_token
from lrtrain.model.structure import factorized_layers

LONGEST = 512
"""Longest sequence run to count its FLOPs, in tokens; a multiple of the chunk lengths of models."""
UNUSED = re.compile(r"encoder_attn|crossattention|cross_attn")
"""Modules of a decoder that only process an encoder's output."""
NO_PRODUCT = re.compile(r"Linear|Lightning|Rwkv|Output|Cross")
"""Classes of attention that do not multiply every token with every other."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward and backward pass, per token."""

    model: float
    """FLOPs of the model, by each layer's own count."""
    dense_equivalent: float
    """FLOPs of the same architecture with dense linear layers."""


def training_flops(model: PreTrainedModel, seq_len: int) -> Flops:
    """FLOPs per token, forward and backward (three times the forward pass if all parameters are trained).

    torch's count for the dense model of the config, with the counts of factorized layers replaced by their own. It
    includes matrix products (attention over the whole context, not halved for causality; experts only for the tokens
    routed to them) and convolutions, but no vector operations such as norms and embedding lookups.
    """
    dense, calls = dense_flops(model, seq_len)
    own = dense
    for name, layer in factorized_layers(model).items():
        own += calls.get(name, 1) * (layer.training_flops(1) - 3 * layer.dense_flops(1))
    return Flops(model=float(own), dense_equivalent=float(dense))


def dense_flops(model: PreTrainedModel, seq_len: int) -> tuple[float, dict[str, int]]:
    """FLOPs per token of the dense model, forward and backward, and the number of calls per forward pass for factorized
    layers that are not called once.

    Architectures that do not run on meta, and those for which the formula is known to be right, are counted by
    `formula`. Counts are cached on disk.
    """
    config = model.config
    if type(config) in KNOWN:
        return formula(model, seq_len), {}
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    names = [*factorized_layers(model)]
    versions = (transformers.__version__, torch.__version__)
    key = fingerprint(kind, config.to_json_string(use_diff=False), names, min(seq_len, LONGEST + 1), versions)
    path = cache_folder() / "flops" / f"{key}.json"
    if not (found := read_memo(path)):
        found = {of: str(count) for of, count in _counted(config, names, seq_len).items()}
        with suppress(OSError):
            make_shared(path.parent)
            write_memo(path, found)
    calls = {name: int(n) for name, n in found.items() if name in names}
    if "per_token" not in found:
        return formula(model, seq_len), calls
    return 3 * (float(found["per_token"]) + seq_len * float(found["per_pair"])), calls


def _counted(config: PreTrainedConfig, names: list[str], seq_len: int) -> dict[str, float]:
    """torch's counts for a forward pass: `per_token`, `per_pair` of tokens, and the number of calls of the layers in
    `names`. Empty if the model does not run on meta."""
    for attention in (CAUSAL, "eager"):
        with suppress(Exception), torch.no_grad(), torch.device("meta"):  # whatever the model's code raises
            return _counted_on_meta(new_model(copy.deepcopy(config), attention).eval(), names, seq_len, attention)
    return {}


def _counted_on_meta(model: PreTrainedModel, names: list[str], seq_len: int, attention: str) -> dict[str, float]:
    """See `_counted`. A long sequence's FLOPs follow from shorter ones': a quadratic function of the length."""
    model.config._experts_implementation = FACTORIZED  # the one that runs on meta
    calls: Counter[str] = Counter()
    for name in names:
        _layer_or_owner(model, name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    lengths = [seq_len] if seq_len <= LONGEST else [LONGEST // 2, LONGEST]
    flops = [_forward_flops(model, n, attention) / n for n in lengths]
    slope = (flops[-1] - flops[0]) / (lengths[-1] - lengths[0]) if len(lengths) > 1 else 0.0
    found = {"per_token": flops[0] - slope * lengths[0], "per_pair": slope}
    return found | {name: n // len(lengths) for name, n in calls.items()}


def _forward_flops(model: PreTrainedModel, tokens: int, attention: str) -> int:
    """FLOPs of a forward pass of a model on meta.

    A ready mask is passed because transformers reads values to build one, which fails on meta.
    """
    ready: dict[str, Any] = {} if attention == CAUSAL else {"attention_mask": torch.zeros(1, 1, tokens, tokens)}
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False, **ready)
    return counter.get_total_flops()


def _layer_or_owner(model: nn.Module, name: str) -> nn.Module:
    """The layer of this name, or the module whose parameter it is."""
    with suppress(AttributeError):
        return model.get_submodule(name)
    return model.get_submodule(name.rpartition(".")[0])


def formula(model: PreTrainedModel, seq_len: int) -> float:
    """FLOPs per token of the dense model, forward and backward, if every module is called once, experts by the tokens
    routed to them, and attention has two products over the whole context."""
    chosen = experts_per_token(model.config.get_text_config())
    found = 3 * attention_flops(model, seq_len)
    for module in called_modules(model):
        if isinstance(module, FactorizedLinear):
            found += 3 * module.dense_flops(1)
        else:
            found += 6 * matrix_entries(module, chosen)
    return float(found)


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
