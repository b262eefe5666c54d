"""Trained weights that a run starts from: a transformers folder (or hub name), or a run or checkpoint of ours."""

from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel

from lrtrain.checkpoint.factorized_folder import FACTORIZED
from lrtrain.checkpoint.safetensors_files import SafetensorsFolder
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.errors import ConfigError
from lrtrain.model.structure import first_names

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*"]


class Origin(Protocol):
    """Tensors of a dense model's state, by the name there, whole, on the CPU."""

    def shape(self, name: str) -> torch.Size:
        """Of one of them; raises KeyError if there is none."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        ...


def open_origin(path: str) -> Origin:
    """What `init_from` names.

    Raises:
        ConfigError: if it cannot be had.
    """
    folder = local_folder(path)
    if (folder / FACTORIZED).is_file():
        raise ConfigError(f"init_from={path} has factors of its own; to go on with them use resume=<its run>")
    if (folder / "config.json").is_file():
        return FolderOrigin(folder)
    return RunOrigin(RunWeights(folder))


def local_folder(path: str) -> Path:
    """The folder at `path`, or that of a hub's model of this name, downloaded once."""
    if Path(path).exists():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"init_from={path} is no folder, and no model of the hub that can be had: {reason}"
        ) from error


class FolderOrigin:
    """A transformers checkpoint; of a bare decoder's, whose names lack the model's prefix, too."""

    def __init__(self, folder: Path):
        self.files = SafetensorsFolder(folder)

    def shape(self, name: str) -> torch.Size:
        return self.files.shape(self._name(name))

    def tensor(self, name: str) -> Tensor:
        return self.files.tensor(self._name(name))

    def _name(self, name: str) -> str:
        return name if name in self.files.files else name.partition(".")[2]


class RunOrigin:
    """A run's model, its layers merged."""

    def __init__(self, run: RunWeights):
        self.run = run

    def shape(self, name: str) -> torch.Size:
        parent, _, key = name.rpartition(".")
        if layer := self.run.layers.get(name):  # experts
            shape = (
                (layer.in_features, layer.out_features) if layer.transposed else (layer.out_features, layer.in_features)
            )
            return torch.Size((layer.batch, *shape))
        if layer := self.run.layers.get(parent):
            weight = (layer.out_features, layer.in_features)
            return torch.Size((weight[::-1] if layer.transposed else weight) if key == "weight" else weight[:1])
        return self.run.model.state_dict()[name].shape

    def tensor(self, name: str) -> Tensor:
        return self.run.dense(name)


def check_origin(path: str, origin: Origin, dense: PreTrainedModel) -> None:
    """Check that an origin has each tensor of a dense model (on meta) in its shape.

    Raises:
        ConfigError: naming the first that it has not.
    """
    firsts = first_names(dense)
    for name, tensor in dense.state_dict().items():
        try:
            found = origin.shape(firsts[name])
        except KeyError as error:
            raise ConfigError(f"init_from={path} has no {name}, which the model has; choose the same model") from error
        if found != tensor.shape:
            raise ConfigError(
                f"init_from={path} has {name} of shape {'×'.join(map(str, found))}, the model of shape "
                f"{'×'.join(map(str, tensor.shape))}; choose the same model"
            )
