"""Spectra of whole models: names, summaries, and the same values however the model is sharded."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from crew import together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lrtrain import distributed
from lrtrain.config.compose import compose
from lrtrain.core.metrics import spelled
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.lost import LOSTLinear
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.measure.monitor import check_patterns
from lrtrain.measure.shards import sends_gram
from lrtrain.measure.weights import (
    LinearLayer,
    matching,
    part_metrics,
    spectra_metrics,
    tail_metrics,
    too_large,
    weight_estimates,
    weight_spectra,
)
from lrtrain.model.build import make_model


class Block(nn.Module):
    """Two factorized layers and a dense one; 13 does not divide by two processes."""

    def __init__(self):
        super().__init__()
        own = {"init": "xavier", "init_std": 0.02, "residual": False, "residual_alpha": 1.0, "rebalance_at": None}
        self.q_proj = LowRankLinear(12, 20, bias=False, rank=5, **own)
        self.up_proj = LowRankLinear(12, 32, bias=True, rank=13, **own)
        self.down_proj = nn.Linear(32, 12, bias=False)
        self.gate_proj = LOSTLinear(12, 32, False, 3, 0.25, 0.7, "none", "svd_l2", None, 0.02)
        self.gate_proj.load_state_dict(self.gate_proj.init_parameters(torch.Generator().manual_seed(0)))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block())


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    projections = ("q_proj", "up_proj", "down_proj", "gate_proj")
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(projections) and isinstance(module, LowRankLinear | LOSTLinear | nn.Linear)
    }


def test_spectra_equal_the_svd_of_each_matrix_in_the_models_order():
    model = small_model()
    layers = linear_layers(model)
    spectra = weight_spectra(layers)
    assert list(spectra) == list(layers)
    for name, sigma in spectra.items():
        layer = layers[name]
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.dense_weight()
        exact = torch.linalg.svdvals(weight.detach().double())[: len(sigma)]
        torch.testing.assert_close(sigma, exact, rtol=1e-5, atol=1e-8)


def test_measuring_leaves_the_model_as_it_was():
    model = small_model()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    weight_spectra(linear_layers(model))
    for name, p in model.named_parameters():
        assert id(p) == before[name][0] and p.requires_grad
        assert torch.equal(p, before[name][1])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_with_sharded_weights_get_the_spectra_of_one(tmp_path: Path, processes: int):
    together(measure_sharded, (tmp_path,), tmp_path, processes)
    layers = linear_layers(small_model())
    alone = weight_spectra(layers)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for found in results:
        assert list(found["spectra"]) == list(alone)
        for name, sigma in alone.items():
            torch.testing.assert_close(found["spectra"][name], sigma, rtol=1e-9, atol=1e-12)
    parts = spelled(part_metrics(layers)[0])
    assert results[0]["parts"] == results[-1]["parts"] == pytest.approx(parts, rel=1e-9)

    # All but the owner send: a Gram without its lower half in float64, or their share of B's rows in float32.
    # Not that of up_proj, whose 13 columns are more than its 12 inputs.
    assert {name[2:] for name in results[0]["by_gram"]} == {"q_proj", "gate_proj"}
    saved = 0
    for name in results[0]["by_gram"]:
        k, rows = len(alone[name]), -(-layers[name].out_features // processes)
        saved += (processes - 1) * (4 * rows * k - 4 * k * (k + 1))
    sent = {way: sum(found[way] for found in results) for way in ("sent", "sent_as_rows")}
    assert sent["sent_as_rows"] - sent["sent"] == saved > 0


def test_head_and_tail_are_told_of_the_chosen_sparse_plus_low_rank_layers_alone():
    layers = linear_layers(small_model())
    found, arrays = part_metrics(matching(layers, r"^1\."))
    metrics = spelled(found)
    of_layers = {name.split("/")[1] for name in metrics if not name.startswith("spectra/summary/")}
    assert of_layers == {"1.gate_proj"}
    names = ("head_share", "tail_share", "head_share_null", "tail_share_null", "sparse_over_low_rank")
    assert {name.rpartition("/")[2] for name in metrics if name.startswith("spectra/1.")} == set(names)
    assert metrics["spectra/summary/gate_proj/head_share_mean"] == metrics["spectra/1.gate_proj/head_share"]
    assert matching(layers, None) == {}
    parts = ("low_rank", "sparse", "low_rank_null", "sparse_null")
    assert set(arrays) == {f"1.gate_proj/{part}" for part in parts}
    whole = torch.linalg.svdvals(layers["1.gate_proj"].dense_weight().detach().double())
    for null in ("", "_null"):
        both = arrays[f"1.gate_proj/low_rank{null}"] + arrays[f"1.gate_proj/sparse{null}"]
        assert both.shape == whole.shape and bool(null) != torch.allclose(both, whole, rtol=1e-5, atol=1e-6)


def test_large_matrices_are_estimated_under_names_that_say_so():
    layers = linear_layers(small_model())
    large = too_large(layers, 11)
    assert {name[2:] for name in large} == {"up_proj", "down_proj"}  # by the factors' rank, or the shorter side
    assert too_large(layers, None) == {}
    metrics = spelled(spectra_metrics({}, weight_estimates(large)))
    exact = spelled(spectra_metrics(weight_spectra(large)))
    for name in large:
        for metric in ("nuclear_norm", "erank"):
            of = f"spectra/{name}/{metric}"
            stderr = metrics[f"{of}_estimated_stderr"]
            assert of not in metrics and metrics[f"{of}_estimated"] == pytest.approx(exact[of], abs=4 * stderr + 1e-6)
    assert metrics["spectra_meta/nonfinite"] == metrics["spectra_meta/zero_matrices"] == 0


def test_tails_are_held_against_noise():
    torch.manual_seed(0)
    own = {"init": "xavier", "init_std": 0.02, "residual": False, "residual_alpha": 1.0, "rebalance_at": None}
    product, noise, planted = (
        LowRankLinear(90, 100, bias=False, rank=60, **own), nn.Linear(90, 120), nn.Linear(90, 120),
    )  # fmt: skip
    product.load_state_dict(product.init_parameters(torch.Generator().manual_seed(0)))
    with torch.no_grad():
        planted.weight += torch.randn(120, 2) @ torch.randn(2, 90)  # two directions that noise does not explain
    layers: dict[str, LinearLayer] = {"0.q_proj": product, "0.up_proj": noise, "1.up_proj": planted}
    metrics = spelled(tail_metrics(layers, weight_spectra(layers)))
    assert [metrics[f"spectra/{name}/spikes"] for name in layers] == [pytest.approx(0, abs=1), 0, 2]
    assert metrics["spectra/1.up_proj/mp_soft_rank"] < 0.1 < metrics["spectra/0.up_proj/mp_soft_rank"]
    assert "spectra/0.q_proj/mp_soft_rank" not in metrics and metrics["spectra/0.q_proj/alpha"] > 1


def test_bfloat16_weights_are_measured_in_more():
    model = small_model()
    rounded = {name: layer.bfloat16() for name, layer in linear_layers(model).items()}
    found = weight_spectra(rounded)
    for name, sigma in found.items():
        layer = rounded[name].float()
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.dense_weight()
        exact = torch.linalg.svdvals(weight.detach().double())[: len(sigma)]
        torch.testing.assert_close(sigma, exact, rtol=1e-5, atol=1e-7)


def measure_sharded(folder: Path) -> None:
    world = distributed.start()
    model = small_model()
    mesh = init_device_mesh("cpu", (world.size,))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    layers = linear_layers(model)
    factorized = {name: layer for name, layer in layers.items() if isinstance(layer, FactorizedLinear)}
    found: dict[str, Any] = {"by_gram": [name for name, layer in factorized.items() if sends_gram(layer)]}
    with counted() as sent:
        found["spectra"] = weight_spectra(layers)
    with counted() as sent_as_rows, patch("lrtrain.measure.weights.sends_gram", lambda layer: False):
        weight_spectra(layers)
    found |= {"sent": sum(sent), "sent_as_rows": sum(sent_as_rows), "parts": spelled(part_metrics(layers)[0])}
    torch.save(found, folder / f"{world.dist_rank}.pt")
    with torch.no_grad():
        model.get_parameter("0.q_proj.B.weight").zero_()  # no Gram resolves what it is a factor of
    assert weight_spectra(layers)["0.q_proj"].tolist() == [0.0] * 5
    distributed.stop()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of all that this process sends to the owner of a layer."""
    sent: list[int] = []

    def counting(collective):
        def call(tensor, *args, **kwargs):
            owner = args[1] if len(args) > 1 else kwargs.get("dst", args[0] if args else None)
            sent.append(tensor.nbytes * (owner != dist.get_rank()))
            return collective(tensor, *args, **kwargs)

        return call

    with patch.object(dist, "gather", counting(dist.gather)), patch.object(dist, "reduce", counting(dist.reduce)):
        yield sent


def test_metrics_are_named_by_layer_and_averaged_by_projection():
    metrics = spelled(
        spectra_metrics(
            {
                "layers.0.q_proj": torch.tensor([2.0, 2.0]),
                "layers.1.q_proj": torch.tensor([4.0, 0.0]),
                "layers.1.up_proj": torch.tensor([1.0, 1.0, 1.0, 1.0]),
            }
        )
    )
    assert metrics["spectra/layers.0.q_proj/erank"] == pytest.approx(2)
    assert metrics["spectra/layers.1.q_proj/erank_rel"] == pytest.approx(0.5)
    assert metrics["spectra/summary/q_proj/erank_mean"] == pytest.approx(1.5)
    assert metrics["spectra/summary/q_proj/spectral_norm_mean"] == pytest.approx(3)
    assert metrics["spectra/summary/all/erank_mean"] == pytest.approx((2 + 1 + 4) / 3)
    assert all(math.isfinite(value) for value in metrics.values())


def test_zero_and_broken_matrices_are_counted_and_left_out_of_the_means():
    metrics = spelled(
        spectra_metrics(
            {
                "0.q_proj": torch.zeros(3),
                "1.q_proj": torch.full((3,), math.nan),
                "2.q_proj": torch.ones(3),
            }
        )
    )
    assert metrics["spectra_meta/zero_matrices"] == 1
    assert metrics["spectra_meta/nonfinite"] == 1
    assert metrics["spectra/summary/q_proj/erank_mean"] == pytest.approx(3)
    assert metrics["spectra/summary/q_proj/spectral_norm_mean"] == pytest.approx(0.5)
    assert "spectra/0.q_proj/erank" not in metrics
    assert "spectra/1.q_proj/spectral_norm" not in metrics


@pytest.mark.parametrize("key", ["parts", "tails", "gradients", "updates"])
def test_a_pattern_that_finds_no_layer_is_refused(key: str):
    for pattern, fits in (("gate_proj", True), ("gate_prj", False)):
        config = compose("model=llama_tiny", "param=dense", f"spectra.{key}={pattern}")
        with nullcontext() if fits else pytest.raises(ConfigError, match=rf"^spectra.{key}=gate_prj matches none of"):
            check_patterns(config, make_model(config))
