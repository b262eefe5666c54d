"""The source weights of `init_from`: a transformers folder (or hub name), or an lrtrain run or checkpoint."""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel

from lrtrain.checkpoint.factorized_folder import FACTORIZED
from lrtrain.checkpoint.published import from_published, published
from lrtrain.checkpoint.safetensors_files import SafetensorsFolder
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.errors import ConfigError
from lrtrain.model.structure import first_names

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*"]


class Origin(Protocol):
    """Tensors of a dense model's state by name, unsharded, on the CPU."""

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor; raises KeyError for an unknown name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        ...


def open_origin(path: str, dense: PreTrainedModel, trusted: Collection[str]) -> Origin:
    """The source weights at `init_from`.

    Args:
        dense: the dense form of the model to initialize; on meta.
        trusted: see `from_stored`.

    Raises:
        ConfigError: if they cannot be loaded, or would run code that is not trusted.
    """
    folder = local_folder(path)
    if (folder / FACTORIZED).is_file():
        raise ConfigError(f"init_from={path} has factors of its own; to go on with them use resume=<its run>")
    if (folder / "config.json").is_file():
        return FolderOrigin(folder, dense)
    return RunOrigin(RunWeights(folder, trusted))


def local_folder(path: str) -> Path:
    """The folder at `path`, or the downloaded folder of the hub model of this name."""
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
    """A transformers checkpoint, also of a bare decoder (whose names lack the model's prefix).

    Args:
        dense: the dense form of the model to initialize; on meta.
    """

    def __init__(self, folder: Path, dense: PreTrainedModel):
        self.files = SafetensorsFolder(folder)
        self.dense = dense
        self.state = dense.state_dict()

    def shape(self, name: str) -> torch.Size:
        if found := self._found(name):
            return self.files.shape(found)
        parts = published(self.dense, name, self.state[name])
        if any(self.files.shape(part) != like.shape for part, like in parts.items()):
            raise KeyError(name)
        return self.state[name].shape

    def tensor(self, name: str) -> Tensor:
        if found := self._found(name):
            return self.files.tensor(found)
        return from_published(self.dense, name, self.state[name], self.files.tensor)

    def _found(self, name: str) -> str | None:
        """The name of a tensor in the files; None if they do not have it."""
        return next((one for one in (name, name.partition(".")[2]) if one in self.files.files), None)


class RunOrigin:
    """A run's model with its layers merged."""

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
    """Check that source weights have each tensor of a dense model (on meta) with the same shape.

    Raises:
        ConfigError: if not, naming the first that is missing or differs.
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
