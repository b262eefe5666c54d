"""What tensor parallelism supports."""

from typing import cast

import hydra
from torch import nn
from transformers import PreTrainedModel

from lrtrain.config.schema import Config
from lrtrain.engine.tensor import parts_of
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.attention import CAUSAL
from lrtrain.model.structure import blocks

MODEL_TYPES = ("llama",)


def check_split(config: Config, processes: int) -> None:
    """Check the keys of a configuration with `engine.tensor` > 1.

    Args:
        processes: of one replica.

    Raises:
        ConfigError: if something is not supported, naming the keys and what would be right.
    """
    tensor, length, optim = config.engine["tensor"], config.data.seq_len, config.optim
    if processes % tensor:
        raise ConfigError(f"engine.tensor={tensor} does not divide the {processes} processes of a replica")
    if length % tensor:
        raise ConfigError(f"engine.tensor={tensor} does not divide data.seq_len={length}, whose tokens it cuts")
    optimizer = hydra.utils.get_object(optim["_target_"])  # a class, or a function that makes one
    if not getattr(optimizer, "elementwise_shardable", False):
        raise ConfigError(
            f"optim={optim['name']} needs whole rows of matrices, but engine.tensor={tensor} also cuts columns; use "
            f"optim=adamw or engine.tensor=1"
        )
    refused = {
        "train.dtype=bf16_sr": config.train.dtype == "bf16_sr",
        "train.compile=true": config.train.compile,
        "train.recompute_keep=bottleneck": config.train.recompute_keep == "bottleneck",
        "data.document_mask=true": config.data.document_mask,
        f"spectra.hidden={config.spectra.hidden}": config.spectra.hidden and config.spectra.every,
    }
    for setting, asked in refused.items():
        if asked:
            raise ConfigError(f"{setting} is not supported with engine.tensor={tensor}; use engine.tensor=1")


def check_model_split(config: Config, model: nn.Module) -> None:
    """Check a model (on meta) for `engine.tensor` > 1.

    Raises:
        ConfigError: if it cannot be split, naming the keys and what would be right.
    """
    tensor, shape = config.engine["tensor"], cast(PreTrainedModel, model).config
    if shape.model_type not in MODEL_TYPES or shape._attn_implementation != CAUSAL:
        raise ConfigError(
            f"engine.tensor={tensor} splits models of model_type={' or '.join(MODEL_TYPES)}, not {shape.model_type}; "
            "use engine.tensor=1"
        )
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (count := getattr(shape, key)) % tensor:
            raise ConfigError(f"engine.tensor={tensor} does not divide model.config.{key}={count}")
    for block in blocks(model):
        for readers, writer in parts_of(block):
            for layer in (*readers, writer):
                if isinstance(layer, FactorizedLinear) and not layer.splittable:
                    raise ConfigError(
                        f"param={config.param['name']} cannot be split over engine.tensor={tensor} processes; use "
                        "engine.tensor=1, or param=lowrank, cola, dlr, nested, lost or dense"
                    )
