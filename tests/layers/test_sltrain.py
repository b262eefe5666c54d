"""SLTrain: its supports, executions and starts."""

import math
from functools import partial

import pytest
import torch
from test_layers import make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrtrain.errors import ConfigError
from lrtrain.layers import autotune as fastest
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.layers.sltrain import SLTrainLinear, low_rank_scale
from lrtrain.layers.sltrain_product import compose
from lrtrain.layers.sparse_support import flat_positions
from lrtrain.linalg.initial import gaussian_spectrum

VARIANTS = [
    "sltrain-materialize",
    "sltrain-factored",
    "sltrain-row-balanced-materialize",
    "sltrain-row-balanced",
    "sltrain-block-materialize",
    "sltrain-block",
    "sltrain-block-triton",
]
FACTORED = ["sltrain-factored", "sltrain-row-balanced", "sltrain-block", "sltrain-block-triton"]
SUPPORTS = ["uniform", "row_balanced", "block"]
CPU = torch.device("cpu")
SLTRAIN = partial(
    SLTrainLinear,
    bias=False,
    support="uniform",
    block=2,
    alpha=1.0,
    scale="const",
    execution="factored",
    init="published",
    init_std=0.02,
    select="random",
    rebalance_at=None,
)


def filled(layer: SLTrainLinear) -> SLTrainLinear:
    """The layer as a run starts it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in layer.init_parameters(generator).items():
            layer.get_parameter(name).copy_(value)
        for name, value in layer.init_buffers(generator).items():
            layer.get_buffer(name).copy_(value)
    return layer


# --- the map and its gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", VARIANTS)
def test_backward_equals_autograd_of_the_composed_expression(method: str):
    layer = make(method, in_features=20, out_features=16, bias=False)
    x = torch.randn(9, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(9, 16, dtype=torch.float64)
    inputs = (x, *layer.parameters())
    found = torch.autograd.grad(layer(x), inputs, g)
    positions = flat_positions(layer.crow, layer.col, layer.block, 20)
    sparse = torch.zeros(16 * 20, dtype=torch.float64).index_put((positions,), layer.values).view(16, 20)
    weight = layer.scale * layer.B.weight @ layer.A.weight + sparse
    expected = torch.autograd.grad(x @ weight.T, inputs, g)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", VARIANTS)
def test_no_matrix_of_the_dense_shape_is_saved(method: str):
    layer = make(method, in_features=64, out_features=64, rank=2, bias=False)
    saved = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(torch.randn(3, 64, dtype=torch.float64))
    assert saved and max(saved) < 64 * 64


class Largest(TorchDispatchMode):
    """Notes the most elements that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("method", VARIANTS)
def test_factored_execution_never_forms_a_matrix_of_the_dense_shape(method: str):
    layer = make(method, in_features=64, out_features=64, rank=2, bias=False)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    with Largest() as largest:
        layer(x).sum().backward()
    assert (largest.elements < 64 * 64) == (method in FACTORED)


def test_block_runs_in_bfloat16():
    layer = make("sltrain-block", in_features=64, out_features=32).bfloat16()
    x = torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    expected = x.detach().float() @ layer.dense_weight().float().T + layer.B.bias.float()
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("support", SUPPORTS)
def test_without_values_at_full_rank_it_is_any_dense_layer(support: str):
    weight = torch.randn(6, 8, dtype=torch.float64)
    layer = filled(SLTRAIN(8, 6, rank=6, density=0.0, support=support)).double()
    dense = LowRankLinear.from_dense(weight, 6)
    layer.load_state_dict(dense.state_dict() | {"values": torch.empty(0)})
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], weight.sum(0).expand(4, 8))


@pytest.mark.parametrize("support", ["uniform", "row_balanced"])
def test_with_every_value_it_is_any_dense_layer(support: str):
    weight = torch.randn(6, 8)
    layer = filled(SLTRAIN(8, 6, rank=2, density=1.0, support=support))  # B = 0
    with torch.no_grad():
        layer.values.copy_(weight.flatten())
    torch.testing.assert_close(layer.dense_weight(), weight)


# --- the support -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "support,values", [("uniform", math.floor(0.03 * 192 * 448)), ("row_balanced", 192 * 13), ("block", 6 * 32 * 32)]
)
def test_number_of_values_and_bytes_follow_the_formulas(support: str, values: int):
    layer = SLTRAIN(448, 192, rank=4, density=0.03, support=support, block=32)
    assert layer.nnz == layer.values.numel() == values
    formula = {"uniform": 4 * (192 + 1) + 2 * values, "row_balanced": 2 * values, "block": 2 * values // 32**2}
    assert sum(b.numel() * b.element_size() for b in layer.buffers()) == formula[support]
    assert layer.flops(10) == 20 * (4 * (448 + 192) + values)
    assert not layer.state_dict().keys() & {"crow", "col"}


@pytest.mark.parametrize("support", SUPPORTS)
def test_columns_beyond_sixteen_bits(support: str):
    layer = filled(SLTRAIN(2**16 + 64, 4, rank=1, density=0.001, support=support))
    blocks_fit = support == "block"  # 32,800 blocks of two columns
    assert layer.col.dtype == (torch.uint16 if blocks_fit else torch.int32)
    x = torch.randn(2, 2**16 + 64)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T)


@pytest.mark.parametrize("support", SUPPORTS)
def test_the_support_is_a_function_of_the_generator(support: str):
    layer = SLTRAIN(64, 32, rank=4, density=0.2, support=support)
    first, again, other = (layer.init_buffers(torch.Generator().manual_seed(s))["col"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


@pytest.mark.parametrize("support", SUPPORTS)
def test_starts_as_published(support: str):
    layer = SLTrainLinear(
        512, 256, True, 128, 0.03, support, 8, 32.0, "alpha_over_r", "materialize", "random", "published", 0.02, None
    )
    state = layer.init_parameters(torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(512)
    assert layer.scale == 0.25 and layer.nnz == len(state["values"])
    assert layer.nnz == pytest.approx(0.03 * 256 * 512, rel=0.05)
    assert not state["B.weight"].any()
    for name in ("A.weight", "values"):
        assert state[name].abs().max() <= bound
        assert state[name].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    # composed, a unit-variance input gives an output of std √(δ/3) = 0.10
    buffers = layer.init_buffers(torch.Generator().manual_seed(0))
    crow, col = buffers.get("crow"), buffers["col"]
    weight = compose(state["B.weight"], state["A.weight"], state["values"], crow, col, layer.block, layer.scale)
    assert (torch.randn(4096, 512) @ weight.T).std().item() == pytest.approx(0.1, rel=0.05)


def test_a_spectral_start_changes_the_low_rank_part_alone():
    published, spectral = (
        SLTrainLinear(
            96, 64, True, 16, 0.1, "uniform", 1, 4.0, "alpha_over_r", "materialize", "random", init, 0.05, None
        )
        for init in ("published", "spectral")
    )
    before, after = (layer.init_parameters(torch.Generator().manual_seed(0)) for layer in (published, spectral))
    assert torch.equal(before["values"], after["values"])
    sigma = torch.linalg.svdvals(spectral.scale * (after["B.weight"] @ after["A.weight"]).double())
    torch.testing.assert_close(sigma[:16], gaussian_spectrum(64, 96, 0.05)[:16], rtol=1e-5, atol=0)
    assert sigma[16:].max() < 1e-6
    torch.testing.assert_close(after["B.weight"].norm(), after["A.weight"].norm())


def test_scale_rules():
    assert low_rank_scale(32, 128, "alpha_over_r") == 0.25
    assert low_rank_scale(32, 256, "alpha_over_sqrt_r") == 2.0
    assert low_rank_scale(0.25, 64, "const") == low_rank_scale(0.25, 512, "const") == 0.25


# --- choosing the execution --------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty memory of measurements, and the list of what was timed."""
    monkeypatch.setenv("LRTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest, "SECONDS", 0.0)
    timed = []
    monkeypatch.setattr(fastest, "seconds", lambda run, device: timed.append(run) or float(len(timed) % 2))
    return timed


AUTO = partial(SLTRAIN, 64, 64, rank=4, density=0.05, execution="auto")


def test_auto_takes_the_faster_and_remembers_it(memory: list):
    chosen = AUTO().autotune(128, torch.float32, CPU)
    assert chosen == "factored" and len(memory) == 2 * fastest.ROUNDS  # the second of each round took no time
    assert AUTO().autotune(128, torch.float32, CPU) == chosen and len(memory) == 2 * fastest.ROUNDS


@pytest.mark.parametrize(
    "change,tokens", [({}, 129), ({"rank": 5}, 128), ({"density": 0.06}, 128), ({"support": "row_balanced"}, 128)]
)
def test_auto_measures_anew_what_it_does_not_know(memory: list, change: dict, tokens: int):
    AUTO().autotune(128, torch.float32, CPU)
    before = len(memory)
    AUTO(**change).autotune(tokens, torch.float32, CPU)
    assert len(memory) == 2 * before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_memory_is_measured_again(memory: list, text: str):
    fastest.memory_path().write_text(text)
    AUTO().autotune(128, torch.float32, CPU)
    before = len(memory)
    AUTO().autotune(128, torch.float32, CPU)
    assert before == len(memory) > 0


def test_an_unknown_answer_in_the_memory_is_measured_again(memory: list):
    AUTO().autotune(128, torch.float32, CPU)
    path = fastest.memory_path()
    path.write_text(path.read_text().replace("factored", "magic"))
    assert AUTO().autotune(128, torch.float32, CPU) == "factored" and len(memory) == 4 * fastest.ROUNDS


def test_measuring_runs_both_executions(tmp_path, monkeypatch):
    monkeypatch.setenv("LRTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest, "SECONDS", 0.0)
    assert AUTO().autotune(16, torch.float32, CPU) in ("materialize", "factored")
    block = AUTO(support="block")
    assert block.autotune(16, torch.bfloat16, CPU) in ("materialize", "factored")


def test_where_there_is_no_kernel_auto_materializes_and_factored_is_refused(memory: list):
    assert AUTO().autotune(128, torch.bfloat16, CPU) == "materialize" and not memory
    with pytest.raises(ConfigError, match="param.execution=factored"):
        AUTO(execution="factored").autotune(128, torch.bfloat16, CPU)
    assert AUTO(execution="factored", support="block").autotune(128, torch.bfloat16, CPU) == "factored"


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"support": "block", "block": 1}, "param.block=1"),
        ({"support": "block", "block": 32}, "param.block=32.*5461×2048.*5461 to 5472.*param.support=row_balanced"),
    ],
)
def test_it_names_what_is_wrong(change: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        SLTRAIN(2048, 5461, rank=2, device="meta", **{"density": 0.1, **change})
