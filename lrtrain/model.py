"""From a model config to a factorized model on the meta device, and what it consists of.

`build_model` makes the transformers architecture and swaps the selected linears for factorized ones; the engine shards
it, and `lrtrain.initialize` fills it.
"""

import hashlib
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import hydra
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lrtrain.config import Config, choice, parameter_dtype
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear

RankRule = int | float | str | dict[str, int | float]

# Packed rows are attended causally from end to end. Under a name that transformers has no mask function for it builds
# no mask, and so does not look into the position ids either, which would stall a GPU in every forward pass.
CAUSAL = "lrtrain_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


# --- architecture ------------------------------------------------------------------------------------------------


def architecture(path: str | None, overrides: dict[str, Any], trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config: from `path` (a folder or hub name) or from `overrides` with its `model_type`.

    Code that comes with `path` is run only with `trust_remote_code`.

    Raises:
        ConfigError: if it cannot be had, or is not a causal language model's.
    """
    if path is None and "model_type" not in overrides:
        raise ConfigError(
            "model.path has no value; give a folder with a config.json or a name on the hub, or init_from"
        )
    try:
        if path is not None:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **overrides)
        else:
            config = AutoConfig.for_model(**overrides)
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = f"model.path={path}" if path is not None else f"model.config={overrides}"
        if "custom code" in str(error):
            raise ConfigError(f"{where} brings code of its own; model.trust_remote_code=true runs it") from error
        raise ConfigError(f"{where} is not a transformers model config: {str(error).splitlines()[0]}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping and not brings_code(config):
        raise ConfigError(f"model_type={config.model_type} has no causal language model in transformers")
    return config


def brings_code(config: PreTrainedConfig) -> bool:
    """Whether a config is of a class that came with it, whose code was trusted and run."""
    return type(config).__module__.startswith("transformers_modules.")


def make_model(
    config: Config, ranks: Mapping[str, int] | None = None, known: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model of the configuration, factorized as `param` says, on the meta device.

    Args:
        ranks: of layers that have others than `param.rank`.
        known: the transformers config as a checkpoint keeps it, so that what model.path names is not needed again,
            unless for its code.

    Raises:
        ConfigError: for what `build_model` refuses, and a parameter that the engine cannot hold.
    """
    model = config.model
    if known and not model.trust_remote_code:
        shape = architecture(None, known)
    else:
        shape = architecture(model.path, model.config, model.trust_remote_code)
    made = factorized_model(shape, config.param, ranks or {}, parameter_dtype(config))
    hydra.utils.get_object(config.engine["_target_"]).check_model(config, made)
    return made


def factorized_model(
    shape: PreTrainedConfig, param: dict[str, Any], ranks: Mapping[str, int], dtype: torch.dtype
) -> PreTrainedModel:
    """The model of a transformers config, factorized as `param` says, with parameters of `dtype` on the meta device."""
    make_layer = choice(param) if param["_target_"] else None
    model = build_model(shape, make_layer, param["pattern"], param["rank"], ranks)
    if zeros := param.get("zero_init"):
        found = [layer for name, layer in matrices(model, r"\.\d+\.").items() if re.search(zeros, name)]
        if not found:
            raise ConfigError(f"param.zero_init={zeros} matches none of the layers")
        for layer in found:
            layer.starts_at_zero = True  # pyright: ignore[reportArgumentType]  (`materialize` reads it)
    for p in model.parameters():  # not the buffers: rotary frequencies need float32
        p.data = p.data.to(dtype)
    return model


def build_model(
    config: PreTrainedConfig,
    make_layer: Callable[..., FactorizedLinear] | None,
    pattern: str | None,
    rank: RankRule | None,
    ranks: Mapping[str, int] = MappingProxyType({}),
) -> PreTrainedModel:
    """The causal language model of `config` on the meta device, with the linears that `pattern` finds factorized.

    Args:
        make_layer: called with in_features, out_features, bias, rank and device; None leaves the model dense.
        pattern: regular expression searched in each linear's qualified name.
        rank: see `layer_rank`.
        ranks: exact ranks by layer name, which come before `rank`.

    Raises:
        ConfigError: if the pattern matches no linear, or a rank does not fit its layer.
    """
    attention = CAUSAL if getattr(config, "sliding_window", None) is None else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=brings_code(config)
        )
    if make_layer is not None:
        assert pattern is not None and rank is not None
        found = linears(model, pattern)
        if isinstance(rank, str):
            rank = budget_rank(rank, parameter_count(model), found, make_layer)
        for name, linear in found.items():
            layer = factorized(linear, make_layer, ranks.get(name) or layer_rank(rank, name, linear))
            model.set_submodule(name, layer)
    return model


def factorized(linear: nn.Linear, make_layer: Callable[..., FactorizedLinear], rank: int) -> FactorizedLinear:
    """What stands for a linear, on the meta device."""
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    return make_layer(**sizes, rank=rank, device="meta")


def budget_rank(
    rule: str, dense: int, found: Mapping[str, nn.Linear], make_layer: Callable[..., FactorizedLinear]
) -> int:
    """The largest rank, the same in all layers, with which the model trains at most a share of its dense parameters.

    Args:
        rule: the share, as `60%`.
        dense: parameters of the dense model.
        found: the linears that are replaced.

    Raises:
        ConfigError: if `rule` is no percentage, or even rank 1 trains more.
    """
    if not re.fullmatch(r"\d+(\.\d+)?%", rule):
        raise ConfigError(f"param.rank={rule} is not a rank, a share such as 0.25, or a percentage such as 60%")
    shapes = Counter((linear.out_features, linear.in_features, linear.bias is not None) for linear in found.values())
    examples = {(m.out_features, m.in_features, m.bias is not None): m for m in found.values()}
    kept = dense - sum(map(parameter_count, found.values()))

    def trained(rank: int) -> int:
        return kept + sum(n * trainable_count(factorized(examples[s], make_layer, rank)) for s, n in shapes.items())

    budget, ranks = float(rule[:-1]) / 100 * dense, range(1, 1 + min(min(out, into) for out, into, _ in shapes))
    if trained(1) > budget:
        raise ConfigError(f"param.rank={rule} of {dense:,} dense parameters is too few: rank 1 trains {trained(1):,}")
    return bisect_right(ranks, budget, key=trained)


def linears(model: nn.Module, pattern: str) -> dict[str, nn.Linear]:
    """The plain linears whose qualified name `pattern` is found in, by name.

    Raises:
        ConfigError: if there is none, or the pattern is not a regular expression.
    """
    names = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    try:
        found = {name: module for name, module in names.items() if re.search(pattern, name)}
    except re.error as error:
        raise ConfigError(f"param.pattern={pattern} is not a regular expression: {error}") from error
    if not found:
        raise ConfigError(
            f"param.pattern={pattern} matches none of the linear layers, such as {', '.join([*names][:7])}"
        )
    return found


def layer_rank(rule: int | float | dict[str, int | float], name: str, linear: nn.Linear) -> int:
    """The rank of one layer: an integer is the rank, a float a share of min(in, out), a mapping goes from patterns
    (searched in the layer's name, the first that is found holds) to either.

    Raises:
        ConfigError: if no pattern is found or the rank is not between 1 and min(in, out).
    """
    key = "param.rank"
    if isinstance(rule, dict):
        match = next((pattern for pattern in rule if re.search(pattern, name)), None)
        if match is None:
            raise ConfigError(f"param.rank={rule} has no pattern that is found in {name}; add one")
        key, rule = f"param.rank.{match}", rule[match]
    return matrix_rank(rule, key, name, linear.out_features, linear.in_features)


def matrix_rank(rule: int | float, key: str, name: str, m: int, n: int) -> int:
    """A rank for a matrix (m, n): an integer is the rank, a float a share of min(m, n).

    Args:
        key, name: of the configuration and of the matrix, for the error.

    Raises:
        ConfigError: if the rank is not between 1 and min(m, n).
    """
    largest = min(m, n)
    if isinstance(rule, float):
        if not 0 < rule <= 1:
            raise ConfigError(f"{key}={rule} is not a share of min(in, out): use 0 < share ≤ 1, or an integer rank")
        return max(1, round(rule * largest))
    if not 1 <= rule <= largest:
        raise ConfigError(f"{key}={rule} is not between 1 and min(in, out)={largest} of {name}")
    return rule


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks: the longest list of modules in the model. They are sharded, compiled and recomputed."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state that is saved, by name; a parameter with several names under the first of them."""
    firsts = first_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if firsts[name] == name}


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """Each name in the model's state → the first name of the same tensor."""
    state = model.state_dict(keep_vars=True)
    found: dict[int, str] = {}
    return {name: found.setdefault(id(tensor), name) for name, tensor in state.items()}


# --- what the model consists of ----------------------------------------------------------------------------------


def matrices(model: nn.Module, pattern: str) -> Mapping[str, FactorizedLinear | nn.Linear]:
    """The layers whose spectra are of interest: the factorized ones, or in a dense model those that would be."""
    return factorized_layers(model) or linears(model, pattern)


def factorized_layers(model: nn.Module) -> dict[str, FactorizedLinear]:
    """The factorized layers by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


def ledger(model: nn.Module) -> list[tuple[str, int, str, int]]:
    """What was replaced: rows (projection, layers, "out×in, rank", parameters), one per kind of layer."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, layer in factorized_layers(model).items():
        shape = f"{layer.out_features}×{layer.in_features}, rank {layer.rank}"
        rows.setdefault((name.rsplit(".", 1)[-1], shape), []).append(parameter_count(layer))
    return [(kind, len(sizes), shape, sum(sizes)) for (kind, shape), sizes in rows.items()]


def above_break_even(model: nn.Module) -> list[str]:
    """Layers that train at least as many parameters as the dense layer that they replace."""
    return [
        name
        for name, layer in factorized_layers(model).items()
        if trainable_count(layer) >= layer.in_features * layer.out_features
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
            dense += 6 * module.in_features * module.out_features
        elif isinstance(module, nn.Linear) and id(module) not in inner:
            own += 6 * module.in_features * module.out_features
            dense += 6 * module.in_features * module.out_features
    return Flops(model=float(own + 3 * attention), dense_equivalent=float(dense + 3 * attention))


def mean_rank(model: nn.Module) -> float | None:
    """The mean rank of the factorized layers; None of a dense model."""
    ranks = [layer.rank for layer in factorized_layers(model).values()]
    return sum(ranks) / len(ranks) if ranks else None


def support_hash(model: nn.Module) -> str:
    """A hash over all buffers that a seed gives back: a checkpoint keeps it to notice if a seed ever did not."""
    return hash_of_supports(
        (name, {k: b for k, b in layer.named_buffers(recurse=False) if k in layer._non_persistent_buffers_set})
        for name, layer in factorized_layers(model).items()
    )


def hash_of_supports(supports: Iterable[tuple[str, Mapping[str, Tensor]]]) -> str:
    """The same, over the buffers of each layer in turn."""
    digest = hashlib.blake2b(digest_size=16)
    for name, buffers in supports:
        for key, buffer in sorted(buffers.items()):
            digest.update(f"{name}.{key}".encode())
            digest.update(buffer.cpu().numpy().tobytes())
    return digest.hexdigest()


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, frozen ones too, unsharded, tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())


def trainable_count(model: nn.Module) -> int:
    """Number of parameters that are trained, unsharded, tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad)


def settle(
    model: nn.Module,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    measured: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Let each layer that can be executed in several ways choose one by measurement, once per shape.

    Args:
        tokens: of one process's forward pass.
        measured: what was chosen before, which stays.

    Returns:
        The execution of each such layer by name.
    """
    chosen: dict[str, str | None] = {}
    executions: dict[str, str] = {}
    for name, layer in factorized_layers(model).items():
        if layer.execution == "auto" and name in measured:
            executions[name] = measured[name]
            continue
        kind = repr(layer)
        if kind not in chosen:
            chosen[kind] = layer.settle(tokens, dtype, device)
        if (execution := chosen[kind]) is not None:
            executions[name] = execution
    return executions


def dense_parameter_count(model: nn.Module) -> int:
    """Parameters of the same architecture with dense linears (out·in and the same biases)."""
    saved = 0
    for layer in factorized_layers(model).values():
        own = sum(p.numel() for name, p in layer.named_parameters() if layer.roles[name] != "bias")
        saved += layer.in_features * layer.out_features - own
    return parameter_count(model) + saved
