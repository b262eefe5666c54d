"""The transformers config that `model` selects, and transformers' model for it."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lrtrain.errors import ConfigError

EXPERT_WIDTHS = 8
"""What widths of experts are multiples of, if torch's grouped product is to take them: 16 bytes, in bf16."""


def architecture(path: str | None, overrides: dict[str, Any], trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config: from `path` (a folder or hub name) or from `overrides` with its `model_type`.

    Code that comes with `path` is run only with `trust_remote_code`.

    Raises:
        ConfigError: if it cannot be loaded, or is not a config of a causal language model.
    """
    if path is None and "model_type" not in overrides:
        raise ConfigError(
            "model.path has no value; give a folder with a config.json or a name on the hub, or init_from"
        )
    try:
        if path is not None:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **overrides)
        else:
            config = AutoConfig.for_model(**overrides)
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = f"model.path={path}" if path is not None else f"model.config={overrides}"
        if "custom code" in str(error):
            raise ConfigError(f"{where} has its own Python code; model.trust_remote_code=true runs it") from error
        raise ConfigError(f"{where} is not a transformers model config: {str(error).splitlines()[0]}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping and not brings_code(config):
        raise ConfigError(f"model_type={config.model_type} has no causal language model in transformers")
    return config


def brings_code(config: PreTrainedConfig) -> bool:
    """Whether a config's class comes from its model folder, whose code was trusted and run."""
    return type(config).__module__.startswith("transformers_modules.")


def named(config: PreTrainedConfig) -> str:
    """The key and value that selected an architecture, for errors."""
    return (
        f"model.path={config.name_or_path}" if config.name_or_path else f"model.config.model_type={config.model_type}"
    )


def new_model(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """transformers' causal language model for a config, with float32 parameters on torch's default device."""
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=brings_code(config)
    )
    for module in model.modules():
        if computes_experts(module) and any(
            width % EXPERT_WIDTHS for p in module.parameters(recurse=False) if p.ndim == 3 for width in p.shape[1:]
        ):
            module.config._experts_implementation = "eager"
    return model


def computes_experts(module: Any) -> bool:
    """Whether a module computes its experts through transformers' interface, which lets other code do it."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")
