"""Initial values: a function of (seed, parameter name) alone.

So a model is the same at every world size and under every engine."""

import copy
import os
import uuid
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrtrain.core.cache import cache_folder, fingerprint, make_shared
from lrtrain.core.files import sync_file, sync_folder
from lrtrain.core.seeds import generator_for, integer_seed
from lrtrain.distributed.per_layer import compute_across_ranks
from lrtrain.distributed.sharding import take_over
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.structure import factorized_layers


@torch.no_grad()
def materialize(model: PreTrainedModel, seed: int, device: torch.device, fresh: bool = True) -> None:
    """Give every parameter and buffer its storage on `device` and its initial value; a collective.

    Parameters may be sharded already (DTensors on meta).
    """
    model.to_empty(device=device)
    model.tie_weights()  # getting storage may have parted them
    fill(model, seed, fresh)


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int, fresh: bool = True) -> None:
    """Give every parameter and buffer, sharded or not, its initial value; a collective.

    Without `fresh` the state of factorized layers is left to be loaded; the buffers that a seed gives back are drawn.

    Dense modules are drawn by every process, factorized layers, whose values can cost an SVD, by one process for all;
    each keeps its shards and drops the rest, so no process holds more than two whole modules.
    """
    layers = factorized_layers(model)

    def values_of(name: str) -> dict[str, Tensor]:
        layer = layers[name]
        return (
            initial_values(layer, seed, name) if fresh else layer.init_buffers(generator_for(seed, f"{name}/buffers"))
        )

    for name, values in compute_across_ranks([*layers], values_of):
        take_over(layers[name], values)
    inside = {id(child) for layer in layers.values() for child in layer.modules()}
    filled: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in inside and (values := dense_values(model, module, seed, name)):
            tied = {key for key in values if id(getattr(module, key)) in filled}  # valued by the module that came first
            take_over(module, {key: value for key, value in values.items() if key not in tied})
            filled.update(id(getattr(module, key)) for key in values)


def initial_layer(model: PreTrainedModel, name: str, seed: int) -> nn.Module:
    """A linear layer of the model, which is on meta, as `materialize` starts it: whole, on the CPU."""
    layer = model.get_submodule(name)
    if isinstance(layer, FactorizedLinear):
        values = initial_values(layer, seed, name)
    else:
        values = dense_values(model, layer, seed, name)
    twin = copy.deepcopy(layer).to_empty(device="cpu")
    with torch.no_grad():
        take_over(twin, values)
    return twin


def initial_values(layer: FactorizedLinear, seed: int, name: str) -> dict[str, Tensor]:
    """All parameters and buffers of a factorized layer: a function of (seed, name) alone.

    Raises:
        ConfigError: if the layer's own code leaves one out, which would stay as it was allocated.
    """
    values = initial_state(layer, seed, name) | layer.init_buffers(generator_for(seed, f"{name}/buffers"))
    wanted = {key for key, _ in (*layer.named_parameters(), *layer.named_buffers())}
    if missing := sorted(wanted - {*values}):
        raise ConfigError(f"{type(layer).__name__} gives no initial value to {', '.join(missing)} of {name}")
    return values


def initial_state(layer: FactorizedLinear, seed: int, name: str) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a factorized layer: a function of (seed, name) alone."""

    def compute() -> dict[str, Tensor]:
        return layer.init_parameters(generator_for(seed, name))

    kept = layer.init_version is not None
    values = kept_on_disk(initial_state_path(layer, seed, name), compute) if kept else compute()
    if hasattr(layer, "starts_at_zero"):
        values = zero_start(values, {key for key, role in layer.roles.items() if role == "factor_left"})
    return values


def zero_start(values: dict[str, Tensor], zero: set[str]) -> dict[str, Tensor]:
    """The initial values with those at zero that make the layer's W zero and let it learn: of a plain linear its
    weight, of BA the left factor."""
    return {key: torch.zeros_like(value) if key in zero else value for key, value in values.items()}


def initial_state_path(layer: FactorizedLinear, seed: int, name: str) -> Path:
    """Where a layer's costly values are kept: named by all that they depend on; `init_version` stands for the code."""
    shapes = {key: [*value.shape] for key, value in layer.state_dict().items()}
    other = {key for key in vars(layer) if key[0] == "_"} | {"training", "execution"}
    settings = {key: value for key, value in vars(layer).items() if key not in other}
    code = (type(layer).__module__, type(layer).__qualname__, layer.init_version, torch.__version__)
    key = fingerprint(code, settings, shapes, integer_seed(seed, name))
    return cache_folder() / "init" / f"{key}.pt"


def kept_on_disk(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in the file; where it is missing or damaged they are computed and it is written anew.

    Any number of processes may do so at once: the file appears whole, by a rename. Without room for it there is none.
    """
    with suppress(Exception), zipfile.ZipFile(path) as file:  # what torch.load raises on a damaged one is not specified
        if file.testzip() is None:  # torch does not look at the checksums
            return torch.load(path, weights_only=True)
    values = compute()
    unfinished = path.with_suffix(f".{os.getpid()}.{uuid.uuid4().hex}")
    with suppress(OSError, RuntimeError):  # torch's writer raises the second on a full disk
        make_shared(path.parent)
        torch.save({key: value.contiguous() for key, value in values.items()}, unfinished)
        sync_file(unfinished)
        unfinished.rename(path)
        sync_folder(path.parent)
    with suppress(OSError):
        unfinished.unlink()
    return values


def dense_values(model: PreTrainedModel, module: nn.Module, seed: int, name: str) -> dict[str, Tensor]:
    """The module's own parameters and buffers as transformers initializes them, on the CPU, by name; zero
    where it is to start there."""
    own = dict(module.named_parameters(recurse=False))
    buffers = dict(module.named_buffers(recurse=False))
    if not own and not buffers:
        return {}
    twin = object.__new__(type(module))  # copy.copy would call FSDP's constructor where it wraps the module itself
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {key: nn.Parameter(torch.empty(p.shape)) for key, p in own.items()}  # type: ignore
    twin._parameters |= {key: None for key, p in module._parameters.items() if p is None}
    # Factorized experts have values of their own, where transformers would draw dense ones.
    factors = {
        key: nn.Parameter(torch.empty(0)) for key, m in module._modules.items() if isinstance(m, FactorizedLinear)
    }
    twin._parameters |= factors
    twin._modules = {key: child for key, child in module._modules.items() if key not in factors}
    twin._buffers = {key: torch.empty(b.shape, dtype=b.dtype) for key, b in buffers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, name))
        model._init_weights(twin)
    values = {key: getattr(twin, key) for key in (*own, *buffers)}
    return zero_start(values, {"weight"}) if hasattr(module, "starts_at_zero") else values
