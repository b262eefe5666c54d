"""SST's layer: what it follows, what it leaves alone, and what its draws and SVDs must not change."""

import math

import pytest
import torch
from launching import SMALL
from torch import Tensor, nn

from lrtrain import distributed
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.engine.fsdp import FSDPEngine
from lrtrain.engine.revision import revise_layers
from lrtrain.layers.sst import SSTLinear, active_probabilities, draw_order
from lrtrain.model.build import make_model
from lrtrain.model.counts import dense_parameter_count, trainable_count
from lrtrain.model.structure import factorized_layers

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def started(in_features=16, out_features=12, rank=4, enhanced=True, iteration=2, round=None) -> SSTLinear:
    """A float32 layer with its initial values."""
    layer = SSTLinear(in_features, out_features, True, rank, iteration, round, 2, enhanced, 0.02)
    layer.load_state_dict(layer.init_parameters(generator()))
    return layer


def assert_orthonormal(layer: SSTLinear) -> None:
    for vectors in layer._vectors():
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)), rtol=0, atol=1e-5)


def test_enhanced_gradients_are_the_true_ones_without_the_singular_value():
    true, enhanced = started(enhanced=False).double(), started(enhanced=True).double()
    x, g = torch.randn(7, 16, dtype=DOUBLE), torch.randn(7, 12, dtype=DOUBLE)
    for layer in (true, enhanced):
        layer(x).backward(g)
    sigma = true.sigma[true.order[:4], None]
    torch.testing.assert_close(enhanced.left.grad, true.left.grad / sigma, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(enhanced.right.grad, true.right.grad / sigma, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(enhanced.sigma.grad, true.sigma.grad, rtol=0, atol=0)
    dense = g.T @ x  # ∂L/∂W
    torch.testing.assert_close(enhanced.left.grad, enhanced.right @ dense.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(enhanced.right.grad, enhanced.left @ dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("enhanced", [False, True])
def test_with_every_vector_active_a_step_is_the_dense_one_weighted_in_the_singular_basis(
    enhanced: bool, restored: bool
):
    """To first order in the learning rate η, with G̃ = UᵀGV for square orthonormal U and V:

    dW̃_ij = -η w_ij G̃_ij with w_ij = σ_i + σ_j for enhanced and σ_i² + σ_j² for true gradients, all above zero: every
    direction of the dense gradient descends. On the diagonal σ's own gradient adds 1; restoring the vectors' lengths
    removes all but that 1.
    """
    weight, target = torch.randn(6, 6, dtype=DOUBLE), torch.randn(6, 6, dtype=DOUBLE)
    u, sigma, vt = torch.linalg.svd(weight)
    sizes = sigma if enhanced else sigma**2
    weights = sizes[:, None] + sizes
    weights += torch.eye(6, dtype=DOUBLE)
    if restored:
        weights.fill_diagonal_(1)
    expected = -u @ (weights * (u.T @ (weight - target) @ vt.T)) @ vt
    errors = [(sgd_rate(weight, target, lr, enhanced, restored) - expected).norm() for lr in (1e-5, 5e-6)]
    assert errors[0] < 1e-3 * expected.norm()
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.01)  # what is left is of second order


def test_with_all_singular_values_a_half_a_step_is_dense_sgd():
    """σ_i + σ_j = 1: all weights of the claim above are 1."""
    u, v = (torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE)).Q for _ in range(2))
    weight, target = 0.5 * u @ v.T, torch.randn(6, 6, dtype=DOUBLE)
    rate = sgd_rate(weight, target, 1e-6, enhanced=True, restored=True)
    torch.testing.assert_close(rate, target - weight, rtol=0, atol=1e-4)


def sgd_rate(weight: Tensor, target: Tensor, lr: float, enhanced: bool, restored: bool) -> Tensor:
    """(W after - W before) / lr of one SGD step on ½‖W - target‖², all vectors active."""
    layer = SSTLinear.from_dense(weight, len(weight), enhanced=enhanced)
    optimizer = torch.optim.SGD(layer.parameters(), lr)
    (layer(torch.eye(len(weight), dtype=DOUBLE)) - target.T).square().sum().div(2).backward()
    optimizer.step()
    with torch.no_grad():
        if restored:
            layer.after_step()
        return (layer.dense_weight() - weight) / lr


def distance_after(rank: int, revised: bool, steps: int = 1500) -> float:
    """‖W - target‖ / ‖target‖ after training on ½‖W - target‖², a target of full rank."""
    target = 0.3 * torch.randn(12, 16, generator=generator(5)).double()
    model = nn.ModuleDict({"layer": started(rank=rank, iteration=10).double()})
    layer = model["layer"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        (layer(torch.eye(16, dtype=DOUBLE)) - layer.bias - target.T).square().sum().div(2).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / steps) * layer.lr_factor(step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            layer.after_step()
            if revised and layer.revision_due(step + 1):
                revise_layers(model, optimizer, step + 1, 0)
    return ((layer.dense_weight() - target).norm() / target.norm()).item()


@pytest.mark.full
def test_it_reaches_what_dense_training_reaches_if_all_vectors_get_their_turn():
    assert distance_after(rank=12, revised=False) < 1e-3
    assert distance_after(rank=3, revised=True) < 1e-2
    assert distance_after(rank=3, revised=False) > 0.3  # the same three vectors all the time


@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (12, 12)])
def test_draws_and_svds_leave_the_map_unchanged(shape: tuple[int, int]):
    layer = started(shape[1], shape[0], iteration=2, round=2)
    assert_orthonormal(layer)
    with torch.no_grad():
        for name in ("left", "right"):
            vectors = layer.get_parameter(name)
            vectors += 0.3 * torch.randn_like(vectors)
        layer.sigma[3] = -1
        layer.after_step()
        assert layer.sigma[3] == 0 and (layer.sigma >= 0).all()
        for vectors in layer._vectors():
            torch.testing.assert_close(vectors.norm(dim=1), torch.ones(12))
        x = torch.randn(5, shape[1])
        expected, order = layer(x), layer.order.clone()
        layer.revise(2, generator(1))
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(layer.order, order)
        with pytest.raises(AssertionError):
            assert_orthonormal(layer)  # the training above was no rotation
        layer.revise(4, generator(2))
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert_orthonormal(layer)
    assert (layer.sigma.diff() <= 0).all()


def test_a_draw_moves_vectors_bit_for_bit_and_stores_none_twice():
    layer = started(iteration=2, round=9)
    before = layer._vectors()
    with torch.no_grad():
        layer.revise(2, generator(3))
    assert all(torch.equal(a, b) for a, b in zip(before, layer._vectors(), strict=True))
    assert sorted(layer.order.tolist()) == list(range(12))
    assert sum(p.numel() for p in layer.parameters()) == 12 * (12 + 16) + 12 + 12  # q(m + n) + q, and the bias


def test_the_active_are_drawn_without_replacement_half_uniformly_half_by_size():
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0])
    probabilities = active_probabilities(sigma)
    assert probabilities.sum().item() == pytest.approx(1)
    torch.testing.assert_close(probabilities, torch.tensor([0.35, 0.225, 0.1625, 0.1625, 0.1], dtype=DOUBLE))
    assert active_probabilities(torch.zeros(3)).tolist() == pytest.approx([1 / 6] * 3)  # multinomial normalizes
    dice = generator(4)
    firsts = torch.stack([draw_order(sigma, 1, dice)[0] for _ in range(4000)])
    torch.testing.assert_close(firsts.bincount() / 4000, probabilities.float(), rtol=0, atol=0.03)
    for _ in range(20):
        assert sorted(draw_order(sigma, 3, dice).tolist()) == [0, 1, 2, 3, 4]


# --- in a model, under the engine --------------------------------------------------------------------------------

ROWS = torch.randint(128, (4, 17), generator=generator())


@pytest.fixture
def engine():
    config = compose(*SMALL, "param=sst", "param.iteration=3", "param.round=2", "param.warmup=2")
    made = FSDPEngine(
        distributed.start(),
        torch.float32,
        compile=False,
        recompute_every=0,
        recompute_keep="inputs",
        replicas=1,
        tensor=1,
        reduce_dtype="fp32",
    )
    made.prepare(make_model(config), 0, choice(config.optim))
    yield made
    distributed.stop()


def train(engine: FSDPEngine, steps: range) -> None:
    for step in steps:
        engine.begin_step(step, 1e-2, 1.0, "global")
        loss = engine.forward_backward(ROWS, 64)
        engine.clip_and_step(loss.item())
        engine.revise(step + 1)


def test_frozen_vectors_do_not_move_within_an_iteration_and_have_no_gradients_or_states(engine: FSDPEngine):
    layers = factorized_layers(engine.model)
    frozen = {f"{k}.{name}": layer.get_parameter(name) for k, layer in layers.items()
              for name, role in layer.roles.items() if role == "frozen"}  # fmt: skip
    assert frozen
    for first in (0, 3, 6):
        before = {name: p.clone() for name, p in frozen.items()}
        active = {name: layer.left.clone() for name, layer in layers.items()}
        train(engine, range(first, first + 2))
        assert all(torch.equal(before[name], p) for name, p in frozen.items())
        assert not any(torch.equal(active[name], layer.left) for name, layer in layers.items())
        engine.forward_backward(ROWS, 64)
        assert all(p.grad is None for p in frozen.values())
        engine.optimizer.zero_grad()
        train(engine, range(first + 2, first + 3))


def test_optimizer_states_are_those_of_the_active_vectors_and_singular_values(engine: FSDPEngine):
    train(engine, range(7))
    layers = factorized_layers(engine.model)
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    expected = sum(p.numel() for p in engine.model.parameters() if id(p) not in inside)
    expected += sum(4 * (m + n) + min(m, n) for m, n in shapes)  # r = 4 pairs of vectors, and σ
    moments = [t for state in engine.optimizer.state.values() for t in state.values() if t.ndim]
    assert sum(t.nbytes for t in moments) == 2 * 4 * expected


def test_a_new_iteration_clears_the_states_of_the_vectors_and_an_svd_those_of_sigma(engine: FSDPEngine):
    def steps_counted(name: str) -> list[float]:
        layer = next(iter(factorized_layers(engine.model).values()))
        state = engine.optimizer.state[layer.get_parameter(name)]
        assert bool(state["exp_avg"].any()) == bool(state["exp_avg_sq"].any()) == bool(state["step"].item())
        return state["step"].item()

    counted = []
    for step in range(7):
        train(engine, range(step, step + 1))
        counted.append((steps_counted("left"), steps_counted("right"), steps_counted("sigma")))
    assert [c[0] for c in counted] == [c[1] for c in counted] == [1, 2, 0, 1, 2, 0, 1]
    assert [c[2] for c in counted] == [1, 2, 3, 4, 5, 0, 1]


def test_vectors_warm_up_in_each_iteration_and_singular_values_keep_the_schedule(engine: FSDPEngine):
    layer = next(iter(factorized_layers(engine.model).values()))
    assert [layer.lr_factor(step) for step in range(5)] == [0.5, 1, 1, 0.5, 1]
    paced = {id(p) for group in engine.optimizer.param_groups if group["paced"] for p in group["params"]}
    assert paced == {id(p) for x in factorized_layers(engine.model).values() for p in (x.left, x.right)}
    engine.begin_step(3, 1e-2, 1.0, "global")
    assert {group["lr"] for group in engine.optimizer.param_groups if group["paced"]} == {5e-3}
    assert {group["lr"] for group in engine.optimizer.param_groups if not group["paced"]} == {1e-2}


def test_a_round_lasts_until_each_index_was_due_once():
    layer = SSTLinear(16, 10, False, 4, 5, None, 0, True, 0.02)
    assert layer.steps_per_round == 5 * math.ceil(10 / 4)
    assert [step for step in range(1, 31) if layer.revision_due(step)] == [5, 10, 15, 20, 25, 30]
    assert [step for step in range(5, 31, 5) if "sigma" in layer.resets(step)] == [15, 30]
    assert layer.lr_factor(0) == 1.0  # no warmup


def test_the_trained_share_is_the_published_one():
    """18.7 % of the parameters of LLaMA-1.3B at r = 128."""
    model = make_model(compose("model=llama_1b", "param=sst", "param.rank=128"))
    assert trainable_count(model) / dense_parameter_count(model) == pytest.approx(0.187, abs=0.002)
