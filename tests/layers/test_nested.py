"""What is claimed of one layer that is trained at many ranks."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrtrain.layers.nested import NestedLinear, dropped_energies

DEFAULTS = {
    "init_std": 0.02,
    "ranks": [0.125, 0.25, 0.5, 0.75, 1.0],
    "sampling": "shares",
    "full_share": 0.5,
    "scale": "none",
    "lasso": 0.0,
    "shrink_every": 0,
    "shrink_threshold": 0.0,
}


def make(in_features=12, out_features=10, rank=8, **change) -> NestedLinear:
    """A float64 layer with random factors."""
    layer = NestedLinear(in_features, out_features, False, rank, **{**DEFAULTS, **change}).double()
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    return layer


def generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


# --- ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_full_rank_nested_equals_dense_and_every_prefix_is_the_best_of_its_rank(shape: tuple[int, int]):
    weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    layer, x = NestedLinear.from_dense(weight, 6, bias), torch.randn(4, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=1e-12, atol=1e-12)
    sigma = torch.linalg.svdvals(weight)
    for rank in range(1, 6):
        layer.truncate(rank)
        torch.testing.assert_close((weight - layer.dense_weight()).norm(), sigma[rank:].norm())


@pytest.mark.parametrize("scale,exponent", [("none", 0), ("sqrt", 0.5), ("linear", 1)])
def test_truncation_acts_in_eval_mode_alone_and_can_be_undone(scale: str, exponent: float):
    layer, x = make(scale=scale), torch.randn(3, 12, dtype=torch.float64)
    whole = layer(x)
    layer.truncate(2)
    assert torch.equal(layer(x), whole)
    expected = (8 / 2) ** exponent * layer.B.weight[:, :2] @ layer.A.weight[:2]
    torch.testing.assert_close(layer.eval()(x), x @ expected.T)
    torch.testing.assert_close(layer.dense_weight(), expected)
    torch.testing.assert_close(layer.singular_values(), torch.linalg.svdvals(expected)[:2])
    layer.truncate(8)
    assert torch.equal(layer(x), whole)


def test_a_step_trains_and_computes_the_drawn_prefix_only():
    layer, x = make(), torch.randn(5, 12, dtype=torch.float64)
    layer.drawn = 3
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 2 * 5 * 3 * (12 + 10)
    y.square().sum().backward()
    assert layer.A.weight.grad[:3].all() and not layer.A.weight.grad[3:].any()
    assert layer.B.weight.grad[:, :3].all() and not layer.B.weight.grad[:, 3:].any()


def test_layers_of_all_ranks_draw_the_same_share_as_often_as_configured():
    large, small, steps = make(16, 16, rank=16), make(rank=8), 2000
    drawn = []
    for step in range(steps):
        large.draw(generator(step))
        small.draw(generator(step))
        assert large.drawn == 2 * small.drawn
        drawn.append(small.drawn)
    counts = {rank: drawn.count(rank) / steps for rank in sorted(set(drawn))}
    assert counts == pytest.approx({1: 0.125, 2: 0.125, 4: 0.125, 6: 0.125, 8: 0.5}, abs=0.03)
    assert small.training_flops(7) == pytest.approx(3 * sum(2 * 7 * rank * 22 for rank in drawn) / steps, rel=0.02)


def test_compilation_makes_one_graph_per_rank():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = make()
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for step in range(40):
        layer.draw(generator(step))
        compiled(torch.randn(5, 12, dtype=torch.float64)).sum().backward()
    assert len(graphs) == len(layer.ranks)


# --- Maestro's theorem: ordered dropout finds the singular vectors in their order ------------------------------------


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator(seed), dtype=torch.float64)).Q


def assert_same_up_to_sign(found: Tensor, expected: Tensor, atol: float) -> None:
    """Columns as directions."""
    cosines = (nn.functional.normalize(found, dim=0) * expected).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=atol)


def test_sampled_ranks_recover_the_svd_in_linear_regression():
    """y = W x on isotropic x (its covariance is I, so the rows of I are the data), a rank drawn for each step."""
    u, vt, sigma = orthogonal(6, 1), orthogonal(6, 2).T, torch.tensor([3.0, 2.4, 1.8, 1.3, 0.9, 0.5]).double()
    weight, x = u * sigma @ vt, torch.eye(6, dtype=torch.float64)
    layer = make(6, 6, rank=6, ranks=[k / 6 for k in range(1, 7)], full_share=1 / 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.08)
    for step in range(2500):
        layer.draw(generator(step))
        (layer(x) - x @ weight.T).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_up_to_sign(layer.B.weight, u, atol=1e-6)
    assert_same_up_to_sign(layer.A.weight.T, vt.T, atol=1e-6)
    torch.testing.assert_close(layer.B.weight.norm(dim=0) * layer.A.weight.norm(dim=1), sigma, rtol=1e-3, atol=0)


def test_all_ranks_at_once_recover_pca_in_a_linear_autoencoder():
    directions, deviations = orthogonal(6, 3), torch.tensor([3.0, 2.4, 1.8, 1.3, 0.9, 0.5]).double()
    x = deviations[:, None] * directions.T  # XᵀX is the covariance
    layer = make(6, 6, rank=4)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=3000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for layer.drawn in range(1, 5):
            total = total + (layer(x) - x).square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    assert_same_up_to_sign(layer.B.weight, directions[:, :4], atol=1e-6)
    assert_same_up_to_sign(layer.A.weight.T, directions[:, :4], atol=1e-6)


def test_without_smaller_ranks_the_order_is_not_found():
    """The control: the whole rank alone fits W as well, by factors that are in no order."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
    layer, x = make(3, 3, rank=3, ranks=[1.0]), torch.eye(3, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(1000):
        (layer(x) - x @ weight.T).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer.dense_weight(), weight)
    assert nn.functional.normalize(layer.B.weight, dim=0).diagonal().abs().min() < 0.99


# --- the lasso ---------------------------------------------------------------------------------------------------


def penalty(layer: NestedLinear) -> Tensor:
    left, right = layer.B.weight, layer.A.weight
    return sum(left[:, b:].norm() + right[b:].norm() for b in range(layer.rank))  # type: ignore[return-value]


def test_the_lasso_adds_the_gradient_of_its_sum_over_all_tails():
    layer = make(lasso=0.3)
    expected = torch.autograd.grad(0.3 * penalty(layer), [*layer.parameters()])
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    layer.add_penalty()
    for p, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 1 + gradient, rtol=1e-12, atol=1e-12)


def test_the_lasso_leaves_zero_tails_at_zero():
    layer = make(lasso=0.3)
    with torch.no_grad():
        layer.B.weight[:, 5:] = 0
        layer.A.weight.zero_()
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    layer.add_penalty()
    assert not layer.A.weight.grad.any() and not layer.B.weight.grad[:, 5:].any()
    assert layer.B.weight.grad[:, :5].isfinite().all() and layer.B.weight.grad[:, :5].all()


def test_the_lasso_shrinks_each_column_more_than_the_one_before():
    layer = make(lasso=1e-2)
    before = layer.B.weight.detach().norm(dim=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(40):
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        layer.add_penalty()
        optimizer.step()
    left = layer.B.weight.norm(dim=0) / before
    assert left[0] < 1 and (left.diff() < 0).all()


# --- the wanted rank -----------------------------------------------------------------------------------------------


def test_dropped_energies_are_those_of_the_product():
    layer = make()
    left, right = layer.B.weight, layer.A.weight
    expected = torch.stack([(left[:, b:] @ right[b:]).square().sum() for b in range(8)])
    torch.testing.assert_close(dropped_energies(left, right), expected)


def test_the_wanted_rank_is_the_smallest_within_the_threshold():
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).double())  # energies 16 9 4 1 of 30
    for threshold, wanted in [(0.0, 4), (1 / 31, 4), (1 / 29, 3), (4 / 30, 3), (6 / 30, 2), (0.99, 1)]:
        layer = NestedLinear.from_dense(weight, 4)
        layer.shrink_threshold = threshold
        assert layer.wanted_rank() == wanted
    with torch.no_grad():
        layer.B.weight[0, 0] = torch.nan
    assert layer.wanted_rank() == 4


def test_it_looks_every_so_many_steps_or_never():
    every = partial(make, shrink_threshold=0.1)
    assert [step for step in range(1, 10) if every(shrink_every=3).resize_due(step)] == [3, 6, 9]
    assert not any(every(shrink_every=0).resize_due(step) for step in range(1, 10))


def test_uniform_sampling_draws_every_rank_equally_often_as_dylora():
    layer, counts = make(12, 10, rank=8, sampling="uniform"), [0] * 9
    for step in range(4000):
        layer.draw(generator(step))
        counts[layer.drawn] += 1
    assert counts[0] == 0
    assert all(abs(count - 500) < 5 * (500 * 7 / 8) ** 0.5 for count in counts[1:])
    assert layer.training_flops(10) == 6 * 10 * 4.5 * (12 + 10)
