"""Export of a run's model to a folder, merged into dense weights or with its factors.

Weights go layer by layer from the checkpoint into safetensors files, with one layer in memory at a time.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lrtrain.checkpoint import safetensors_files
from lrtrain.checkpoint.card import card
from lrtrain.checkpoint.factorized_folder import config_with, description, write_description
from lrtrain.checkpoint.new_folder import new_folder
from lrtrain.checkpoint.published import PublishedParts
from lrtrain.checkpoint.version4 import readable_by_4
from lrtrain.checkpoint.weights import RunWeights, check_finite
from lrtrain.data.tokenizer import save_tokenizer
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.architecture import without_rescaling
from lrtrain.model.build import build_model
from lrtrain.model.structure import untied


def export_dense(run: RunWeights, out: Path, dtype: torch.dtype | None, most: int) -> None:
    """A plain transformers checkpoint with each factorized layer merged into its W.

    Args:
        out: a folder that does not exist.
        dtype: of the weights; None: as they were trained.
        most: bytes of a file.

    Raises:
        ConfigError: if a layer stands for no matrix, a value is not finite, the run's tokenizer cannot be read, or
            `out` exists.
    """
    for name, layer in run.layers.items():
        check_mergeable(name, layer)
    tokenizer, ids = tokenizer_of(run)
    config = run.model.config
    model = build_model(config)
    dtype = dtype or next(run.model.parameters()).dtype
    own = {"dtype": dtype, "architectures": [type(model).__name__], **begin_and_end(ids)}
    without_rescaling(config)
    written = readable_by_4(config, config_with(config, own))
    with new_folder(out) as folder:
        parts = PublishedParts(model, untied(model), run.dense)
        write_weights(folder, parts.shapes, parts.take, run, dtype, most)
        (folder / "config.json").write_text(json.dumps(written, indent=2))
        write_rest(folder, tokenizer, ids, card(run, False, sum(p.numel() for p in model.parameters())))


def check_mergeable(name: str, layer: FactorizedLinear) -> None:
    """Raises ConfigError with the reason if a layer (on meta) cannot be merged into one matrix."""
    try:
        layer.dense_weight()
    except NotImplementedError as error:
        raise ConfigError(f"{name} cannot be merged: {error}; --to hf-factorized keeps it as it is") from error


def export_factorized(run: RunWeights, out: Path, dtype: torch.dtype | None, most: int) -> None:
    """The factors as they are, and all that `lrtrain.load` builds the model from. Arguments as of `export_dense`."""
    tokenizer, ids = tokenizer_of(run)
    dtype = dtype or next(run.model.parameters()).dtype
    config = description(run.model, run.config.param, run.config.train.seed, run.meta.support_hash)
    config["architecture"] = config_with(run.model.config, {"dtype": dtype, **begin_and_end(ids)})
    with new_folder(out) as folder:
        write_description(folder, config)
        write_weights(folder, untied(run.model), run.tensor, run, dtype, most)
        write_rest(folder, tokenizer, ids, card(run, True, sum(p.numel() for p in run.model.parameters())))


def tokenizer_of(run: RunWeights) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """The run's tokenizer, with a token to pad with, and the ids of its special tokens by their keys in a config.

    Raises:
        ConfigError: if it cannot be read.
    """
    tokenizer = run.tokenizer()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer, {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def begin_and_end(ids: dict[str, Any]) -> dict[str, Any]:
    """The ids for config.json. That of padding stays the one that was trained with: RoBERTa counts positions from it,
    and transformers may set its embedding to zero when it loads a model."""
    return {key: value for key, value in ids.items() if key != "pad_token_id"}


def write_weights(
    folder: Path,
    shapes: Mapping[str, Tensor],
    produce: Callable[[str], Tensor],
    run: RunWeights,
    dtype: torch.dtype,
    most: int,
) -> None:
    """`produce(name)` in `dtype` for all names of `shapes` (on meta). Raises ConfigError for one that is not finite."""

    def in_dtype(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def checked(name: str) -> Tensor:
        tensor = in_dtype(produce(name))
        check_finite(name, tensor, run.checkpoint)
        return tensor

    safetensors_files.write(folder, {name: in_dtype(t) for name, t in shapes.items()}, checked, most)


def write_rest(folder: Path, tokenizer: PreTrainedTokenizerFast, ids: dict[str, Any], text: str) -> None:
    """Tokenizer, generation config and model card."""
    save_tokenizer(tokenizer, folder)
    GenerationConfig(**ids).save_pretrained(folder)
    (folder / "README.md").write_text(text)
