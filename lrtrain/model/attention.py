"""Which attention trains an architecture as transformers itself would: tried on a small copy of it, once.

transformers' eager attention with its own masks is the truth. Masks cost time, and to make them transformers looks at
the positions, which stalls a GPU in every forward pass; where no mask is needed none is made.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lrtrain.core.cache import cache_folder, fingerprint, make_shared
from lrtrain.core.memo import read_memo, write_memo
from lrtrain.errors import ConfigError
from lrtrain.model.architecture import named, new_model
from lrtrain.model.counts import parameter_count
from lrtrain.model.loss import has_other_terms

# Every token attends to all before it. Under a name that transformers has no mask function for it makes no mask.
CAUSAL = "lrtrain_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)

PLAIN = ("sdpa", "eager")
"""transformers' own implementations, which heed masks and caches."""

CHOICES = (CAUSAL, *PLAIN)
"""What is tried for training, the cheapest first."""

KNOWN = (LlamaConfig, OPTConfig)
"""Configs whose every model attends to all earlier tokens and nothing else, so that nothing is tried."""

LENGTH = 48
"""Tokens of the sequence that is tried; more than `WINDOW`."""
NARROWEST = 4
"""What a width is divided to at the least; all stay even."""
WINDOW = 16
"""Tokens that a sliding window or a chunk of attention has at the most in the small copy."""
TOLERANCE = 1e-3
"""Of logits, relative to their standard deviation: rounding in float32 stays below it, another mask is far above."""
VOCABULARY = 512
"""Tokens that the small copy knows at the most."""
EXACT = 1e-6
"""Of gradients that a mask makes zero, relative to the others."""
LARGEST = 5e8
"""Parameters of a copy at the most."""
TRIED = 2
"""Counts the changes of what is tried: verdicts of an older version do not hold."""

WIDTHS = re.compile(
    r"(^|_)(size|sizes|dim|dims|width|rank|embd|head|model|ff|kv|inner|ssm|channels)(_per_layer_input)?$"
)
NO_WIDTHS = re.compile(r"vocab|window|chunk|kernel|state|block|patch|image|group|num_|^n_(head|kv)")
DEPTH = re.compile(r"^(num_hidden_layers|num_(decoder_)?layers|n_layers?|num_blocks)$")
DEPTHS = (4, 8, 16)
"""Layers of the small copy, if all kinds of layers are among them."""
NUMBERS = re.compile(r"^_|layer_idx|layer_id|index$|layer_num|^training$")
"""Attributes of modules that count them."""
WINDOWS = re.compile(r"(window|window_size|attention_chunk_size)$")


def attention_for(config: PreTrainedConfig, choices: Sequence[str] = CHOICES) -> str:
    """The first of the attention implementations whose logits are those of transformers' eager one.

    What was found is kept in the cache.

    Raises:
        ConfigError: if the model does not run on token ids alone, or earlier logits depend on a later token.
    """
    if type(config) in KNOWN:
        return choices[0]
    found = _kept(config, choices)
    if "refused" in found:
        raise ConfigError(f"{named(config)} is no causal language model of token ids alone: {found['refused']}")
    return found["attention"]


def check_loss(config: PreTrainedConfig) -> None:
    """Raises ConfigError if transformers trains the model with terms that `TokenLoss` has not."""
    if type(config) not in KNOWN and "other_terms" in _kept(config, CHOICES):
        raise ConfigError(
            f"{named(config)} has in transformers more terms in its loss, such as a z-loss, than cross-entropy and a "
            "router's auxiliary loss, which are all that is trained here; set their coefficients to 0"
        )


def _kept(config: PreTrainedConfig, choices: Sequence[str]) -> dict[str, str]:
    """What `_tried` finds, from the cache if it is there."""
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    versions = (transformers.__version__, torch.__version__)
    key = fingerprint(kind, config.to_json_string(use_diff=False), list(choices), versions, TOLERANCE, DEPTHS, TRIED)
    path = cache_folder() / "attention" / f"{key}.json"
    if not (found := read_memo(path)):
        found = _tried(config, choices)
        with suppress(OSError):
            make_shared(path.parent)
            write_memo(path, found)
    return found


def _tried(config: PreTrainedConfig, choices: Sequence[str]) -> dict[str, str]:
    """The `attention`, or why the model is `refused`; and `other_terms` if its own loss has some."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            small, model, rows = _small_copy(config)
            leaks = _sees_later_tokens(model, rows)
            loss = {"other_terms": "yes"} if has_other_terms(model, rows) else {}
        except Exception as error:  # whatever the model's code raises
            reason = (str(error).strip().splitlines() or [""])[0]
            return {"refused": f"it does not run ({type(error).__name__}: {reason})"}
        if leaks:
            return {"refused": "its predictions depend on later tokens"}
        logits = _logits(model, rows)
        for choice in choices:
            with suppress(Exception):  # what a class says of a name that it does not know is not specified
                other = new_model(copy.deepcopy(small), choice).eval()
                other.load_state_dict(model.state_dict())
                if not _differ(_logits(other, rows), logits):
                    return {"attention": choice} | loss
    return {"attention": "eager"} | loss


def _sees_later_tokens(model: PreTrainedModel, rows: Tensor) -> bool:
    """Whether logits of the first half have a gradient to embeddings of the second, which a mask makes exactly zero, or
    change whenever its tokens do, as where experts choose among all of them (once or twice they may by rounding, where
    two experts are almost equal)."""
    half = LENGTH // 2
    with torch.enable_grad():
        embedded: list[Tensor] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
        logits = _logits(model, rows)[:, :half]
        hook.remove()
        (gradient,) = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), embedded[:1])
    by_token = gradient.reshape(LENGTH, -1).abs()  # some models have the sequence first
    if not by_token[half:].max() <= EXACT * by_token[:half].max():
        return True
    changed = (torch.cat([rows[:, :half], rows[:, half:].roll(i, 1)], 1) for i in (1, 2, 3))
    return all(_differ(_logits(model, other)[:, :half], logits) for other in changed)


def _small_copy(config: PreTrainedConfig) -> tuple[PreTrainedConfig, PreTrainedModel, Tensor]:
    """The config with as narrow layers as its class allows and as few as have all kinds, its model with eager
    attention, and a sequence (1, LENGTH).

    All heads and experts stay, and what they are; windows and the vocabulary become small.
    """
    for factor in (128, 64, 32, 16, 8, 4, 2, 1):
        try:
            small = _shallow(type(config).from_dict(narrowed(config.to_dict(), factor)))
            if (size := parameter_count(_on_meta(small))) > LARGEST:
                raise ValueError(f"{size:,} parameters are too many to try, and narrower it does not run")
            model = _rough_model(small)
            rows = torch.randint(min(3, VOCABULARY), small.get_text_config().vocab_size, (1, LENGTH))
            _logits(model, rows)
            return small, model, rows
        except Exception:
            if factor == 1:
                raise
    raise AssertionError


def _shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with the fewest layers, of those tried, that are of as many kinds."""
    kinds = _kinds_of_layers(config)
    for layers in DEPTHS:
        with suppress(Exception):  # patterns of layers that cannot be cut
            fewer = type(config).from_dict(shortened(config.to_dict(), layers))
            if _kinds_of_layers(fewer) == kinds:
                return fewer
    return config


def _kinds_of_layers(config: PreTrainedConfig) -> set[Any]:
    """What tells the modules of a config's layers from each other, and the values that it lists for each layer."""
    simple = (str, int, type(None))
    return {
        (type(module), *((key, value) for key, value in vars(module).items() if isinstance(value, simple)
                         and not NUMBERS.search(key)))
        for module in _on_meta(config).modules()
    } | {(key, str(item)) for key, items in _lists_by_layer(config.to_dict()) for item in items}  # fmt: skip


def _lists_by_layer(config: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """The values in a config that are lists with an item for each layer."""
    depth = next((value for key, value in config.items() if isinstance(value, int) and DEPTH.search(key)), None)
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _lists_by_layer(value)
        elif isinstance(value, list) and len(value) == depth:
            yield key, value


def shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config's values with so many layers at the most."""
    lists = {key for key, _ in _lists_by_layer(config)}
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = shortened(value, layers)
        elif isinstance(value, int) and DEPTH.search(key):
            value = min(value, layers)
        found[key] = value[:layers] if isinstance(value, list) and key in lists else value
    return found


def narrowed(config: dict[str, Any], factor: int) -> dict[str, Any]:
    """A config's values with widths divided by `factor` and small windows and vocabularies."""

    def narrow(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return narrowed(value, factor)
        if isinstance(value, list):
            return [narrow(key, item) for item in value]
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if WINDOWS.search(key):
            return min(value, WINDOW)
        if "vocab_size" in key:
            return min(value, VOCABULARY)
        if key.endswith("token_id"):
            return min(value, VOCABULARY - 1)
        if not WIDTHS.search(key) or NO_WIDTHS.search(key):
            return value
        return min(value, max(NARROWEST, value // factor // 2 * 2)) if factor > 1 else value

    return {key: narrow(key, value) for key, value in config.items()}


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return new_model(copy.deepcopy(config), "eager")


def _rough_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with eager attention whose every weight matters, as some that start at zero would not; yet small enough
    for rounding not to grow from layer to layer."""
    model = new_model(copy.deepcopy(config), "eager").eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.3 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.03)
    return model


def _logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    return model(input_ids=rows, use_cache=False).logits


def _differ(a: Tensor, b: Tensor) -> bool:
    return not (a - b).abs().max() <= TOLERANCE * b.std()
