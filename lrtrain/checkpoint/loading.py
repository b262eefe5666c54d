"""A model to evaluate and generate with: from a run, a checkpoint, an export, or any transformers folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lrtrain.checkpoint.export import FACTORIZED
from lrtrain.checkpoint.safetensors_files import SafetensorsFolder
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.distributed.sharding import keep_shard
from lrtrain.errors import ConfigError
from lrtrain.model.build import architecture, factorized_model
from lrtrain.model.init import materialize
from lrtrain.model.structure import factorized_layers, untied
from lrtrain.model.supports import support_hash


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    run: RunWeights | None
    """The run that it comes from, if it was read from one."""


def load(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Loaded:
    """The model at `path` and its tokenizer.

    Args:
        path: a run's directory, one of its checkpoints, an export, or a transformers folder.
        dtype: of the parameters; None: as they were saved.

    Raises:
        ConfigError: if there is none of these.
    """
    path, device = Path(path), torch.device(device)
    if (path / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", device_map={"": device})
    elif (path / FACTORIZED).is_file():
        model = load_factorized(path, device, dtype)
    else:
        run = RunWeights(path)
        model = run.model
        for p in model.parameters():
            p.data = p.data.to(dtype or p.dtype)
        fill(model, run.tensor, run.config.train.seed, device)
        return Loaded(ready(model), AutoTokenizer.from_pretrained(run.run_dir / "tokenizer"), run)
    return Loaded(ready(model), AutoTokenizer.from_pretrained(path), None)


def load_factorized(path: Path, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of an export that keeps its factors."""
    config = json.loads((path / FACTORIZED).read_text())
    shape = architecture(None, config["architecture"])
    saved: torch.dtype = getattr(torch, config["architecture"]["dtype"])
    model = factorized_model(shape, config["param"], config["ranks"], dtype or saved)
    fill(model, SafetensorsFolder(path).tensor, config["seed"], device)
    if support_hash(model) != config["support_hash"]:
        raise ConfigError(f"{path} was trained with other sparse supports than its seed gives here")
    model.generation_config = GenerationConfig.from_pretrained(path)
    return model


@torch.no_grad()
def fill(model: PreTrainedModel, read: Callable[[str], Tensor], seed: int, device: torch.device) -> None:
    """Give a model on meta its storage and values: `read(name)` of what is saved, the rest from the seed."""
    materialize(model, seed, device, fresh=False)
    for name, tensor in untied(model).items():
        keep_shard(tensor, read(name))


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """In eval mode, with an attention that heeds masks and caches."""
    model.set_attn_implementation("sdpa")
    for layer in factorized_layers(model).values():
        layer.execution = None  # what was fastest for a training step
    return model.eval()
