"""A run's model in a folder of its own, for others to load: merged into plain weights, or with its factors.

Layer by layer from the checkpoint into safetensors: one layer is in memory at a time, whatever the model's size.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from lrtrain.checkpoint import safetensors_files
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.build import build_model
from lrtrain.model.structure import untied

FACTORIZED = "lrtrain.json"
"""The configuration of an export with factors. It is no config.json, from which transformers would take such a folder
for the dense model and draw the weights that it misses."""


def export_dense(run: RunWeights, out: Path, dtype: torch.dtype | None, most: int) -> None:
    """A plain transformers checkpoint with each factorized layer merged into its W.

    Args:
        out: a folder that does not exist.
        dtype: of the weights; None: as they were trained.
        most: bytes of a file.

    Raises:
        ConfigError: if a layer stands for no matrix, or `out` exists.
    """
    for name, layer in run.layers.items():
        check_mergeable(name, layer)
    config = run.model.config
    model = build_model(config, None, None, None)
    dtype = dtype or next(run.model.parameters()).dtype
    own = {"dtype": dtype, "architectures": [type(model).__name__]}
    _write(run, out, model, dtype, most, run.dense, "config.json", config_with(config, own))


def check_mergeable(name: str, layer: FactorizedLinear) -> None:
    """Raises ConfigError with the reason where a layer (on meta) stands for no matrix."""
    try:
        layer.dense_weight()
    except NotImplementedError as error:
        raise ConfigError(f"{name} cannot be merged: {error}; --to hf-factorized keeps it as it is") from error


def export_factorized(run: RunWeights, out: Path, dtype: torch.dtype | None, most: int) -> None:
    """The factors as they are, and all that `lrtrain.load` builds the model from. Arguments as of `export_dense`."""
    dtype = dtype or next(run.model.parameters()).dtype
    config = {
        "architecture": config_with(run.model.config, {"dtype": dtype}),
        "param": run.config.param,
        "ranks": {name: layer.rank for name, layer in run.layers.items()},
        "seed": run.config.train.seed,
        "support_hash": run.meta.support_hash,
    }
    _write(run, out, run.model, dtype, most, run.tensor, FACTORIZED, config)


def config_with(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """A transformers config as its file has it, with some values replaced."""
    changed = type(config).from_dict(config.to_dict() | changes)
    return json.loads(changed.to_json_string())


def _write(
    run: RunWeights,
    out: Path,
    model: PreTrainedModel,
    dtype: torch.dtype,
    most: int,
    produce: Callable[[str], Tensor],
    config_name: str,
    config: dict[str, Any],
) -> None:
    """All files of an export; the folder gets its name when it is complete."""
    if out.exists():
        raise ConfigError(f"--out {out} exists; choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)

    def in_dtype(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    tensors = {name: in_dtype(tensor) for name, tensor in untied(model).items()}
    safetensors_files.write(partial, tensors, lambda name: in_dtype(produce(name)), most)
    tokenizer = AutoTokenizer.from_pretrained(run.run_dir / "tokenizer")
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config.get("architecture", config).update(ids)
    (partial / config_name).write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(partial)
    GenerationConfig(**ids).save_pretrained(partial)
    partial.rename(out)
