"""What a layer of one's own promises, checked on meta before anything is allocated."""

from torch import nn

from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.init import initial_values
from lrtrain.model.structure import factorized_layers

SAID_BY = {"add_penalty": "penalized", "after_step": "constrained"}
"""Hook → the attribute that says whether it is called."""


def check_contract(model: nn.Module, seed: int) -> None:
    """Check the smallest layer of each class from outside lrtrain: its hooks, and its initial values.

    Raises:
        ConfigError: for a hook that would never be called, and what `initial_values` refuses.
    """
    for name, layer in smallest_of_each(model).items():
        kind = type(layer)
        for hook, said in SAID_BY.items():
            if getattr(kind, hook) is not getattr(FactorizedLinear, hook) and not says(layer, said):
                raise ConfigError(f"{kind.__name__} has {hook}, which is called only where it says {said} = True")
        initial_values(layer, seed, name)


def smallest_of_each(model: nn.Module) -> dict[str, FactorizedLinear]:
    """The layer with the fewest parameters of each class that is not lrtrain's, by name."""
    found: dict[type, tuple[str, FactorizedLinear]] = {}
    by_size = sorted(factorized_layers(model).items(), key=lambda one: sum(p.numel() for p in one[1].parameters()))
    for name, layer in by_size:
        if type(layer).__module__.partition(".")[0] != "lrtrain":
            found.setdefault(type(layer), (name, layer))
    return dict(found.values())


def says(layer: FactorizedLinear, attribute: str) -> bool:
    """Whether a layer or its class sets an attribute, to whatever value."""
    kinds = type(layer).__mro__
    return attribute in vars(layer) or any(attribute in vars(kind) for kind in kinds[: kinds.index(FactorizedLinear)])
