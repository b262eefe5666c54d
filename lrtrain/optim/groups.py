"""Which parameters get which treatment."""

from typing import Any

from torch import nn

from lrtrain.layers.base import FactorizedLinear


def decays(module: nn.Module, name: str) -> bool:
    """Whether weight decay belongs on this parameter of the module: on matrices that multiply activations, whole or
    in parts, but not on singular values, biases, norms and embeddings."""
    if isinstance(module, FactorizedLinear):
        return module.roles[name] not in ("bias", "singular_values")
    return isinstance(module, nn.Linear) and name == "weight"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, every trainable parameter in exactly one: with `weight_decay` and without, and
    `paced`, whose learning rate has a factor of its layers' own (`FactorizedLinear.lr_factor`), and not."""
    decaying: set[int] = set()
    paced: set[int] = set()
    for module in model.modules():
        factorized = isinstance(module, FactorizedLinear)  # which speaks for its children too
        own = dict(module.named_parameters(recurse=factorized))
        decaying.update(id(p) for name, p in own.items() if decays(module, name))
        if factorized:
            paced.update(id(own[name]) for name in module.paced)
    decaying -= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault((id(p) in decaying, id(p) in paced), []).append(p)
    return [
        {"params": parameters, "weight_decay": weight_decay * decay, "paced": pace}
        for (decay, pace), parameters in groups.items()
    ]
