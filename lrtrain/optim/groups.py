"""Parameter groups by role (matrix, factor, norm, …), never by shape."""

from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear, Role
from lrtrain.model.structure import blocks

FACTORS = frozenset({"factor_left", "factor_right"})
MATRICES = FACTORS | {"matrix"}
Decay = Literal["matrices", "all"]
LAYERS = MATRICES | {"sparse_values", "singular_values", "bias"}


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of each trainable parameter, by qualified name (of tied parameters, the first name).

    The roles of factorized layers are in `FactorizedLinear.roles`. Others: `matrix`: a weight in a block that
    multiplies activations, or a batch of them (see `is_matrix`); `head`: the weight of a linear layer elsewhere;
    `embedding`; `bias`; `norm`: the rest.
    """
    inner = {id(module) for block in blocks(model) for module in block.modules()}
    roles: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, FactorizedLinear):  # its roles include its children's parameters
            for key, p in module.named_parameters():
                roles[id(p)] = role_of(module, key)
            continue
        for key, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                role = "embedding"
            elif key.endswith("bias"):
                role = "bias"
            elif id(module) in inner:
                role = "matrix" if is_matrix(module, key, p) else "norm"
            else:
                role = "head" if isinstance(module, nn.Linear) else "norm"
            roles.setdefault(id(p), role)
    return {name: roles[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def is_matrix(module: nn.Module, key: str, p: Tensor) -> bool:
    """Whether a dense module's parameter multiplies activations: the `weight` of a linear layer, of transformers'
    Conv1D or of a router, or a batch of matrices (experts, …)."""
    if isinstance(module, _ConvNd):
        return False
    return p.ndim == 2 and key == "weight" or p.ndim == 3 and min(p.shape[1:]) > 1


def transposed(model: nn.Module) -> set[str]:
    """Names of the matrices, or batches of them, that are stored as (in, out): those of Conv1D and of some experts."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
        for key, p in module.named_parameters(recurse=False)
        if is_matrix(module, key, p)
    }


def role_of(layer: FactorizedLinear, key: str) -> str:
    """The role that a layer gives to one of its parameters.

    Raises:
        ConfigError: if it gives none, or an unknown one.
    """
    role = layer.roles.get(key)
    if role is None or role not in get_args(Role):
        said = f"gives its parameter {key} the role {role}" if role else f"gives its parameter {key} no role"
        raise ConfigError(f"{type(layer).__name__}.roles {said}; use one of {', '.join(get_args(Role))}")
    return role


def check_dimensions(name: str, p: Tensor, role: str, optimizer: str) -> None:
    """Check that an optimizer that steps matrices can step a parameter.

    Raises:
        ConfigError: if it is no matrix, or batch of matrices, though its role says so, or has more dimensions.
    """
    if p.ndim > 3 or (p.ndim < 2 and role in MATRICES):
        raise ConfigError(
            f"{name} of shape {'×'.join(map(str, p.shape))} has the role {role}, but is no matrix or batch of "
            f"matrices, which {optimizer} steps; use optim=adamw, or another role"
        )


def decays(role: str) -> bool:
    """Whether weight decay applies to parameters of this role: to matrices, factors and sparse values, but not to
    singular values, biases, norms and embeddings."""
    return role in MATRICES or role in ("sparse_values", "head")


def paced(model: nn.Module) -> set[str]:
    """Names of the parameters whose learning rate is multiplied by their layer's `lr_factor`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
    return {f"{name}.{key}" for name, layer in layers.items() for key in layer.paced}


def parameter_groups(
    model: nn.Module, weight_decay: float, other_lr: float = 1.0, lr_ratio: float = 1.0, decay: str = "matrices"
) -> list[dict[str, Any]]:
    """Groups for an optimizer, every trainable parameter in exactly one, in the model's order.

    Args:
        other_lr: learning rate of embeddings, head and norms ÷ that of the layers.
        lr_ratio: learning rate of the left factors ÷ that of the right ones (LoRA+, Hayou et al. 2024: η_B/η_A).
        decay: parameters with weight decay: `matrices` (see `decays`) or `all`.

    Each group has `names`, `role`, `weight_decay`, `lr_factor` (a constant factor on the learning rate), `paced`, and
    `transposed` (whether its matrices are stored as (in, out)).
    """
    slow, turned = paced(model), transposed(model)
    parameters = dict(model.named_parameters())
    groups: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    for name, role in parameter_roles(model).items():
        factor = lr_ratio if role == "factor_left" else 1.0 if role in LAYERS else other_lr
        new = {
            "params": [],
            "names": [],
            "role": role,
            "weight_decay": weight_decay * (decay == "all" or decays(role)),
            "lr_factor": factor,
            "paced": name in slow,
            "transposed": name in turned,
        }
        group = groups.setdefault((role, name in slow, name in turned), new)
        group["params"].append(parameters[name])
        group["names"].append(name)
    return [*groups.values()]
