"""A folder with a model's factors: what says how to build the model, and saving one that was loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lrtrain.checkpoint import safetensors_files
from lrtrain.model.structure import factorized_layers, untied

FACTORIZED = "lrtrain.json"
"""Architecture, `param` section, ranks and seed."""

MARK = {"model_type": "lrtrain", "how_to_load": "lrtrain.load(FOLDER)"}
"""The config.json of such a folder: transformers has no such type and says so, where it would draw the weights of a
dense model that it misses."""


def config_with(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """A transformers config as its file has it, with some values replaced."""
    changed = type(config).from_dict(config.to_dict() | changes)
    return json.loads(changed.to_json_string())


def description(model: PreTrainedModel, param: dict[str, Any], seed: int, support_hash: str) -> dict[str, Any]:
    """What `lrtrain.load` builds the model from.

    Args:
        model: of the architecture and the ranks; on any device.
    """
    return {
        "architecture": config_with(model.config, {"dtype": next(model.parameters()).dtype}),
        "param": param,
        "ranks": {name: layer.rank for name, layer in factorized_layers(model).items()},
        "seed": seed,
        "support_hash": support_hash,
    }


def write_description(folder: Path, config: dict[str, Any]) -> None:
    """The two files that make a folder one with factors."""
    (folder / "config.json").write_text(json.dumps(MARK | {"torch_dtype": config["architecture"]["dtype"]}, indent=2))
    (folder / FACTORIZED).write_text(json.dumps(config, indent=2))


def saves_its_factors(model: PreTrainedModel, param: dict[str, Any], seed: int, support_hash: str) -> None:
    """Give a loaded model a `save_pretrained` that writes what `lrtrain.load` reads: transformers' own would write the
    config.json of the dense model beside the factors."""
    model.lrtrain = {"param": param, "seed": seed, "support_hash": support_hash}  # pyright: ignore[reportArgumentType]
    model.save_pretrained = MethodType(save_pretrained, model)  # pyright: ignore[reportAttributeAccessIssue]


def save_pretrained(
    self: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write the model so that `lrtrain.load` reads it; as of transformers, what is there is replaced.

    Args:
        is_main_process: others write nothing.
        state_dict: the values, if they are not the model's own.
        max_shard_size: bytes of a file.
    """
    if not is_main_process:
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    write_description(folder, description(self, **self.lrtrain))  # pyright: ignore[reportCallIssue]
    values = self.state_dict() if state_dict is None else state_dict
    tensors = {name: values[name] for name in untied(self)}
    safetensors_files.write(folder, tensors, tensors.__getitem__, max_shard_size)
    if self.generation_config is not None:
        self.generation_config.save_pretrained(folder)
