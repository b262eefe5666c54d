"""Spectra of whole models: names, summaries, and the same values however the model is sharded."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from lrtrain.layers.lost import LOSTLinear
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.spectra.weights import LinearLayer, matching, part_metrics, spectra_metrics, weight_spectra


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


def test_two_processes_with_sharded_weights_get_the_spectra_of_one(tmp_path: Path):
    spawn(_measure_sharded, args=(str(tmp_path),), nprocs=2)
    alone = weight_spectra(linear_layers(small_model()))
    for rank in range(2):
        sharded = torch.load(tmp_path / f"{rank}.pt")
        assert list(sharded) == list(alone)
        for name, sigma in alone.items():
            torch.testing.assert_close(sharded[name], sigma, rtol=1e-9, atol=1e-12)
    parts = part_metrics(linear_layers(small_model()))
    assert torch.load(tmp_path / "parts0.pt") == torch.load(tmp_path / "parts1.pt") == pytest.approx(parts, rel=1e-9)


def test_head_and_tail_are_told_of_the_chosen_sparse_plus_low_rank_layers_alone():
    layers = linear_layers(small_model())
    metrics = part_metrics(matching(layers, r"^1\."))
    of_layers = {name.split("/")[1] for name in metrics if not name.startswith("spectra/summary/")}
    assert of_layers == {"1.gate_proj"}
    names = ("head_share", "tail_share", "head_share_null", "tail_share_null", "sparse_over_low_rank")
    assert {name.rpartition("/")[2] for name in metrics if name.startswith("spectra/1.")} == set(names)
    assert metrics["spectra/summary/gate_proj/head_share_mean"] == metrics["spectra/1.gate_proj/head_share"]
    assert matching(layers, None) == {}


def test_bfloat16_weights_are_measured_in_more():
    model = small_model()
    rounded = {name: layer.bfloat16() for name, layer in linear_layers(model).items()}
    found = weight_spectra(rounded)
    for name, sigma in found.items():
        layer = rounded[name].float()
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.dense_weight()
        exact = torch.linalg.svdvals(weight.detach().double())[: len(sigma)]
        torch.testing.assert_close(sigma, exact, rtol=1e-5, atol=1e-7)


def _measure_sharded(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = small_model()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.save(weight_spectra(linear_layers(model)), f"{folder}/{rank}.pt")
    torch.save(part_metrics(linear_layers(model)), f"{folder}/parts{rank}.pt")
    dist.destroy_process_group()


def test_metrics_are_named_by_layer_and_averaged_by_projection():
    metrics = spectra_metrics(
        {
            "layers.0.q_proj": torch.tensor([2.0, 2.0]),
            "layers.1.q_proj": torch.tensor([4.0, 0.0]),
            "layers.1.up_proj": torch.tensor([1.0, 1.0, 1.0, 1.0]),
        }
    )
    assert metrics["spectra/layers.0.q_proj/erank"] == pytest.approx(2)
    assert metrics["spectra/layers.1.q_proj/erank_rel"] == pytest.approx(0.5)
    assert metrics["spectra/summary/q_proj/erank_mean"] == pytest.approx(1.5)
    assert metrics["spectra/summary/q_proj/spectral_norm_mean"] == pytest.approx(3)
    assert metrics["spectra/summary/all/erank_mean"] == pytest.approx((2 + 1 + 4) / 3)
    assert all(math.isfinite(value) for value in metrics.values())


def test_zero_and_broken_matrices_are_counted_and_left_out_of_the_means():
    metrics = spectra_metrics(
        {
            "0.q_proj": torch.zeros(3),
            "1.q_proj": torch.full((3,), math.nan),
            "2.q_proj": torch.ones(3),
        }
    )
    assert metrics["spectra_meta/zero_matrices"] == 1
    assert metrics["spectra_meta/nonfinite"] == 1
    assert metrics["spectra/summary/q_proj/erank_mean"] == pytest.approx(3)
    assert metrics["spectra/summary/q_proj/spectral_norm_mean"] == pytest.approx(0.5)
    assert "spectra/0.q_proj/erank" not in metrics
    assert "spectra/1.q_proj/spectral_norm" not in metrics
