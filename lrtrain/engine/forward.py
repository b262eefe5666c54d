"""A sharded dense model for forward passes only."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from lrtrain.distributed.sharding import keep_shard
from lrtrain.distributed.world import World
from lrtrain.engine.fsdp import device_mesh, sharded_units
from lrtrain.model.init import materialize
from lrtrain.model.structure import first_names


@torch.no_grad()
def dense_model(model: PreTrainedModel, read: Callable[[str], Tensor], seed: int, world: World) -> PreTrainedModel:
    """The model (on meta) sharded block by block, with values `read(name)`, in eval mode; a collective."""
    firsts = first_names(model)
    if world.size > 1:
        for unit in (*sharded_units(model), model):
            fully_shard(unit, mesh=device_mesh(world, 1))
    materialize(model, seed, world.device, fresh=False)
    for name, tensor in model.state_dict().items():
        keep_shard(tensor, read(firsts[name]))
    return model.eval()
