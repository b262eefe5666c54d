"""Stochastic rounding: unbiased, to a neighbor, and what it is for."""

import math

import torch

from lrtrain.optim.rounding import stochastic_round


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_mean_of_many_roundings_is_the_value():
    for value in (1.001, -3.14159, 1e-3, 0.3337):
        draws = stochastic_round(torch.full((100_000,), value), generator()).double()
        low, high = draws.unique().tolist()
        assert low < torch.tensor(value).double() < high
        sigma = (high - low) / 2 / math.sqrt(100_000)  # of a mean of two values, at the most
        assert abs(draws.mean().item() - torch.tensor(value).item()) < 4 * sigma


def test_what_bfloat16_holds_is_kept():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**100, math.inf, -math.inf])
    assert torch.equal(stochastic_round(exact, generator()).float(), exact)
    assert stochastic_round(torch.tensor([math.nan]), generator()).isnan().all()


def test_steps_too_small_for_bfloat16_add_up():
    """A decay of 1e-5 a step: nearest rounding loses all of it."""
    stochastic = torch.ones(1000, dtype=torch.bfloat16)
    nearest = stochastic.clone()
    dice = generator()
    for _ in range(2000):
        stochastic = stochastic_round(stochastic.float() * (1 - 1e-5), dice)
        nearest = (nearest.float() * (1 - 1e-5)).bfloat16()
    assert (nearest == 1).all()
    assert abs(stochastic.float().mean().item() - math.exp(-0.02)) < 2e-3
