"""Stochastic rounding: unbiased, to a neighbor, the same in whatever shard, and what it is for."""

import math

import torch

from lrtrain.core.seeds import integer_seed
from lrtrain.optim.rounding import stochastic_round, uniform_bits


def test_the_mean_of_many_roundings_is_the_value():
    for value in (1.001, -3.14159, 1e-3, 0.3337):
        draws = stochastic_round(torch.full((100_000,), value), seeds=[0]).double()
        low, high = draws.unique().tolist()
        assert low < torch.tensor(value).double() < high
        sigma = (high - low) / 2 / math.sqrt(100_000)  # of a mean of two values, at the most
        assert abs(draws.mean().item() - torch.tensor(value).item()) < 4 * sigma


def test_what_bfloat16_holds_is_kept():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**100, math.inf, -math.inf])
    assert torch.equal(stochastic_round(exact, seeds=[0]).float(), exact)
    assert stochastic_round(torch.tensor([math.nan]), seeds=[0]).isnan().all()
    assert stochastic_round(torch.empty(0, 5), seeds=[0]).shape == (0, 5)


def test_steps_too_small_for_bfloat16_add_up():
    """A decay of 1e-5 a step: nearest rounding loses all of it."""
    stochastic = torch.ones(1000, dtype=torch.bfloat16)
    nearest = stochastic.clone()
    for step in range(1500):
        stochastic = stochastic_round(stochastic.float() * (1 - 1e-5), seeds=[integer_seed(0, f"step {step}")])
        nearest = (nearest.float() * (1 - 1e-5)).bfloat16()
    assert (nearest == 1).all()
    assert abs(stochastic.float().mean().item() - math.exp(-0.015)) < 2e-3


def test_any_rows_of_a_tensor_are_rounded_as_in_the_whole():
    for shape in ((37, 20), (37,), (7, 5, 3)):
        whole = torch.randn(shape)
        parts = [stochastic_round(whole[a:b], [5], first_row=a) for a, b in ((0, 3), (3, 3), (3, len(whole)))]
        assert torch.equal(torch.cat(parts), stochastic_round(whole, [5]))


def test_the_bits_are_uniform_and_independent_between_rows_columns_and_seeds():
    entries = torch.empty(1000, 1000)
    bits = uniform_bits(entries[None], [integer_seed(0, "a")], 0)[0]
    counts = torch.bincount(bits.flatten().long(), minlength=2**16).double()  # 15.3 expected
    chi = (((counts - counts.mean()) ** 2) / counts.mean()).sum().item()
    assert abs(chi - 2**16) < 5 * math.sqrt(2 * 2**16)
    unit = bits.double() / 2**16 - 0.5
    others = [
        uniform_bits(entries[None], [seed], 0)[0].double() / 2**16 - 0.5
        for seed in (integer_seed(1, "a"), integer_seed(0, "b"))
    ]
    for other in (unit.roll(1, 0), unit.roll(1, 1), unit.roll((1, 1), (0, 1)), unit.T, *others):
        assert abs((unit * other).mean().item()) < 5 / 12 / 1000  # five standard deviations of a mean of 10⁶ products
