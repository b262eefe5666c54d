"""Initial values: a function of (seed, parameter name) only, so that they are the same at every world size and under
every engine."""

import copy
import os
import uuid
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lrtrain.core.cache import cache_folder, fingerprint, make_shared
from lrtrain.core.files import sync_file, sync_folder
from lrtrain.core.seeds import generator_for, integer_seed
from lrtrain.distributed.per_layer import compute_across_ranks
from lrtrain.distributed.sharding import take_over
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.architecture import named, new_model
from lrtrain.model.deferred import Recording, named_tensors
from lrtrain.model.structure import factorized_layers


@torch.no_grad()
def materialize(model: PreTrainedModel, seed: int, device: torch.device, fresh: bool = True) -> None:
    """Give every parameter and buffer its storage on `device` and its initial value; a collective.

    Parameters may be sharded already (DTensors on meta).
    """
    model.to_empty(device=device)
    model.tie_weights()  # allocation may have untied them
    fill(model, seed, fresh)


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int, fresh: bool = True) -> None:
    """Give every parameter and buffer, sharded or not, its initial value; a collective.

    Without `fresh` the state of factorized layers is left to be loaded, and only buffers regenerated from the seed are
    drawn.

    Every process draws dense modules; factorized layers, which may need an SVD, are drawn by one process each and
    broadcast. Each process keeps its shards, so none holds more than two whole modules.
    """
    layers = factorized_layers(model)

    def values_of(name: str) -> dict[str, Tensor]:
        layer = layers[name]
        return (
            initial_values(layer, seed, name) if fresh else layer.init_buffers(generator_for(seed, f"{name}/buffers"))
        )

    for name, values in compute_across_ranks([*layers], values_of):
        take_over(layers[name], values)
    start = TransformersStart(model.config)
    inside = {id(child) for layer in layers.values() for child in layer.modules()}
    filled: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in inside:
            own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            free = [key for key in own if id(own[key]) not in filled]  # tied ones: first name
            take_over(module, dense_values(start, module, free, seed, name))
            filled.update(map(id, own.values()))


def initial_layer(model: PreTrainedModel, name: str, seed: int) -> nn.Module:
    """A linear layer of a model on meta with the initial values of `materialize`, unsharded, on the CPU."""
    layer = model.get_submodule(name)
    if isinstance(layer, FactorizedLinear):
        values = initial_values(layer, seed, name)
    else:
        own = dict(layer.named_parameters()) | dict(layer.named_buffers())
        values = dense_values(_start_of(model), layer, own, seed, name)
    twin = copy.deepcopy(layer).to_empty(device="cpu")
    with torch.no_grad():
        take_over(twin, values)
    return twin


def initial_values(layer: FactorizedLinear, seed: int, name: str) -> dict[str, Tensor]:
    """Initial values of all parameters and buffers of a factorized layer: a function of (seed, name) only.

    Raises:
        ConfigError: if the layer gives no value to one of them, one of another shape, or one too many.
    """
    kind = type(layer).__name__
    state = initial_state(layer, seed, name)
    if not isinstance(state, dict):
        raise ConfigError(f"{kind}.init_parameters gives no dictionary of values by name, but {state!r}")
    values = state | layer.init_buffers(generator_for(seed, f"{name}/buffers"))
    wanted = {key: t.shape for key, t in (*layer.named_parameters(), *layer.named_buffers())}
    if missing := sorted(wanted.keys() - values.keys()):
        raise ConfigError(f"{kind} gives no initial value to {', '.join(missing)} of {name}")
    for key, value in values.items():
        if key not in wanted:
            raise ConfigError(f"{kind} gives an initial value to {key} of {name}, which has none of that name")
        if value.shape != wanted[key]:
            raise ConfigError(
                f"{kind} gives {key} of {name} an initial value of shape {[*value.shape]} instead of {[*wanted[key]]}"
            )
    return values


def initial_state(layer: FactorizedLinear, seed: int, name: str) -> dict[str, Tensor]:
    """Initial values of a factorized layer's parameters and persistent buffers: a function of (seed, name) only."""

    def compute() -> dict[str, Tensor]:
        return layer.init_parameters(generator_for(seed, name))

    kept = layer.init_version is not None
    values = kept_on_disk(initial_state_path(layer, seed, name), compute) if kept else compute()
    if hasattr(layer, "starts_at_zero"):
        values = zero_start(values, {key for key, role in layer.roles.items() if role == "factor_left"})
    return values


def zero_start(values: dict[str, Tensor], zero: set[str]) -> dict[str, Tensor]:
    """The initial values with those set to zero that make W zero but trainable: the weight of a dense layer, the left
    factor of BA."""
    return {key: torch.zeros_like(value) if key in zero else value for key, value in values.items()}


def initial_state_path(layer: FactorizedLinear, seed: int, name: str) -> Path:
    """The cache file of a layer's initial values, named by everything they depend on (`init_version` for the code)."""
    shapes = {key: [*value.shape] for key, value in layer.state_dict().items()}
    other = {key for key in vars(layer) if key[0] == "_"} | {"training", "execution"}
    settings = {key: value for key, value in vars(layer).items() if key not in other}
    code = (type(layer).__module__, type(layer).__qualname__, layer.init_version, torch.__version__)
    key = fingerprint(code, settings, shapes, integer_seed(seed, name))
    return cache_folder() / "init" / f"{key}.pt"


def kept_on_disk(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a cache file; if it is missing or damaged, they are computed and written.

    Safe for concurrent processes: the file is renamed into place. On a full disk it is not written.
    """
    with suppress(Exception), zipfile.ZipFile(path) as file:  # what torch.load raises on a damaged one is not specified
        if file.testzip() is None:  # torch does not verify checksums
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


def dense_values(
    start: "TransformersStart", module: nn.Module, keys: Iterable[str], seed: int, name: str
) -> dict[str, Tensor]:
    """transformers' initial values of a module's parameters and buffers with these names, unsharded, on the CPU; zero
    for layers that start at zero."""
    values = {key: start.value(f"{name}.{key}" if name else key, seed) for key in keys}
    return zero_start(values, {"weight"}) if hasattr(module, "starts_at_zero") else values


class TransformersStart:
    """transformers' initial values for the dense model of a config."""

    def __init__(self, config: PreTrainedConfig):
        self.recording = Recording()
        with torch.random.fork_rng(devices=[]), self.recording:
            model = new_model(copy.deepcopy(config), "eager")
        self.tensors = dict(named_tensors(model))
        self.architecture = named(config)

    def value(self, name: str, seed: int) -> Tensor:
        """The initial value of one parameter or buffer: a function of (seed, name) only.

        Raises:
            ConfigError: if transformers does not initialize it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer_seed(seed, name))
            try:
                return self.recording.value(self.tensors[name].detach())
            except ValueError as error:
                raise ConfigError(f"{self.architecture} has no initial value of {name} in transformers") from error


_starts: WeakKeyDictionary[PreTrainedModel, TransformersStart] = WeakKeyDictionary()


def _start_of(model: PreTrainedModel) -> TransformersStart:
    """The `TransformersStart` of a model, created once."""
    if model not in _starts:
        _starts[model] = TransformersStart(model.config)
    return _starts[model]
