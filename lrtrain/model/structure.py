"""What a model consists of: its blocks, its linear layers, and the names of its tensors."""

import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear


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


def matrices(model: nn.Module, pattern: str) -> Mapping[str, FactorizedLinear | nn.Linear]:
    """The layers whose spectra are of interest: the factorized ones, or in a dense model those that would be."""
    return factorized_layers(model) or linears(model, pattern)


def factorized_layers(model: nn.Module) -> dict[str, FactorizedLinear]:
    """The factorized layers by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


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
