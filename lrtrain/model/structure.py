"""What a model consists of: its blocks, its linear layers, and the names of its tensors."""

import inspect
import re
from collections.abc import Mapping
from functools import cache

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks, which are sharded, compiled and recomputed: the longest list of modules that is in no other
    (experts may be more)."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(child) for blocks in lists for child in blocks.modules() if child is not blocks}
    return max((blocks for blocks in lists if id(blocks) not in inner), key=len)


def untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state that is saved, by name; a parameter with several names under the first of them."""
    firsts = first_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if firsts[name] == name}


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """Each name in the model's state → the first name of the same tensor."""
    state = model.state_dict(keep_vars=True)
    found: dict[int, str] = {}
    return {name: found.setdefault(id(tensor), name) for name, tensor in state.items()}


def matrices(model: nn.Module, pattern: str) -> Mapping[str, FactorizedLinear | nn.Linear]:
    """The layers whose spectra are of interest: the factorized ones, or in a dense model those that would be."""
    return factorized_layers(model) or linears(model, pattern)


def factorized_layers(model: nn.Module) -> dict[str, FactorizedLinear]:
    """The factorized layers by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


def linears(model: nn.Module, pattern: str) -> dict[str, nn.Linear]:
    """The plain linears whose qualified name `pattern` is found in, by name: `nn.Linear` and transformers' `Conv1D`.

    No classes derived from them, which compute something else, and no layer whose weight the model reads itself.

    Raises:
        ConfigError: if there is none, or the pattern is not a regular expression.
    """
    read = weights_read(model)
    names = {name: module for name, module in model.named_modules() if is_plain(module) and name not in read}
    try:
        found = {name: module for name, module in names.items() if re.search(pattern, name)}
    except re.error as error:
        raise ConfigError(f"param.pattern={pattern} is not a regular expression: {error}") from error
    if not found:
        own = {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and not is_plain(m)}
        but = f"; those of classes of their own ({', '.join(sorted(own))}) stay as they are" if own else ""
        raise ConfigError(
            f"param.pattern={pattern} matches none of the linear layers, such as {', '.join([*names][:7])}{but}"
        )
    return found  # pyright: ignore[reportReturnType]  (Conv1D has the same attributes here: see `build_model`)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is exactly a linear layer, sharded by FSDP or not."""
    kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    return kind is nn.Linear or kind is Conv1D


def weights_read(model: nn.Module) -> set[str]:
    """Names of the plain linears whose weight or bias the module that holds them reads instead of calling the layer, on
    any device: no other layer can stand in for them."""
    return {
        f"{name}.{child}".removeprefix(".")
        for name, module in model.named_modules()
        if not isinstance(module, FactorizedLinear)  # whose factors are its own
        for child, layer in module.named_children()
        if is_plain(layer) and child in _children_read(type(module))
    }


@cache
def _children_read(kind: type[nn.Module]) -> frozenset[str]:
    """Children whose weight or bias a class's methods read, but for those that initialize."""
    found: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not re.search("init|reset", name):
                try:
                    source = inspect.getsource(method)
                except OSError:  # made by other code
                    continue
                found |= {*re.findall(r"\bself\.(\w+)\.(?:weight|bias)\b", source)}
    return frozenset(found)
