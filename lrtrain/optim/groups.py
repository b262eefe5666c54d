"""Which parameters get which treatment."""

from typing import Any

from torch import nn

from lrtrain.layers.base import FactorizedLinear


def decays(module: nn.Module, name: str) -> bool:
    """Whether weight decay belongs on this parameter of the module: on matrices that multiply activations, whole or
    in parts, but not on biases, norms and embeddings."""
    if isinstance(module, FactorizedLinear):
        return module.roles[name] != "bias"
    return isinstance(module, nn.Linear) and name == "weight"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for a torch optimizer: with `weight_decay` and without; every trainable parameter in exactly one."""
    decaying: set[int] = set()
    for module in model.modules():
        # a factorized layer speaks for its children too
        own = module.named_parameters(recurse=isinstance(module, FactorizedLinear))
        decaying.update(id(p) for name, p in own if decays(module, name))
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    yes = [p for p in parameters if id(p) in decaying - embeddings]
    no = [p for p in parameters if id(p) not in decaying - embeddings]
    return [{"params": yes, "weight_decay": weight_decay}, {"params": no, "weight_decay": 0.0}]
