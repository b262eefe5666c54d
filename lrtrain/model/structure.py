"""A model's blocks, linear layers, and names of tensors."""

import inspect
import re
from collections.abc import Mapping
from functools import cache

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks: the longest module list that is not inside another one (experts may be longer)."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(child) for blocks in lists for child in blocks.modules() if child is not blocks}
    return max((blocks for blocks in lists if id(blocks) not in inner), key=len)


def untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state by name, with tied tensors under their first name only."""
    firsts = first_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if firsts[name] == name}


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """Each name in the model's state → the first name of its tensor."""
    state = model.state_dict(keep_vars=True)
    found: dict[int, str] = {}
    return {name: found.setdefault(id(tensor), name) for name, tensor in state.items()}


def matrices(model: nn.Module, pattern: str) -> Mapping[str, FactorizedLinear | nn.Linear]:
    """The layers whose spectra are measured: the factorized ones, or in a dense model those matching `pattern`."""
    return factorized_layers(model) or linears(model, pattern, subclasses=True)


def factorized_layers(model: nn.Module) -> dict[str, FactorizedLinear]:
    """The factorized layers by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


def linears(model: nn.Module, pattern: str, subclasses: bool = False) -> dict[str, nn.Linear]:
    """The linear layers (`nn.Linear` and transformers' `Conv1D`) whose qualified name matches `pattern`, by name,
    without those whose weight the model reads directly.

    Args:
        subclasses: whether to include subclasses of `nn.Linear`: their weights can be measured, but they may compute
            something else, so they cannot be replaced.

    Raises:
        ConfigError: if there is none, or the pattern is not a regular expression.
    """
    read = weights_read(model)
    names = {
        name: module
        for name, module in model.named_modules()
        if (is_plain(module) or subclasses and isinstance(module, nn.Linear)) and name not in read
    }
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
    """Whether a module is a linear layer and not of a subclass (other than FSDP's, and Falcon's, which computes the
    same)."""
    kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    return kind in (nn.Linear, Conv1D, FalconLinear)


def weights_read(model: nn.Module) -> set[str]:
    """Names of the plain linear layers whose weight or bias their parent reads directly, on any device: they cannot be
    replaced."""
    return {
        f"{name}.{child}".removeprefix(".")
        for name, module in model.named_modules()
        if not isinstance(module, FactorizedLinear)  # reads its own factors
        for child, layer in module.named_children()
        if is_plain(layer) and child in _children_read(type(module))
    }


@cache
def _children_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names of children whose weight or bias a class's methods read, apart from initialization."""
    found: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not re.search("init|reset", name):
                try:
                    source = inspect.getsource(method)
                except OSError:  # generated code without source
                    continue
                found |= {*re.findall(r"\bself\.(\w+)\.(?:weight|bias)\b", source)}
    return frozenset(found)
