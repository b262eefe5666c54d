"""Choosing the attention implementation for an architecture by a trial on a small copy of it, once.

The reference is transformers' eager attention with its masks. Masks cost time, and building them reads positions, which
synchronizes with the GPU in every forward pass; they are avoided if the architecture does not need them.
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
from lrtrain.model.documents import DOCUMENTS, document_inputs
from lrtrain.model.loss import has_other_terms

# Every token attends to all earlier ones. transformers builds no mask for a name without a mask function.
CAUSAL = "lrtrain_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)

PLAIN = ("sdpa", "eager")
"""transformers' implementations, which support masks and caches."""

CHOICES = (CAUSAL, *PLAIN)
"""Implementations to try for training, the fastest first."""

SEPARATE = (DOCUMENTS, *PLAIN)
"""Implementations to try if documents do not see each other."""

KNOWN = (LlamaConfig, OPTConfig)
"""Config classes whose models always attend to all earlier tokens, so that no trial is needed."""

LENGTH = 48
"""Length of the trial sequence; more than `WINDOW`."""
FIRST = 20
"""Length of the first of its two documents, if they do not see each other; more than `WINDOW` too, as is the rest."""
NARROWEST = 4
"""Smallest width in the small copy; all stay even."""
HEADS = re.compile(r"head_dim$")
HEADS_FACTOR = 16
"""Largest factor by which widths within heads are divided, since some must still add up to others."""
WINDOW = 16
"""Largest sliding window or attention chunk of the small copy, in tokens."""
TOLERANCE = 1e-3
"""Tolerance for logits, relative to their standard deviation: above float32 rounding, far below another mask."""
VOCABULARY = 512
"""Largest vocabulary of the small copy."""
EXACT = 1e-6
"""Tolerance for gradients that a mask makes zero, relative to the others."""
LARGEST = 5e8
"""Largest number of parameters of a small copy."""
TRIED = 2
"""Version of the trial: cached results of older versions are ignored."""

WIDTHS = re.compile(
    r"(^|_)(size|sizes|dim|dims|width|rank|embd|head|model|ff|kv|inner|ssm|channels)(_per_layer_input)?$"
)
NO_WIDTHS = re.compile(r"vocab|window|chunk|kernel|state|block|patch|image|group|num_|^n_(head|kv)")
DEPTH = re.compile(r"^(num_hidden_layers|num_(decoder_)?layers|n_layers?|num_blocks)$")
DEPTHS = (4, 8, 16)
"""Numbers of layers to try for the small copy; it needs all kinds of layers."""
NUMBERS = re.compile(r"^_|layer_idx|layer_id|index$|layer_num|^training$")
"""Attributes of modules that hold the layer's index."""
WINDOWS = re.compile(r"(window|window_size|attention_chunk_size)$")


def attention_for(config: PreTrainedConfig, choices: Sequence[str] = CHOICES) -> str:
    """The first implementation in `choices` whose logits equal those of transformers' eager attention; cached on disk.

    Not cached is that the model did not run, which another time it may.

    Raises:
        ConfigError: if the model does not run on token ids alone, or logits depend on later tokens, or memory does
            not suffice to try it.
    """
    if type(config) in KNOWN:
        return choices[0]
    found = _kept(config, choices)
    if "refused" in found:
        raise ConfigError(f"{named(config)} is no causal language model of token ids alone: {found['refused']}")
    return found["attention"]


def separate_attention(config: PreTrainedConfig) -> str:
    """The first implementation in `SEPARATE` with which the documents of a row have the logits that transformers' eager
    attention gives each of them alone; cached on disk.

    Raises:
        ConfigError: if none has.
    """
    if type(config) is LlamaConfig:
        return DOCUMENTS
    found = _kept(config, SEPARATE)
    if "attention" not in found:
        raise ConfigError(
            f"data.document_mask=true: in transformers, {named(config)} does not keep the documents of a row apart; "
            "set data.document_mask=false"
        )
    return found["attention"]


def check_loss(config: PreTrainedConfig) -> None:
    """Raises ConfigError if transformers' loss of the model has terms that `TokenLoss` does not have."""
    if type(config) not in KNOWN and "other_terms" in _kept(config, CHOICES):
        raise ConfigError(
            f"{named(config)} has in transformers more terms in its loss, such as a z-loss, than cross-entropy and a "
            "router's auxiliary loss, which are all that is trained here; set their coefficients to 0"
        )


def _kept(config: PreTrainedConfig, choices: Sequence[str]) -> dict[str, str]:
    """The result of `_tried`, cached on disk."""
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    versions = (transformers.__version__, torch.__version__)
    key = fingerprint(kind, config.to_json_string(use_diff=False), list(choices), versions, TOLERANCE, DEPTHS, TRIED)
    path = cache_folder() / "attention" / f"{key}.json"
    if not (found := read_memo(path)):
        try:
            found = _tried(config, choices)
        except Exception as error:  # whatever the model's code raises
            reason = f"({type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]})"
            if _lacks_memory(error):
                raise ConfigError(
                    f"memory does not suffice to try which attention {named(config)} needs {reason}"
                ) from error
            raise ConfigError(
                f"{named(config)} is no causal language model of token ids alone: it does not run {reason}"
            ) from error
        with suppress(OSError):
            make_shared(path.parent)
            write_memo(path, found)
    return found


def _tried(config: PreTrainedConfig, choices: Sequence[str]) -> dict[str, str]:
    """Keys: `attention`, or `refused` with the reason, or `mixed` if documents cannot be kept apart; and `other_terms`
    if transformers' loss has some."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small, model, rows = _small_copy(config)
        loss = {"other_terms": "yes"} if has_other_terms(model, rows) else {}
        if _sees_later_tokens(model, rows):
            return {"refused": "its predictions depend on later tokens"}
        separate, end = choices is SEPARATE, int(rows[0, FIRST - 1])
        if separate:
            rows = _ended_once(rows, end)
            logits = torch.cat([_logits(model, document) for document in rows.split([FIRST, LENGTH - FIRST], 1)], 1)
        else:
            logits = _logits(model, rows)
        for choice in choices:
            try:
                other = new_model(copy.deepcopy(small), choice).eval()
                other.load_state_dict(model.state_dict())
                inputs = document_inputs(rows, end, choice) if separate else {}
                if not _differ(_logits(other, rows, **inputs), logits):
                    return {"attention": choice} | loss
            except Exception as error:  # what a class says of a name that it does not know is not specified
                if _lacks_memory(error):
                    raise
    return ({"mixed": "yes"} if separate else {"attention": "eager"}) | loss


def _ended_once(rows: Tensor, end: int) -> Tensor:
    """The rows with the token `end` after `FIRST` tokens and nowhere else."""
    ended = torch.where(rows == end, end - 1, rows)
    ended[:, FIRST - 1] = end
    return ended


def _lacks_memory(error: Exception) -> bool:
    """Whether memory ran out, for which torch has no class of its own on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _sees_later_tokens(model: PreTrainedModel, rows: Tensor) -> bool:
    """Whether logits of the first half depend on tokens of the second: by a gradient (which a mask makes exactly zero),
    or because they change whenever those tokens do, as when experts choose among all tokens (a rare change may be
    rounding, where two experts have nearly equal scores)."""
    half = LENGTH // 2
    with torch.enable_grad():
        embedded: list[Tensor] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
        logits = _logits(model, rows)[:, :half]
        hook.remove()
        (gradient,) = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), embedded[:1])
    by_token = gradient.flatten(0, -2)[-LENGTH:].abs()  # some models have the sequence first, or a prompt before it
    if not by_token[half:].max() <= EXACT * by_token[:half].max():
        return True
    changed = (torch.cat([rows[:, :half], rows[:, half:].roll(i, 1)], 1) for i in (1, 2, 3))
    return all(_differ(_logits(model, other)[:, :half], logits) for other in changed)


def _small_copy(config: PreTrainedConfig) -> tuple[PreTrainedConfig, PreTrainedModel, Tensor]:
    """A config with layers as narrow as its class allows and as few as contain all kinds, its model with eager
    attention, and a sequence (1, LENGTH).

    The numbers of heads and experts stay the same; windows and vocabulary become small.
    """
    for factor in (128, 64, 32, 16, 8, 4, 2, 1):
        try:
            small = _shallow(type(config).from_dict(narrowed(config.to_dict(), factor)))
            if (size := parameter_count(_on_meta(small))) > LARGEST:
                raise ValueError(f"{size:,} parameters are too many to try, and it does not run with narrower layers")
            model = _rough_model(small)
            rows = torch.randint(min(3, VOCABULARY), small.get_text_config().vocab_size, (1, LENGTH))
            _logits(model, rows)
            return small, model, rows
        except Exception as error:
            if factor == 1 or _lacks_memory(error):
                raise
    raise AssertionError


def _shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with the fewest layers that still has all kinds of layers."""
    kinds = _kinds_of_layers(config)
    for layers in DEPTHS:
        with suppress(Exception):  # patterns of layers that cannot be cut
            fewer = type(config).from_dict(shortened(config.to_dict(), layers))
            if _kinds_of_layers(fewer) == kinds:
                return fewer
    return config


def _kinds_of_layers(config: PreTrainedConfig) -> set[Any]:
    """The distinct kinds of a config's layers: by their modules, and by the values that it lists per layer."""
    simple = (str, int, type(None))
    return {
        (type(module), *((key, value) for key, value in vars(module).items() if isinstance(value, simple)
                         and not NUMBERS.search(key)))
        for module in _on_meta(config).modules()
    } | {(key, str(item)) for key, items in _lists_by_layer(config.to_dict()) for item in items}  # fmt: skip


def _lists_by_layer(config: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """The (key, list) pairs of a config whose list has one item per layer."""
    depth = next((value for key, value in config.items() if isinstance(value, int) and DEPTH.search(key)), None)
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _lists_by_layer(value)
        elif isinstance(value, list) and len(value) == depth:
            yield key, value


def shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config's values with at most `layers` layers."""
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
    """A config's values with widths divided by `factor`, and small windows and vocabulary."""

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
        divisor = min(factor, HEADS_FACTOR) if HEADS.search(key) else factor
        return min(value, max(NARROWEST, value // divisor // 2 * 2)) if divisor > 1 else value

    return {key: narrow(key, value) for key, value in config.items()}


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return new_model(copy.deepcopy(config), "eager")


def _rough_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with eager attention and random weights: none is zero, so that all affect the logits, and they are small
    enough for rounding not to grow from layer to layer."""
    model = new_model(copy.deepcopy(config), "eager").eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.3 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.03)
    return model


def _logits(model: PreTrainedModel, rows: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=rows, use_cache=False, **inputs).logits


def _differ(a: Tensor, b: Tensor) -> bool:
    return not (a - b).abs().max() <= TOLERANCE * b.std()
