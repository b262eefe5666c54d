"""Adam's arithmetic: the one step that AdamW and all methods that project gradients share."""

from torch import Tensor


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
        gradient, first, second: of one shape, float32.
        step: from 1.
        eps_convention: `corrected` as above (torch's); `galore`: (1 − β₂ᵗ)^½ / (1 − β₁ᵗ) · M / (√V + ε), which the
            code of GaLore, Fira, APOLLO and LORO computes: its ε is 1/√(1 − β₂ᵗ) times as large.
    """
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (1 - beta2**step) ** 0.5
    scale = root / (1 - beta1**step)
    return (first * scale).div_(second.sqrt().add_(eps * root if eps_convention == "corrected" else eps))
