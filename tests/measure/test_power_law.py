"""The fit of a power law against worked examples and a tail whose exponent is known."""

import math

import pytest
import torch

from lrtrain.measure.power_law import fit_power_law, power_law_metrics


def test_a_worked_example():
    law = fit_power_law(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    assert law is not None
    assert law.alpha == pytest.approx(1.961797, abs=1e-6)
    assert law.distance == pytest.approx(0.236583, abs=1e-6)
    assert law.error == pytest.approx(0.480898, abs=1e-6)
    assert law.alpha * math.log10(8) == pytest.approx(1.771679, abs=1e-6)


def test_another_worked_example():
    law = fit_power_law(torch.tensor([1, 1.5, 2, 3, 5, 9, 20]))
    assert law is not None
    assert (law.alpha, law.distance) == pytest.approx((1.777811, 0.145938), abs=1e-6)


def test_the_quantiles_of_a_law_give_its_exponent():
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    energy = (1 - u) ** -0.5
    law = fit_power_law(energy)
    assert law is not None
    assert (law.alpha, law.distance) == pytest.approx((3.008506, 0.003365), abs=1e-6)
    metrics = power_law_metrics(energy.sqrt().flip(0))
    assert metrics["alpha"] == pytest.approx(law.alpha)
    assert metrics["alpha_weighted"] == pytest.approx(law.alpha * math.log10(float(energy[-1])))


def test_zeros_are_no_part_of_the_tail():
    energy = torch.tensor([8.0, 4.0, 2.0, 1.0])
    assert fit_power_law(torch.cat([energy, torch.zeros(9)])) == fit_power_law(energy)


def test_equal_or_few_values_have_no_law():
    assert fit_power_law(torch.ones(100)) is None
    assert power_law_metrics(torch.ones(100)) == {}
    assert power_law_metrics(torch.arange(49, 0, -1.0)) == {}
