"""Layers that one rank each computes with: whole on one rank at a time, and on no rank more than one."""

import copy
import time
import weakref
from pathlib import Path

import pytest
import torch
from crew import together
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrtrain import distributed
from lrtrain.distributed.per_layer import compute_layers_across_ranks
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.measure.gradients import GradientSpectra
from lrtrain.measure.movement import Movement
from lrtrain.measure.weights import weight_estimates, weight_spectra

SHAPES = [(64, 64), (63, 65), (64, 64), (5, 900), (64, 64)]  # (out, in); 63 and 5 rows are not even shares
DISTINCT = [(40, 70), (44, 66), (36, 90), (50, 62), (38, 74)]  # told apart by their sizes, their Grams too


class LargestHeld(TorchDispatchMode):
    """Counts how many pieces of memory of `size` bytes or more, made under it, are alive at the same time."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.most, self.made = size, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                self.made.append(weakref.ref(tensor))
        alive = {tensor.untyped_storage().data_ptr() for made in self.made if (tensor := made()) is not None}
        self.most = max(self.most, len(alive))
        return out


class LayersHeld(TorchDispatchMode):
    """Counts of how many layers whole matrices, of any dtype and made under it, are alive at the same time."""

    def __init__(self):
        super().__init__()
        self.together, self.made = 0, []
        self.sizes = {
            rows * n: (m, n) for m, n in (*DISTINCT, (84, 52)) for rows in (m, -(-m // 2) * 2, -(-m // 4) * 4)
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):  # those hold shards
                size = tensor.untyped_storage().nbytes() // tensor.itemsize
                if size in self.sizes:
                    self.made.append(weakref.ref(tensor))
        for _ in range(20):  # gloo's threads let go of what was sent a moment after it is there
            if self._count() <= max(1, self.together):
                break
            time.sleep(0.05)
        self.together = max(self.together, self._count())
        return out

    def _count(self) -> int:
        """Layers of which something whole is alive."""
        self.made = [made for made in self.made if made() is not None]
        alive = [tensor for made in self.made if (tensor := made()) is not None]
        return len({self.sizes[t.untyped_storage().nbytes() // t.itemsize] for t in alive})


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_process_holds_more_than_one_whole_layer(tmp_path: Path, replicas: int, dtype: torch.dtype):
    together(deal, (replicas, dtype), tmp_path, 4)


def deal(replicas: int, dtype: torch.dtype) -> None:
    world = distributed.start()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(shape[1], shape[0], bias=True, dtype=dtype) for shape in SHAPES))
    expected = [{key: p.detach().clone() for key, p in layer.named_parameters()} for layer in model]
    mesh = init_device_mesh("cpu", (replicas, 4 // replicas), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh if replicas > 1 else mesh["shard"])
    computed = []

    def compute(name: str, layer: nn.Module) -> dict[str, torch.Tensor]:
        computed.append(name)
        for key, p in layer.named_parameters():
            assert torch.equal(p, expected[int(name)][key])
        return {"sum": layer.get_parameter("weight").sum(dtype=torch.float64)}

    with LargestHeld(4096 * dtype.itemsize - 8) as held:
        found = dict(compute_layers_across_ranks(dict(model.named_children()), compute))
    weights = [parameters["weight"] for parameters in expected]
    assert [found[name]["sum"] for name in found] == [weight.sum(dtype=torch.float64) for weight in weights]
    assert computed == [str(i) for i in range(len(SHAPES)) if i % 4 == world.dist_rank]
    assert held.most == 1
    if dtype == torch.float32:
        _measure_everything(mesh if replicas > 1 else mesh["shard"])
    distributed.stop()


def _measure_everything(mesh: DeviceMesh) -> None:
    """Weights, estimates, gradients and updates hold whole matrices of one layer at a time."""
    own = {"init": "xavier", "init_std": 0.02, "residual": False, "residual_alpha": 1.0, "rebalance_at": None}
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(shape[1], shape[0]) for shape in DISTINCT), LowRankLinear(52, 84, False, 8, **own)
    )
    start = copy.deepcopy(model)
    fully_shard(model, mesh=mesh)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    layers = dict(model.named_children())
    movement, gradients = Movement(lambda name: start[int(name)]), GradientSpectra()
    for measure in (weight_spectra, weight_estimates, gradients.measure, movement.measure, movement.measure):
        with LayersHeld() as held:
            measure(layers)  # pyright: ignore[reportArgumentType]
        assert held.together == 1, measure
