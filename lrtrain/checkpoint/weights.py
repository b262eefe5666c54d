"""The weights of a run, read from a checkpoint layer by layer on one process.

Checkpoints of all engines and numbers of processes have the same form: unsharded shapes under qualified names.
"""

import copy
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lrtrain.checkpoint.checkpointer import find_checkpoint
from lrtrain.checkpoint.meta import CheckpointMeta, read_meta
from lrtrain.checkpoint.reader import TensorPlanner, TensorReader
from lrtrain.config.compose import from_stored
from lrtrain.config.schema import Config
from lrtrain.core.seeds import generator_for
from lrtrain.data.tokenizer import read_tokenizer
from lrtrain.distributed.sharding import take_over
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.build import make_model
from lrtrain.model.rank import RankPlan
from lrtrain.model.structure import factorized_layers
from lrtrain.model.supports import hash_of_supports


def check_finite(name: str, tensor: Tensor, where: Path) -> None:
    """Raises ConfigError if a tensor holds NaN or infinite values."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ConfigError(f"{where} holds NaN or infinite values in {name}; choose an earlier checkpoint")


class RunWeights:
    """What a checkpoint holds of its model.

    Args:
        path: a run's directory (its newest checkpoint is taken) or one of its checkpoints.
        trusted: see `from_stored`.

    Raises:
        ConfigError: if there is no undamaged checkpoint, or the seed gives other sparse supports than it was trained
        with.
    """

    def __init__(self, path: Path, trusted: Collection[str] = ()):
        self.checkpoint = find_checkpoint(path, "")
        self.meta: CheckpointMeta = read_meta(self.checkpoint)
        self.config: Config = from_stored(self.meta.config, self.checkpoint, trusted, self.meta.home.folders)
        rank_plan = RankPlan(self.config.param["rank"], self.meta.ranks)
        self.model: PreTrainedModel = make_model(self.config, rank_plan, self.meta.architecture)
        """On meta."""
        self.layers = factorized_layers(self.model)
        self.reader = TensorReader(self.checkpoint)
        stored = self.reader.read_metadata().state_dict_metadata
        self.dtypes = {
            name.removeprefix("model."): found.properties.dtype
            for name, found in stored.items()
            if name.startswith("model.") and isinstance(found, TensorStorageMetadata)
        }
        if hash_of_supports((name, self.support(name)) for name in self.layers) != self.meta.support_hash:
            raise ConfigError(f"{self.checkpoint} was trained with other sparse supports than its seed gives here")

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self.checkpoint.parent.parent

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The run's tokenizer. Raises ConfigError if it cannot be read; resuming the run rewrites it."""
        folder = self.run_dir / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(f"the run's tokenizer in {folder} is missing; resuming the run rewrites it")
        return read_tokenizer(folder, f"the run's tokenizer in {folder}")

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Unsharded tensors of the model's state by name, as they were saved, on the CPU."""
        shapes = self.model.state_dict()
        found = {f"model.{name}": torch.empty(shapes[name].shape, dtype=self.dtypes[name]) for name in names}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(found, storage_reader=self.reader, planner=TensorPlanner(), no_dist=True)
        return {name.removeprefix("model."): tensor for name, tensor in found.items()}

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        return self.tensors([name])[name]

    def support(self, name: str) -> dict[str, Tensor]:
        """The buffers of a factorized layer that are regenerated from the seed."""
        return self.layers[name].init_buffers(generator_for(self.config.train.seed, f"{name}/buffers"))

    @torch.no_grad()
    def layer(self, name: str) -> FactorizedLinear:
        """A factorized layer with its values, in float32, on the CPU."""
        layer = copy.deepcopy(self.layers[name]).float().to_empty(device="cpu")
        saved = self.tensors(f"{name}.{key}" for key in layer.state_dict())
        take_over(layer, {key.removeprefix(f"{name}."): value for key, value in saved.items()} | self.support(name))
        return layer

    @torch.no_grad()
    def dense(self, name: str) -> Tensor:
        """A tensor of the dense model's state by name. The weight of a factorized layer is its W in float32, transposed
        if the dense layer stores it as (in, out).

        Raises:
            NotImplementedError: if the layer cannot be merged into one matrix.
        """
        parent, _, key = name.rpartition(".")
        if name in self.layers:  # experts
            weight = self.layer(name).dense_weight()
            return weight.mT.contiguous() if self.layers[name].transposed else weight
        if parent not in self.layers:
            return self.tensor(name)
        if key == "weight":
            weight = self.layer(parent).dense_weight()
            return weight.T.contiguous() if self.layers[parent].transposed else weight
        own = next(own for own, role in self.layers[parent].roles.items() if role == "bias")
        return self.tensor(f"{parent}.{own}")
