"""A folder with a model's factors: its description files, and `save_pretrained` of a loaded model."""

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
"""The model_type in config.json of such a folder: unknown to transformers, which otherwise would load it as a dense
model with random weights."""


def config_with(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for a transformers config, with some values replaced. Infinite numbers are numbers,
    not transformers 5's names of them, which version 4 and the constructors of configs do not read."""
    changed = type(config).from_dict(config.to_dict() | changes)
    return changed._decode_special_floats(json.loads(changed.to_json_string()))


def description(model: PreTrainedModel, param: dict[str, Any], seed: int, support_hash: str) -> dict[str, Any]:
    """The content of lrtrain.json, from which `lrtrain.load` builds the model.

    Args:
        model: gives architecture and ranks; on any device.
    """
    return {
        "architecture": config_with(model.config, {"dtype": next(model.parameters()).dtype}),
        "param": param,
        "ranks": {name: layer.rank for name, layer in factorized_layers(model).items()},
        "seed": seed,
        "support_hash": support_hash,
    }


def write_description(folder: Path, config: dict[str, Any]) -> None:
    """Write the two files that describe a folder with factors."""
    (folder / "config.json").write_text(json.dumps(MARK | {"torch_dtype": config["architecture"]["dtype"]}, indent=2))
    (folder / FACTORIZED).write_text(json.dumps(config, indent=2))


def saves_its_factors(model: PreTrainedModel, param: dict[str, Any], seed: int, support_hash: str) -> None:
    """Give a loaded model a `save_pretrained` that writes what `lrtrain.load` reads: transformers' own would write the
    dense model's config.json next to the factors."""
    model.lrtrain = {"param": param, "seed": seed, "support_hash": support_hash}  # pyright: ignore[reportArgumentType]
    model.save_pretrained = MethodType(save_pretrained, model)  # pyright: ignore[reportAttributeAccessIssue]


def save_pretrained(
    self: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write the model for `lrtrain.load`, replacing existing files as in transformers.

    Args:
        is_main_process: if False, nothing is written.
        state_dict: values to write instead of the model's.
        max_shard_size: largest size of a file, in bytes.
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
