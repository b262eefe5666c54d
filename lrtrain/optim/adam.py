"""Adam's step, shared by AdamW and all methods that project gradients."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim.adamw import adamw

from lrtrain.distributed.sharding import local

EpsConvention = Literal["corrected", "galore"]


def bias_correction(step: int, beta1: float, beta2: float) -> float:
    """(1 − β₂ᵗ)^½ / (1 − β₁ᵗ), the factor on M / √V."""
    return (1 - beta2**step) ** 0.5 / (1 - beta1**step)


def adam_direction(
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    eps_convention: str = "corrected",
) -> Tensor:
    """Adam's step M̂ / (√V̂ + ε) (Kingma and Ba, 2015, algorithm 1); updates the moments in place.

    Args:
        gradient, first, second: gradient and moments, of the same shape, float32.
        step: from 1.
        eps_convention: `corrected`: as above, as in torch; `galore`: (1 − β₂ᵗ)^½ / (1 − β₁ᵗ) · M / (√V + ε), as in the
            code of GaLore, Fira, APOLLO and LORO, which makes ε effectively 1/√(1 − β₂ᵗ) times as large.
    """
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if eps_convention == "corrected":
        eps *= (1 - beta2**step) ** 0.5
    return (first * bias_correction(step, beta1, beta2)).div_(second.sqrt().add_(eps))


def fused_adamw(
    parameters: list[Tensor],
    states: Mapping[Tensor, Mapping[str, Tensor]],
    group: Mapping[str, Any],
    betas: tuple[float, float],
    eps: float,
    found_inf: Tensor | None = None,
) -> None:
    """A step of AdamW on this process's part of all parameters by torch's fused kernel.

    Args:
        states: of each parameter: `exp_avg`, `exp_avg_sq` and `step`.
        group: has `lr` and `weight_decay`.
        found_inf: a number on the device; if it is not 0, nothing is changed.
    """
    adamw(
        [local(p) for p in parameters],
        [local(p.grad) for p in parameters if p.grad is not None],
        [local(states[p]["exp_avg"]) for p in parameters],
        [local(states[p]["exp_avg_sq"]) for p in parameters],
        [],
        [local(states[p]["step"]) for p in parameters],
        found_inf=found_inf,
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=eps,
        maximize=False,
    )
