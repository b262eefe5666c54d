"""The transformers config that `model` selects, and transformers' model for it."""

import difflib
from collections.abc import Collection
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lrtrain.errors import ConfigError

ROTARY = ("rope_theta", "partial_rotary_factor")
"""Keys of older configs that are in `rope_parameters` now."""

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
            found: Any = AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **overrides
            )
            config, unused = found
        else:
            config, unused = AutoConfig.for_model(**overrides), {}
    except Exception as error:  # whatever the config's code raises
        where = f"model.path={path}" if path is not None else f"model.config={overrides}"
        if "custom code" in str(error):
            raise ConfigError(f"{where} has its own Python code; model.trust_remote_code=true runs it") from error
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error  # which names only its validator
        why = str(cause or error).splitlines()[0]
        raise ConfigError(f"{where} is not a transformers model config: {why}") from error
    if unused:
        raise ConfigError(f"{unknown_key([*unused][0], config)} of model.path={path}")
    if type(config) not in AutoModelForCausalLM._model_mapping and not brings_code(config):
        raise ConfigError(f"model_type={config.model_type} has no causal language model in transformers")
    heads, key_heads = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(key_heads, int) and key_heads > 0 and heads % key_heads:
        raise ConfigError(f"model.config.num_key_value_heads={key_heads} does not divide the {heads} attention heads")
    return config


def check_keys(config: PreTrainedConfig, keys: Collection[str]) -> None:
    """Raises ConfigError for a key that transformers keeps in a config of a new model without reading it."""
    plain = type(config)()
    for key in keys:
        if hasattr(config, key) and not hasattr(plain, key):
            raise ConfigError(f"{unknown_key(key, config)} of model_type={config.model_type}")


def unknown_key(key: str, config: PreTrainedConfig) -> str:
    """`model.config.hiden_size (did you mean hidden_size?) is not a key of the config`"""
    near = difflib.get_close_matches(key, {*type(config)().to_dict()} - {key}, n=1)
    if key in ROTARY:
        near = ["rope_parameters"]
    return f"model.config.{key}{f' (did you mean {near[0]}?)' if near else ''} is not a key of the config"


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
    if getattr(config, "rescale_every", 0):  # RWKV would change its weights in place at each evaluation
        config.rescale_every = 0
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=brings_code(config)
    )
    for module in model.modules():
        if computes_experts(module) and any(
            width % EXPERT_WIDTHS for p in module.parameters(recurse=False) if p.ndim == 3 for width in p.shape[1:]
        ):
            module.config._experts_implementation = "eager"
    return model


def without_rescaling(config: PreTrainedConfig) -> None:
    """Unset what would make transformers rescale trained weights: RWKV's in evaluation, and Mamba's, which its
    `from_pretrained` scales as if they were initial values."""
    for key, value in (("rescale_every", 0), ("rescale_prenorm_residual", False)):
        if hasattr(config, key):
            setattr(config, key, value)


def computes_experts(module: Any) -> bool:
    """Whether a module computes its experts through transformers' interface, which lets other code do it."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")
