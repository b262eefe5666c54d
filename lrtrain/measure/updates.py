"""Spectra of a weight's update between two steps, from its factors."""

import torch
from torch import Tensor

from lrtrain.linalg.factors import product_singular_values


def update_factors(left: Tensor, right: Tensor, new_left: Tensor, new_right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (out, 2r) and (2r, in) in float64 of B'A' − BA = [ΔB, B]·[A'; ΔA].

    Differences are computed first: [B', B]·[A'; −A] would cancel all digits of a small update.
    """
    left, right, new_left, new_right = (t.double() for t in (left, right, new_left, new_right))
    return torch.cat([new_left - left, left], dim=1), torch.cat([new_right, new_right - right])


def update_singular_values(left: Tensor, right: Tensor, new_left: Tensor, new_right: Tensor, scale: float) -> Tensor:
    """The min(2r, out, in) singular values of scale·(B'A' − BA), largest first.

    With B (out, r) and A (r, in) before, B' and A' after. At a relative update of 1e-8 some eight digits are left.
    """
    columns, rows = update_factors(left, right, new_left, new_right)
    sigma = product_singular_values(columns, rows, scale)
    return sigma[: min(len(sigma), left.shape[0], right.shape[1])]


def first_order_update(left: Tensor, right: Tensor, left_gradient: Tensor, right_gradient: Tensor) -> Tensor:
    """The 2r singular values of G_B A + B G_A, the first-order change of W = BA by a unit gradient step on its factors.

    With the gradients G_B (out, r) and G_A (r, in).
    """
    columns = torch.cat([left_gradient, left], dim=1)
    rows = torch.cat([right, right_gradient])
    sigma = product_singular_values(columns, rows, 1.0)
    return sigma[: min(len(sigma), left.shape[0], right.shape[1])]
