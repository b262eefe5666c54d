"""Products with blocks as operators: their math, what torch and Triton make of them, and when they are used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import BYTES, SHAPES
from test_sltrain import SLTRAIN
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lrtrain.errors import ConfigError
from lrtrain.layers import block_products
from lrtrain.layers.block_products import (
    block_add_,
    block_add_transposed_,
    block_sampled,
    lists_of,
    missing,
    transposed_lists,
)
from lrtrain.layers.sltrain_product import sltrain_linear
from lrtrain.layers.sparse_support import draw_rows, flat_positions

CUDA = torch.device("cuda")
B, OUT, IN, COUNT, TOKENS = 4, 12, 20, 2, 7


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """col, and float64 values, x and g."""
    generator = torch.Generator().manual_seed(seed)
    col = draw_rows(OUT // B, IN // B, COUNT, generator).to(torch.uint16)
    sizes = ((OUT * B * COUNT,), (TOKENS, IN), (TOKENS, OUT))
    return col, *(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)


@pytest.mark.parametrize("seed", range(5))
def test_sums_over_the_lists_of_block_columns_are_the_product_with_the_transpose(seed: int):
    col, values, x, g = drawn(seed)
    starts, entries = transposed_lists(col, IN // B)
    blocks = values.view(OUT // B, B, COUNT, B)
    dx = torch.zeros_like(x)
    for c in range(IN // B):  # as the kernel's programs
        for e in entries[starts[c] : starts[c + 1]].tolist():
            i, j = divmod(e, COUNT)
            assert int(col[i, j]) == c
            dx[:, c * B : (c + 1) * B] += g[:, i * B : (i + 1) * B] @ blocks[i, :, j]
    dense = torch.zeros(OUT * IN, dtype=torch.float64)
    dense[flat_positions(None, col, B, IN)] = values
    torch.testing.assert_close(dx, g @ dense.view(OUT, IN))
    assert entries.sort().values.tolist() == list(range(col.numel()))


def test_lists_are_made_once_and_again_when_the_support_changes():
    col = drawn()[0].int()
    lists = lists_of(col, IN // B)
    assert lists_of(col, IN // B)[1] is lists[1]
    col.copy_(col.flip(0))
    again = lists_of(col, IN // B)
    assert again[1] is not lists[1] and torch.equal(again[1], transposed_lists(col, IN // B)[1])


@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_those_of_finite_differences(seed: int):
    col, values, x, _ = drawn(seed)
    left, right = torch.randn(OUT, 3, dtype=torch.float64), torch.randn(3, IN, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, left, right, values))
    assert torch.autograd.gradcheck(lambda *t: sltrain_linear(*t, None, col, B, 0.7, "triton"), inputs)


def test_operators_pass_torchs_own_checks():
    col, values, x, g = drawn()
    torch.library.opcheck(block_add_, (g.clone(), values, col, B, x))
    torch.library.opcheck(block_add_transposed_, (x.clone(), values, col, B, g))
    torch.library.opcheck(block_sampled, (g, x, col, B))


def test_operators_run_on_fake_cuda_tensors_and_their_flops_are_counted():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        col = torch.empty(OUT // B, COUNT, dtype=torch.uint16, device=CUDA)
        values = torch.empty(OUT * B * COUNT, device=CUDA)
        x, g = torch.empty(TOKENS, IN, device=CUDA), torch.empty(TOKENS, OUT, device=CUDA)
        block_add_(g, values, col, B, x)
        block_add_transposed_(x, values, col, B, g)
        found = block_sampled(g, x, col, B)
    assert found.shape == values.shape and found.device.type == "cuda"
    assert counter.get_total_flops() == 3 * 2 * TOKENS * len(values)


@pytest.mark.parametrize(
    "block,dtype,device,installed,reason",
    [
        (32, torch.bfloat16, "cuda", True, None),
        (32, torch.float32, "cuda", True, None),
        (32, torch.float32, "cpu", True, "run on cuda, not on cpu"),
        (8, torch.bfloat16, "cuda", True, "blocks of 16, 32, 64, 128, not of 8"),
        (32, torch.float64, "cuda", True, "not torch.float64"),
        (32, torch.bfloat16, "cuda", False, "Triton is not installed"),
    ],
)
def test_it_says_why_there_are_no_kernels(block, dtype, device, installed, reason, monkeypatch):
    monkeypatch.setattr(block_products, "find_spec", lambda name: installed or None)
    found = missing(block, dtype, torch.device(device))
    assert found is None if reason is None else reason in str(found)


def test_auto_times_the_kernels_where_they_run_and_a_choice_that_cannot_run_is_refused(monkeypatch):
    timed = []
    monkeypatch.setattr("lrtrain.layers.sltrain.fastest", lambda what, device, passes: timed.extend(passes) or "triton")
    monkeypatch.setattr("lrtrain.layers.sltrain._training_pass", lambda *_: None)
    monkeypatch.setattr(block_products, "find_spec", lambda name: True)
    layer = SLTRAIN(64, 64, rank=4, density=0.5, support="block", block=32, execution="auto")
    assert layer.autotune(8, torch.bfloat16, CUDA) == "triton"
    assert timed == ["materialize", "factored", "triton"]
    for change, sentence in (({}, "run on cuda, not on cpu"), ({"support": "uniform"}, "are for param.support=block")):
        refused = SLTRAIN(
            64, 64, rank=4, density=0.5, execution="triton", **{"support": "block", "block": 32, **change}
        )
        with pytest.raises(ConfigError, match=f"param.execution=triton cannot run.*{sentence}"):
            refused.autotune(8, torch.float32, torch.device("cpu"))


# --- the kernels -------------------------------------------------------------------------------------------------


def kernels(*arguments: str) -> dict[str, dict]:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("kernel_cases.py")
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.full
def test_interpreted_kernels_agree_with_the_batched_products():
    found = kernels("interpret")
    assert len(found) == 3 * len(SHAPES)
    assert not {(case, kernel): e for case, errors in found.items() for kernel, e in errors.items() if not e < 2e-6}


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_compile_for_gpus_and_fit_into_their_shared_memory(architecture: str):
    found = kernels(architecture)
    for case, of_kernels in found.items():
        for kernel, figures in of_kernels.items():
            where = f"{kernel}, {case}: {figures}"
            assert figures["binary"] and figures["shared"] <= BYTES and not figures["spills"], where
            assert figures["ahead"], where  # loads overlap with products
