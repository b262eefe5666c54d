"""Claims that hold for every parameterization, and those of each."""

import copy
import math
from functools import partial

import pytest
import torch
import torch._functorch.config
from torch import Tensor
from torch._dynamo.utils import counters

from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.cola import CoLALinear
from lrtrain.layers.lost import LOSTLinear
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.layers.nested import NestedLinear
from lrtrain.layers.relora import ReLoRALinear
from lrtrain.layers.sltrain import SLTrainLinear
from lrtrain.layers.sst import SSTLinear
from lrtrain.linalg.initial import best_factors, gaussian_spectrum, spectral_factors
from lrtrain.measure.movement import linear_map

SLTRAIN = partial(
    SLTrainLinear,
    density=0.2,
    support="uniform",
    block=2,
    alpha=4.0,
    scale="alpha_over_r",
    init="published",
    init_std=0.02,
    select="random",
    rebalance_at=None,
)
LOST = partial(LOSTLinear, density=0.2, gamma=0.7, select="svd_l2", complement_rank=None, init_std=0.02)
COLA = partial(CoLALinear, init="cola", init_std=0.02, residual_alpha=1.0)
NESTED = partial(
    NestedLinear,
    init_std=0.02,
    ranks=[0.3, 0.7, 1.0],
    sampling="shares",
    full_share=0.5,
    lasso=0.0,
    shrink_every=0,
    shrink_threshold=0.0,
)
LOWRANK = partial(LowRankLinear, init_std=0.02, residual=False, residual_alpha=0.5, rebalance_at=None)
METHODS = {
    "lowrank": partial(LOWRANK, init="spectral"),
    "lowrank-lora": partial(LOWRANK, init="lora"),
    "lowrank-xavier": partial(LOWRANK, init="xavier"),
    "sltrain-materialize": partial(SLTRAIN, execution="materialize"),
    "sltrain-factored": partial(SLTRAIN, execution="factored"),
    "sltrain-spectral": partial(SLTRAIN, execution="materialize", init="spectral"),
    "relora": partial(
        ReLoRALinear,
        merge_every=4,
        alpha=4.0,
        scale="alpha_over_r",
        prune=0.9,
        prune_by="magnitude",
        restart_counter=False,
        init_std=0.3,
    ),  # fmt: skip
    "sst": partial(SSTLinear, iteration=4, round=2, warmup=2, enhanced=False, init_std=0.3),
    "lowrank-residual": partial(LOWRANK, init="cola", residual=True),
    "lost-silu": partial(LOST, activation="silu"),
    "lost-none": partial(LOST, activation="none"),
    "cola": partial(COLA, activation="silu", residual=False),
    "dlr": partial(COLA, activation="silu", residual=True),
    "nested": partial(NESTED, scale="none"),
    "nested-sqrt": partial(NESTED, scale="sqrt"),
    "sltrain-row-balanced-materialize": partial(SLTRAIN, support="row_balanced", execution="materialize"),
    "sltrain-row-balanced": partial(SLTRAIN, support="row_balanced", execution="factored"),
    "sltrain-block-materialize": partial(SLTRAIN, support="block", execution="materialize"),
    "sltrain-block": partial(SLTRAIN, support="block", execution="factored"),
    "sltrain-block-triton": partial(SLTRAIN, support="block", execution="triton"),  # its operators, on a CPU
}
NONLINEAR = ("lost-silu", "cola", "dlr")
linear_methods = pytest.mark.parametrize("method", [name for name in METHODS if name not in NONLINEAR])
every_method = pytest.mark.parametrize("method", METHODS)


def make(method: str, in_features=12, out_features=10, rank=3, bias=True, perturb=True) -> FactorizedLinear:
    """A float64 layer away from its start, where B = 0 would hide mistakes."""
    layer = METHODS[method](in_features, out_features, bias, rank)
    generator = torch.Generator().manual_seed(0)
    state = layer.init_parameters(generator)
    biases = {name for name, role in layer.roles.items() if role == "bias"}
    assert dict(layer.named_parameters()).keys() == layer.roles.keys() - (set() if bias else biases)
    assert state.keys() == layer.state_dict().keys()
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            assert state[name].shape == value.shape
            noise = 0.3 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else 0
            value.copy_(state[name] + perturb * noise)
        for name, value in layer.init_buffers(generator).items():
            layer.get_buffer(name).copy_(value)
    return layer.double()


def bias_of(layer: FactorizedLinear) -> Tensor | None:
    return next((p for name, p in layer.named_parameters() if layer.roles[name] == "bias"), None)


@linear_methods
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_dense_weight(method: str, bias: bool):
    layer = make(method, bias=bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, layer.dense_weight(), bias_of(layer))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", NONLINEAR)
def test_a_nonlinear_layer_has_no_dense_weight_and_the_spectrum_of_its_linear_map(method: str):
    layer = make(method)
    with pytest.raises(NotImplementedError, match="only param.activation=none can be merged"):
        layer.dense_weight()
    linear = copy.copy(layer)
    linear.activation = "none"
    expected = torch.linalg.svdvals(linear.dense_weight())
    found = layer.singular_values()
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-8, atol=1e-8)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert (layer(x) - linear(x)).abs().max() > 0.01


@every_method
def test_the_linear_map_has_the_singular_values(method: str):
    layer = make(method)
    found = layer.singular_values()
    torch.testing.assert_close(torch.linalg.svdvals(linear_map(layer))[: len(found)], found, rtol=1e-8, atol=1e-8)


@every_method
def test_gradients_pass_gradcheck(method: str):
    layer = make(method)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters))


@linear_methods
def test_singular_values_are_those_of_the_dense_weight(method: str):
    layer = make(method)
    found = layer.singular_values()
    expected = torch.linalg.svdvals(layer.dense_weight())
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-8, atol=1e-8)
    assert (expected[len(found) :] < 1e-8).all()


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith(("sltrain", "lost"))])
def test_the_parts_add_up_to_the_weight(method: str):
    layer = make(method)
    parts = layer.parts()
    assert parts is not None
    low_rank, sparse = parts
    assert torch.linalg.matrix_rank(low_rank) <= layer.rank
    assert torch.allclose(torch.linalg.svdvals(low_rank + sparse).double()[:1], layer.singular_values()[:1], rtol=1e-5)
    if method not in NONLINEAR:
        assert torch.allclose(low_rank + sparse, layer.dense_weight(), atol=1e-6)


@every_method
def test_initial_values_are_a_function_of_the_generator(method: str):
    layer = METHODS[method](12, 10, True, 3)
    first, second, other = (layer.init_parameters(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@every_method
def test_training_lowers_the_loss(method: str):
    layer, target = make(method, perturb=False), torch.randn(10, 12, dtype=torch.float64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    x = torch.randn(256, 12, dtype=torch.float64)
    losses = []
    for _ in range(100):
        loss = (layer(x) - x @ target.T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# each backward by hand
BY_INDUCTOR = ("sltrain-materialize", "sltrain-factored", "sltrain-block", "sltrain-block-triton", "sst", "dlr")


@pytest.mark.parametrize(
    "method,backend",
    [*((method, "aot_eager") for method in METHODS)]
    + [pytest.param(method, "inductor", marks=pytest.mark.full) for method in BY_INDUCTOR],
)
def test_compiles_without_graph_breaks_and_agrees(method: str, backend: str):
    layer = make(method).float()
    x = torch.randn(6, 12)
    expected = layer(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in layer.parameters() if not p.requires_grad)
    layer.zero_grad()
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True  # as prepare_blocks
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found = compiled(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-4)
    if backend == "inductor":
        assert not counters["aot_autograd"]["autograd_cache_bypass"]


# --- lowrank -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_full_rank_lowrank_equals_dense(shape: tuple[int, int]):
    weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    layer = LowRankLinear.from_dense(weight, min(shape), bias)
    x = torch.randn(4, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, bias), rtol=1e-12, atol=1e-12)


def test_lowrank_from_dense_is_the_best_approximation():
    weight = torch.randn(8, 11, dtype=torch.float64)
    left = weight - LowRankLinear.from_dense(weight, 3).dense_weight()
    sigma = torch.linalg.svdvals(weight)
    torch.testing.assert_close(left.norm(), sigma[3:].norm())


@pytest.mark.parametrize("m,n", [(256, 256), (344, 128), (128, 344)])
def test_spectral_init_has_the_spectrum_of_a_gaussian(m: int, n: int):
    rank, generator = 32, torch.Generator().manual_seed(0)
    left, right = spectral_factors(m, n, rank, 0.02, generator)
    found = torch.linalg.svdvals((left @ right).double())[:rank]
    drawn = [torch.linalg.svdvals(0.02 * torch.randn(m, n, generator=generator).double()) for _ in range(8)]
    expected = torch.stack(drawn).mean(0)
    torch.testing.assert_close(found, expected[:rank], rtol=0.02, atol=0)
    torch.testing.assert_close(gaussian_spectrum(m, n, 0.02), expected, rtol=0.02, atol=0.01 * expected[0].item())
    balance = left.T.double() @ left.double() - right.double() @ right.T.double()
    assert balance.abs().max() < 1e-6  # BᵀB = AAᵀ: the split is even


# --- lost --------------------------------------------------------------------------------------------------------


def lost(in_features: int, out_features: int, rank: int, **change) -> LOSTLinear:
    """A layer at its start."""
    given = {"density": 0.05, "gamma": 1.0, "activation": "none", "select": "svd_l2", "complement_rank": None}
    layer = LOSTLinear(in_features, out_features, False, rank, **given | {"init_std": 0.02} | change)
    layer.load_state_dict(layer.init_parameters(torch.Generator().manual_seed(0)))
    return layer


def test_colas_bias_starts_as_in_its_code():
    """U(±1/√out), whose standard deviation is 1/√(3·out); of the other starts it is zero."""
    for init, std in (("cola", 1 / math.sqrt(3 * 4000)), ("xavier", 0.0)):
        layer = CoLALinear(12, 4000, True, 3, init, 0.02, "silu", False, 1.0)
        bias = layer.init_parameters(torch.Generator().manual_seed(0))["B.bias"]
        assert bias.std().item() == pytest.approx(std, rel=0.03) and bias.abs().max() <= 1 / math.sqrt(4000)


@pytest.mark.parametrize("m,n,silu_std", [(512, 512, 0.21), (1376, 512, 0.19), (512, 1376, 0.31)])
def test_lost_starts_with_the_statistics_of_a_truncated_gaussian(m: int, n: int, silu_std: float):
    """Rank 128 of a draw of std 0.02, unit-variance inputs, γ = 1; the output's std with SiLU is a measured one."""
    x = torch.randn(4096, n, generator=torch.Generator().manual_seed(1))
    layer = lost(n, m, 128).requires_grad_(False)
    sigma = gaussian_spectrum(m, n, 0.02)[:128]
    torch.testing.assert_close(layer.singular_values()[:128], sigma, rtol=0.03, atol=0)
    assert layer.A(x).var().item() == pytest.approx(sigma.mean().item(), rel=0.03)  # row i of A has norm √σ_i
    assert layer(x).var().item() == pytest.approx(sigma.square().sum().item() / m, rel=0.03)
    layer.activation = "silu"
    assert layer(x).std().item() == pytest.approx(silu_std, rel=0.03)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
@pytest.mark.parametrize("complement_rank", [None, 2])
def test_lost_keeps_the_columns_that_the_factors_miss_most(shape: tuple[int, int], complement_rank: int | None):
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    rest = slice(3, None if complement_rank is None else 3 + complement_rank)
    complement = (u[:, rest] * s[rest]) @ vt[rest]
    norms = {"svd_l2": complement.norm(dim=0), "svd_l1": complement.abs().sum(0), "weight_l2": weight.norm(dim=0)}
    for select, scores in norms.items():
        layer = LOSTLinear(shape[1], shape[0], False, 3, 0.4, 0.7, "none", select, complement_rank, 0.02).double()
        layer.load_state_dict(layer._start_from(weight))
        expected = scores.argsort(descending=True)[: math.floor(0.4 * shape[1])].sort().values
        assert torch.equal(layer.columns, expected)
        assert torch.equal(layer.sparse, weight[:, expected])
        torch.testing.assert_close(layer.B.weight @ layer.A.weight, (u[:, :3] * s[:3]) @ vt[:3])


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_lost_at_full_rank_with_all_columns_or_without_weight_on_them_is_any_dense_layer(shape: tuple[int, int]):
    weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    x = torch.randn(4, shape[1], dtype=torch.float64)
    expected = torch.nn.functional.linear(x, weight, bias)
    for density, gamma in ((1.0, 0.3), (0.2, 1.0)):
        layer = LOSTLinear.from_dense(weight, min(shape), density, gamma, "svd_l2", bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_lost_starts_alike_with_any_number_of_threads():
    threads, states = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        states.append(lost(200, 300, 40).state_dict())
    torch.set_num_threads(threads)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_lost_random_columns_are_drawn_from_the_generator():
    layer = lost(100, 20, 4, select="random")
    again, other = (layer.init_parameters(torch.Generator().manual_seed(s))["columns"] for s in (0, 1))
    assert torch.equal(layer.columns, again) and not torch.equal(layer.columns, other)
    assert (layer.columns.diff() > 0).all()


def test_best_factors_of_a_deficient_matrix_are_finite():
    weight = torch.randn(9, 2, dtype=torch.float64) @ torch.randn(2, 7, dtype=torch.float64)
    for given in (weight, torch.zeros(9, 7)):
        left, right = best_factors(given, 5)
        torch.testing.assert_close(left @ right, given.double(), rtol=1e-10, atol=1e-10)


# --- cola and dlr ------------------------------------------------------------------------------------------------


def test_cola_starts_as_published():
    """Entries of std τ = r^-¼ (m + n)^-¼; for 512 → 512, r = 128 and unit inputs z has std 1.19 and y 0.43."""
    layer = METHODS["cola"](512, 512, False, 128)
    layer.load_state_dict(layer.init_parameters(torch.Generator().manual_seed(0)))
    x = torch.randn(4096, 512, generator=torch.Generator().manual_seed(1))
    for weight in (layer.A.weight, layer.B.weight):
        assert weight.std().item() == pytest.approx(128**-0.25 * 1024**-0.25, rel=0.01)
    assert (layer.B.weight @ layer.A.weight).std().item() == pytest.approx(1024**-0.5, rel=0.03)
    assert layer.A(x).std().item() == pytest.approx(1.19, rel=0.03)
    assert layer(x).std().item() == pytest.approx(0.43, rel=0.03)


@pytest.mark.parametrize("method", ["dlr", "lowrank-residual"])
@pytest.mark.parametrize("out_features,rank", [(12, 3), (10, 3), (11, 4), (5, 5)])
def test_the_residual_repeats_the_latents_and_folds_exactly(method: str, out_features: int, rank: int):
    layer = make(method, out_features=out_features, rank=rank)
    x = torch.randn(6, 12, dtype=torch.float64)
    z = layer.A(x)
    z = torch.nn.functional.silu(z) if method == "dlr" else z
    repeats = math.ceil(out_features / rank)
    expanded = z.repeat_interleave(repeats, dim=-1)[:, :out_features]
    expected = layer.B(z) + layer.residual_alpha / math.sqrt(repeats) * expanded
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    plain = layer.fold()
    assert not plain.residual and torch.equal(plain(x), layer(x))
    torch.testing.assert_close(plain.singular_values(), layer.singular_values())
    assert not torch.equal(plain.B.weight, layer.B.weight)


@pytest.mark.parametrize("method", [name for name in METHODS if make(name).splittable])
def test_parts_of_a_layer_give_its_latents_and_its_features(method: str):
    """Columns of A give parts of the latents, and rows of the others features, as processes that split it hold them."""
    layer = make(method)
    x = torch.randn(2, 5, 12, dtype=torch.float64)

    def part(first: int, count: int, of_right: bool) -> FactorizedLinear:
        found = copy.deepcopy(layer)
        for name, p in found.named_parameters():
            if (layer.roles[name] == "factor_right") == of_right:
                p.data = p.data.narrow(int(of_right), first, count).clone()
        return found

    pieces = [part(first, 4, True).latents(x[..., first : first + 4], first) for first in (0, 4, 8)]
    latents = torch.stack(pieces).sum(0)
    torch.testing.assert_close(latents, layer.latents(x), rtol=1e-12, atol=1e-12)
    features = [part(first, 5, False).expand(latents, first) for first in (0, 5)]
    torch.testing.assert_close(torch.cat(features, -1), layer(x), rtol=1e-12, atol=1e-12)


def test_a_class_with_a_forward_of_its_own_is_not_split_unless_it_says_so():
    class Gated(LowRankLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Louder(LowRankLinear):
        def expand(self, z: Tensor, first: int = 0) -> Tensor:
            return 2 * super().expand(z, first)

    assert not Gated.splittable and Louder.splittable
