"""A model to evaluate and generate with: from a run, a checkpoint, an export, or any transformers folder."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lrtrain.checkpoint.factorized_folder import FACTORIZED, saves_its_factors
from lrtrain.checkpoint.safetensors_files import SafetensorsFolder
from lrtrain.checkpoint.weights import RunWeights, check_finite
from lrtrain.config.stored import check_stored_targets
from lrtrain.data.tokenizer import read_tokenizer
from lrtrain.distributed.sharding import keep_shard
from lrtrain.errors import ConfigError
from lrtrain.model.architecture import architecture, without_rescaling
from lrtrain.model.attention import PLAIN, attention_for
from lrtrain.model.build import factorized_model
from lrtrain.model.init import materialize
from lrtrain.model.rank import RankPlan
from lrtrain.model.structure import factorized_layers, untied
from lrtrain.model.supports import support_hash


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    run: RunWeights | None
    """The run that it comes from, if it was read from one."""


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    trusted: Collection[str] = (),
) -> Loaded:
    """The model at `path` and its tokenizer.

    Args:
        path: a run's directory, one of its checkpoints, an export, or a transformers folder.
        dtype: of the parameters; None: as they were saved.
        trusted: what may run besides the classes of lrtrain and transformers: `_target_`s that the model names, and
            the path of a model that brings code.

    Raises:
        ConfigError: if there is none of these, if its tokenizer cannot be read, if its weights are not exactly those of
            its architecture or not finite, or for code that is not trusted.
    """
    model, run = load_model(path, device, dtype, trusted)
    if run:
        return Loaded(model, run.tokenizer(), run)
    return Loaded(model, read_tokenizer(path, f"the tokenizer in {path}", str(path) in trusted), None)


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    trusted: Collection[str] = (),
) -> tuple[PreTrainedModel, RunWeights | None]:
    """The model at `path`, in eval mode, and the run that it was read from. Arguments as of `load`; no tokenizer is
    needed."""
    path, device = Path(path), torch.device(device)
    run = None
    if (path / FACTORIZED).is_file():
        model = load_factorized(path, device, dtype, trusted)
    elif (path / "config.json").is_file():
        model = load_dense(path, device, dtype, str(path) in trusted)
    else:
        run = RunWeights(path, trusted)
        model = load_run(run, device, dtype)
    for name, tensor in model.state_dict().items():
        check_finite(name, tensor, path)
    return ready(model), run


def load_run(run: RunWeights, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a checkpoint."""
    model = run.model
    for p in model.parameters():
        p.data = p.data.to(dtype or p.dtype)
    fill(model, run.tensor, run.config.train.seed, device)
    if run.layers:
        saves_its_factors(model, run.config.param, run.config.train.seed, run.meta.support_hash)
    return model


def load_dense(path: Path, device: torch.device, dtype: torch.dtype | None, trusted: bool) -> PreTrainedModel:
    """The model of a transformers folder."""
    settings = {"dtype": dtype or "auto", "device_map": {"": device}, "trust_remote_code": trusted}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
        without_rescaling(config)
        settings |= {"config": config, "attn_implementation": attention_for(config, PLAIN)}  # some choose by it now
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **settings
        )
        model, found = loaded
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path} holds no model that transformers loads: {reason}") from error
    check_names(path, type(model).__name__, found["missing_keys"], found["unexpected_keys"])
    return model


def check_names(path: Path, model: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raises ConfigError if a folder lacks tensors of its model, or has others."""
    if missing or unexpected:
        wrong = [f"lacks {few(missing)}"] * bool(missing) + [f"has also {few(unexpected)}"] * bool(unexpected)
        raise ConfigError(f"{path} does not hold the weights of its {model}: it {' and '.join(wrong)}")


def few(names: Collection[str]) -> str:
    """The first of them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def load_factorized(
    path: Path, device: torch.device, dtype: torch.dtype | None, trusted: Collection[str] = ()
) -> PreTrainedModel:
    """The model of an export that keeps its factors."""
    try:
        config = json.loads((path / FACTORIZED).read_text())
        param, seed, written_hash = config["param"], config["seed"], config["support_hash"]
        saved: torch.dtype = getattr(torch, config["architecture"]["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path / FACTORIZED} is damaged: {error!r}") from error
    check_stored_targets({"param": param}, str(path / FACTORIZED), trusted)
    shape = architecture(None, config["architecture"])
    model = factorized_model(shape, param, RankPlan(param["rank"], config["ranks"]), dtype or saved)
    files, wanted = SafetensorsFolder(path), untied(model).keys()
    check_names(path, type(model).__name__, wanted - files.files.keys(), files.files.keys() - wanted)
    fill(model, files.tensor, seed, device)
    if support_hash(model) != written_hash:
        raise ConfigError(f"{path} was trained with other sparse supports than its seed gives here")
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    saves_its_factors(model, param, seed, written_hash)
    return model


@torch.no_grad()
def fill(model: PreTrainedModel, read: Callable[[str], Tensor], seed: int, device: torch.device) -> None:
    """Give a model on meta its storage and values: `read(name)` of what is saved, the rest from the seed."""
    materialize(model, seed, device, fresh=False)
    for name, tensor in untied(model).items():
        keep_shard(tensor, read(name))


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """In eval mode, with an attention that heeds masks and caches."""
    model.set_attn_implementation(attention_for(model.config, PLAIN))
    without_rescaling(model.config)
    for layer in factorized_layers(model).values():
        layer.execution = None  # what was fastest for a training step
    return model.eval()
