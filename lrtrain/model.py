"""From a model config to a sharded, initialized, factorized model.

`build_model` makes the transformers architecture on the meta device and swaps the selected linears for factorized
ones; the engine shards it; `materialize` then fills it module by module. A value depends on (seed, parameter name)
alone, so the model is the same at every world size and under every engine.
"""

import copy
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lrtrain.config import Config, choice
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear

RankRule = int | float | dict[str, int | float]

# Packed rows are attended causally from end to end. Under a name that transformers has no mask function for it builds
# no mask, and so does not look into the position ids either, which would stall a GPU in every forward pass.
CAUSAL = "lrtrain_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


# --- architecture ------------------------------------------------------------------------------------------------


def architecture(path: str | None, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config: from `path` (a folder or hub name) or from `overrides` with its `model_type`.

    Raises:
        ConfigError: if it cannot be had, or is not a causal language model's.
    """
    try:
        if path is not None:
            config = AutoConfig.from_pretrained(path, **overrides)
        else:
            config = AutoConfig.for_model(**overrides)
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = f"model.path={path}" if path is not None else f"model.config={overrides}"
        raise ConfigError(f"{where} is not a transformers model config: {str(error).splitlines()[0]}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"model_type={config.model_type} has no causal language model in transformers")
    return config


def make_model(config: Config) -> PreTrainedModel:
    """The model of the configuration, factorized as `param` says, on the meta device."""
    param = config.param
    make_layer = choice(param) if param["_target_"] else None
    model = build_model(
        architecture(config.model.path, config.model.config), make_layer, param["pattern"], param["rank"]
    )
    if zeros := param.get("zero_init"):
        found = [layer for name, layer in matrices(model, r"\.\d+\.").items() if re.search(zeros, name)]
        if not found:
            raise ConfigError(f"param.zero_init={zeros} matches none of the layers")
        for layer in found:
            layer.starts_at_zero = True  # pyright: ignore[reportArgumentType]  (`materialize` reads it)
    return model


def build_model(
    config: PreTrainedConfig,
    make_layer: Callable[..., FactorizedLinear] | None,
    pattern: str | None,
    rank: RankRule | None,
) -> PreTrainedModel:
    """The causal language model of `config` on the meta device, with the linears that `pattern` finds factorized.

    Args:
        make_layer: called with in_features, out_features, bias, rank and device; None leaves the model dense.
        pattern: regular expression searched in each linear's qualified name.
        rank: see `layer_rank`.

    Raises:
        ConfigError: if the pattern matches no linear, or a rank does not fit its layer.
    """
    attention = CAUSAL if getattr(config, "sliding_window", None) is None else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    if make_layer is not None:
        assert pattern is not None and rank is not None
        for name, linear in linears(model, pattern).items():
            layer = make_layer(
                in_features=linear.in_features,
                out_features=linear.out_features,
                bias=linear.bias is not None,
                rank=layer_rank(rank, name, linear),
                device="meta",
            )
            model.set_submodule(name, layer)
    return model


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


def layer_rank(rule: RankRule, name: str, linear: nn.Linear) -> int:
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
    largest = min(linear.in_features, linear.out_features)
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
    """Layers that hold at least as many parameters as the dense layer that they replace."""
    return [
        name
        for name, layer in factorized_layers(model).items()
        if parameter_count(layer) >= layer.in_features * layer.out_features
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
    layer, not halved for causality), times three for forward and backward."""
    config = model.config.get_text_config()
    attention = 4 * config.num_hidden_layers * seq_len * config.hidden_size
    inner = {id(child) for m in model.modules() if isinstance(m, FactorizedLinear) for child in m.modules()}
    own = dense = 0
    for module in model.modules():
        if isinstance(module, FactorizedLinear):
            own += module.flops(1)
            dense += 2 * module.in_features * module.out_features
        elif isinstance(module, nn.Linear) and id(module) not in inner:
            own += 2 * module.in_features * module.out_features
            dense += 2 * module.in_features * module.out_features
    return Flops(model=3.0 * (own + attention), dense_equivalent=3.0 * (dense + attention))


# --- initial values ----------------------------------------------------------------------------------------------


def materialize(model: PreTrainedModel, seed: int, device: torch.device) -> None:
    """Give every parameter and buffer its storage on `device` and its initial value, one module at a time.

    Parameters may be sharded already (DTensors on meta): each process draws a module's whole values on the CPU,
    keeps its shards and drops the rest, so no process holds more than one whole module.
    """
    model.to_empty(device=device)
    model.tie_weights()  # getting storage may have parted them
    inside: set[str] = set()
    filled: set[int] = set()
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in inside:
                continue
            if isinstance(module, FactorizedLinear):
                inside.update(f"{name}.{child}" for child, _ in module.named_modules() if child)
                values = module.init_parameters(generator_for(seed, name))
                buffers = module.init_buffers(generator_for(seed, f"{name}/buffers"))
            else:
                values, buffers = dense_values(model, module, seed, name)
            if getattr(module, "starts_at_zero", False):
                values = zero_start(module, values)
            for key, value in values.items():
                parameter = module.get_parameter(key)
                if id(parameter) not in filled:  # a tied one has the value of the module that comes first
                    keep_shard(parameter, value)
                    filled.add(id(parameter))
            for key, value in buffers.items():
                module.get_buffer(key).copy_(value)


def zero_start(module: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The initial values with the least of them at zero that makes the layer's W zero and lets it learn: of a plain
    linear its weight, of BA the left factor."""
    zero = "factor_left" if isinstance(module, FactorizedLinear) else "weight"
    roles = module.roles if isinstance(module, FactorizedLinear) else {key: key for key in values}
    return {key: torch.zeros_like(value) if roles[key] == zero else value for key, value in values.items()}


def dense_values(model: PreTrainedModel, module: nn.Module, seed: int, name: str) -> tuple[dict, dict]:
    """The module's own parameters and buffers as transformers initializes them, on the CPU, by name."""
    own = dict(module.named_parameters(recurse=False))
    buffers = dict(module.named_buffers(recurse=False))
    if not own and not buffers:
        return {}, {}
    twin = copy.copy(module)
    twin._parameters = {key: nn.Parameter(torch.empty(p.shape)) for key, p in own.items()}  # type: ignore
    twin._parameters |= {key: None for key, p in module._parameters.items() if p is None}
    twin._buffers = {key: torch.empty(b.shape, dtype=b.dtype) for key, b in buffers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, name))
        model._init_weights(twin)
    return {key: twin._parameters[key] for key in own}, {key: twin._buffers[key] for key in buffers}


def keep_shard(parameter: Tensor, value: Tensor) -> None:
    """Copy into the parameter its part of the whole `value`; no communication."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        value = value.detach().to(parameter.device)
        whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.to_local().copy_(whole.redistribute(mesh, parameter.placements).to_local())
    else:
        parameter.copy_(value)


def integer_seed(seed: int, name: str) -> int:
    """A 63-bit seed that is a function of (seed, name) alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big") >> 1


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that is a function of (seed, name) alone."""
    return torch.Generator().manual_seed(integer_seed(seed, name))


def support_hash(model: nn.Module) -> str:
    """A hash over all buffers that a seed gives back: a checkpoint keeps it to notice if a seed ever did not."""
    digest = hashlib.blake2b(digest_size=16)
    for name, layer in factorized_layers(model).items():
        for key, buffer in layer.named_buffers(recurse=False):
            digest.update(f"{name}.{key}".encode())
            digest.update(buffer.cpu().numpy().tobytes())
    return digest.hexdigest()


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters, unsharded, tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())


def settle(model: nn.Module, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Let each layer that can be executed in several ways choose one by measurement, once per shape.

    Args:
        tokens: of one process's forward pass.

    Returns:
        The execution of each such layer by name.
    """
    chosen: dict[str, str | None] = {}
    executions: dict[str, str] = {}
    for name, layer in factorized_layers(model).items():
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
