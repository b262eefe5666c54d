"""From a transformers config to a factorized model on the meta device."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import hydra
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrtrain.config.choice import choice
from lrtrain.config.dtypes import parameter_dtype
from lrtrain.config.schema import Config
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.experts import FactorizedExperts
from lrtrain.model.architecture import architecture, check_keys, named, new_model
from lrtrain.model.attention import attention_for, check_loss, separate_attention
from lrtrain.model.counts import parameter_count
from lrtrain.model.experts import DenseExperts, dense_experts, replace_experts
from lrtrain.model.positions import raise_positions
from lrtrain.model.rank import RankPlan, factorized
from lrtrain.model.structure import linears, matrices


def make_model(
    config: Config, rank_plan: RankPlan | None = None, known: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model of the configuration, factorized as `param` says, on the meta device.

    Args:
        rank_plan: None: the one that `param.rank` gives.
        known: the transformers config as a checkpoint keeps it, so that what model.path names is not needed again,
            unless for its code.

    Raises:
        ConfigError: for what `build_model` refuses, and a parameter that the engine cannot hold.
    """
    model = config.model
    if known and not model.trust_remote_code:
        shape = architecture(None, known)
    else:
        shape = architecture(model.path, model.config, model.trust_remote_code)
        if model.path is None:
            check_keys(shape, model.config)
    raised = raise_positions(shape, config.data.seq_len)
    rank_plan = rank_plan or RankPlan(config.param["rank"])
    made = factorized_model(shape, config.param, rank_plan, parameter_dtype(config), config.data.document_mask)
    hydra.utils.get_object(config.engine["_target_"]).check_model(config, made)
    made.raised = raised  # pyright: ignore[reportArgumentType]  (`print_factorization` prints it)
    return made


def factorized_model(
    shape: PreTrainedConfig, param: dict[str, Any], rank_plan: RankPlan, dtype: torch.dtype, separate: bool = False
) -> PreTrainedModel:
    """The model of a transformers config, factorized according to `param`, with parameters of `dtype` on meta.

    `separate`: see `build_model`.
    """
    make_layer = choice(param) if param["_target_"] else None
    model = build_model(shape, make_layer, param["pattern"], rank_plan, separate)
    if zeros := param.get("zero_init"):
        found = [layer for name, layer in matrices(model, r"\.\d+\.").items() if re.search(zeros, name)]
        if dense := [name for name in dense_experts(model, zeros)]:
            raise ConfigError(
                f"param.zero_init={zeros} matches {dense[0]}, which is dense and is initialized by transformers"
            )
        if not found:
            raise ConfigError(f"param.zero_init={zeros} matches none of the layers")
        for layer in found:
            layer.starts_at_zero = True  # pyright: ignore[reportArgumentType]  (`materialize` reads it)
    for p in model.parameters():  # not the buffers: rotary frequencies need float32
        p.data = p.data.to(dtype)
    return model


def build_model(
    config: PreTrainedConfig,
    make_layer: Callable[..., FactorizedLinear] | None = None,
    pattern: str | None = None,
    rank_plan: RankPlan | None = None,
    separate: bool = False,
) -> PreTrainedModel:
    """The causal language model of `config` on meta, with linear layers and experts matching `pattern` factorized.

    Args:
        make_layer: called with in_features, out_features, bias, rank and device; None leaves the model dense.
        pattern: regular expression searched in each layer's qualified name.
        rank_plan: of the layers.
        separate: whether the documents of a row are not to see each other.

    Raises:
        ConfigError: if it is no causal language model, has a loss of its own, the pattern matches no linear, or a rank
            does not fit its layer.
    """
    attention = attention_for(config)
    if separate:
        attention = separate_attention(config)
    check_loss(config)
    try:
        with torch.device("meta"):
            model = new_model(config, attention)
    except Exception as error:  # whatever the model's code raises
        raise ConfigError(
            f"{named(config)} cannot be built from its config: {type(error).__name__}: {error}"
        ) from error
    for module in model.modules():
        if isinstance(module, Conv1D):  # as `nn.Linear` names them
            module.in_features, module.out_features = module.nx, module.nf  # pyright: ignore
    if make_layer is not None:
        assert pattern is not None and rank_plan is not None
        found = linears(model, pattern) | batchable_experts(model, pattern, make_layer)
        check_untied(model, found)
        for name, rank in rank_plan.ranks(parameter_count(model), found, make_layer).items():
            layer = factorized(found[name], make_layer, rank)
            if isinstance(layer, FactorizedExperts):
                replace_experts(model, name, layer)
            else:
                model.set_submodule(name, layer)
    return model


def check_untied(model: PreTrainedModel, found: Mapping[str, nn.Module]) -> None:
    """Check that none of the layers to factorize shares its weight with the embedding.

    Raises:
        ConfigError: if one does, since transformers would tie the embedding to a parameter of the factorized head.
    """
    shared = model.get_input_embeddings().weight
    for name, layer in found.items():
        if getattr(layer, "weight", None) is shared:
            raise ConfigError(
                f"param.pattern matches {name}, which is tied to the embedding; set "
                f"model.config.tie_word_embeddings=false, or a pattern that excludes {name}"
            )


def batchable_experts(
    model: PreTrainedModel, pattern: str, make_layer: Callable[..., FactorizedLinear]
) -> dict[str, DenseExperts]:
    """The experts' weights that match `pattern`, if the layer class can be batched; otherwise experts stay dense."""
    found = dense_experts(model, pattern)
    made = [factorized(experts, make_layer, 1) for experts in found.values()]
    return found if any(isinstance(layer, FactorizedExperts) and layer.one[0].batchable for layer in made) else {}
