"""DLR's residual: exact, and folded into B without keeping what is folded."""

import math

import pytest
import torch
from torch import Tensor

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.layers.bottleneck import linear_with_residual


@pytest.mark.parametrize("out,rank", [(7, 3), (6, 3), (3, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_b_z_and_the_repeated_latents_with_their_gradients(out: int, rank: int, bias: bool):
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    z, left, offset = drawn(2, 5, rank), drawn(out, rank), drawn(out) if bias else None
    repeats = math.ceil(out / rank)
    expected = z @ left.T + 0.7 / math.sqrt(repeats) * z.repeat_interleave(repeats, -1)[..., :out]
    expected = expected + offset if offset is not None else expected
    torch.testing.assert_close(linear_with_residual(z, left, offset, 0.7), expected)
    inputs = [t for t in (z, left, offset) if t is not None]

    def of_inputs(z: Tensor, left: Tensor, offset: Tensor | None = None) -> Tensor:
        return linear_with_residual(z, left, offset, 0.7)

    assert torch.autograd.gradcheck(of_inputs, inputs)


def test_only_the_latents_are_kept_for_the_backward_pass():
    """Before and after the activation: 4 MiB for 1024 tokens at a shape of llama_1b, besides input and parameters."""
    layer = choice(compose("param=dlr").param)(in_features=2048, out_features=5461, bias=False, rank=512)
    x = torch.randn(1024, 2048)
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    assert sum(kept.values()) == 2 * 4 * 1024 * 512
    assert y.shape == (1024, 5461)
