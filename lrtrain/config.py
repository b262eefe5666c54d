"""The typed configuration: what Hydra composed, checked before anything is built.

Sections of fixed shape are dataclasses; `param`, `optim`, `schedule` and `engine` are choices: they name what is
called by `_target_`, and are checked against its signature. Defaults live in conf/ alone.
"""

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lrtrain.data.config import DataConfig
from lrtrain.errors import ConfigError
from lrtrain.spectra.config import SpectraConfig
from lrtrain.tracking.config import TrackingConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class RunConfig:
    name: str
    dir: str


@dataclass
class RecipeConfig:
    """Sizes that suit the model: other sections refer to them."""

    steps: int
    batch_size: int
    micro_batch_size: int
    lr: float
    rank: Any
    eval_every: int
    checkpoint_every: int


@dataclass
class ModelConfig:
    name: str
    path: str | None
    vocab_size: int
    trust_remote_code: bool
    config: dict[str, Any]
    recipe: RecipeConfig


@dataclass
class TrainConfig:
    steps: int
    batch_size: int
    micro_batch_size: int
    seed: int
    dtype: str
    compile: bool
    clip: float | None
    clip_by: str
    recompute_every: int
    recompute_keep: str
    max_skipped: int
    timeout_minutes: float
    log_every: int
    flops: float | None
    profile: int | None


@dataclass
class CompressConfig:
    """How `init_from` gives layers their values."""

    by: str
    affine: bool
    sequences: int
    budget: float | None
    ranks: str


@dataclass
class RollbackConfig:
    spike: float | None
    window: int
    skip: int
    most: int


@dataclass
class EvalConfig:
    every: int
    sequences: int
    compat: str | None


@dataclass
class CheckpointConfig:
    every: int
    minutes: float
    keep: int
    keep_every: int | None
    asynchronous: bool


@dataclass
class Config:
    run: RunConfig
    resume: str
    init_from: str | None
    dry_run: bool
    model: ModelConfig
    param: dict[str, Any]
    optim: dict[str, Any]
    schedule: dict[str, Any]
    data: DataConfig
    engine: dict[str, Any]
    train: TrainConfig
    compress: CompressConfig
    rollback: RollbackConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    spectra: SpectraConfig
    tracking: TrackingConfig


def typed(composed: DictConfig) -> Config:
    """The composed configuration with every interpolation resolved and every type checked.

    Raises:
        ConfigError: for an unknown or missing key, or a value of the wrong type.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error, composed)) from error
    for section in ("param", "optim", "schedule", "engine"):
        check_choice(section, getattr(config, section), composed)
    if config.init_from is not None and config.data.tokenizer.path is None:
        config.data.tokenizer.path = tokenizer_of(config.init_from, Path(config.run.dir))
    return config


def tokenizer_of(init_from: str, run_dir: Path) -> str:
    """Where the tokenizer is that belongs to weights: the run's own copy, once it has one, or with the weights, which
    may be a run's, a checkpoint's, or another model's."""
    weights = Path(init_from)
    copies = (run_dir / "tokenizer", weights / "tokenizer", weights.parent.parent / "tokenizer")
    return next((str(copy) for copy in copies if copy.is_dir()), init_from)


def sentence(error: OmegaConfBaseException, composed: DictConfig) -> str:
    """What a user reads of an OmegaConf error: the key, its value and what would be right, on one line."""
    key = error.full_key or ""
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; give one, as in {key}=…"
    if "not in struct" in str(error.msg) or "not in 'Config'" in str(error.msg) or "Key '" in str(error.msg):
        return unknown_key(key, composed)
    value = OmegaConf.select(composed, key, throw_on_missing=False) if key else None
    reason = str(error.msg).splitlines()[0].strip()
    return f"{key}={value}: {reason[0].lower()}{reason[1:]}"


def unknown_key(key: str, composed: DictConfig) -> str:
    """`train.stps is not a key; did you mean train.steps?`"""
    near = difflib.get_close_matches(key, [k for k in keys(composed) if k != key], n=1, cutoff=0.5)
    return f"{key} is not a key of the configuration" + (f"; did you mean {near[0]}?" if near else "")


def keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys below a node."""
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from keys(child, f"{prefix}{key}.")


OF_THE_CHOICE = {"name", "_target_", "_partial_"}
OF_THE_MODEL = {"pattern", "rank", "zero_init"}  # of `param`: which layers, and what each is given


def own_arguments(node: dict[str, Any]) -> dict[str, Any]:
    """What a `_target_` node says to the callable that it names."""
    others = OF_THE_CHOICE | (OF_THE_MODEL if "pattern" in node else set())
    return {key: value for key, value in node.items() if key not in others}


def check_choice(section: str, node: dict[str, Any], composed: DictConfig) -> None:
    """Check a `_target_` node against the signature of what it names.

    Raises:
        ConfigError: for a key that is no parameter of it, or a value that is not of the annotated type.
    """
    if node.get("_target_") is None:
        return
    parameters = arguments(hydra.utils.get_object(node["_target_"]))
    given = own_arguments(node)
    for key in given:
        if key not in parameters:
            raise ConfigError(unknown_key(f"{section}.{key}", composed) + f" of {section}={node['name']}")
    schema = make_dataclass(section, [(key, parameters[key]) for key in given])
    try:
        OmegaConf.merge(OmegaConf.structured(schema), given)
    except OmegaConfBaseException as error:
        reason = str(error.msg).splitlines()[0]
        raise ConfigError(f"{section}.{error.full_key}={given.get(str(error.full_key))}: {reason}") from error


def arguments(target: Callable[..., Any]) -> dict[str, Any]:
    """What can be passed to a callable by name, with its annotation; `**settings: Unpack[SomeTypedDict]` is seen
    through."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= get_type_hints(get_args(parameter.annotation)[0])
        else:
            found[name] = parameter.annotation
    return found


def choice(node: dict[str, Any]) -> Callable[..., Any]:
    """The callable that a `_target_` node names, with the node's values bound."""
    return partial(hydra.utils.get_object(node["_target_"]), **own_arguments(node))


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic; `auto` and `bf16_sr`: bf16 on CUDA and fp32 on CPU, where bfloat16 has few fast
    kernels."""
    if config.train.dtype in DTYPES:
        return DTYPES[config.train.dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def parameter_dtype(config: Config) -> torch.dtype:
    """What parameters and gradients are kept in: bfloat16 with `train.dtype=bf16_sr`, else float32."""
    return torch.bfloat16 if config.train.dtype == "bf16_sr" else torch.float32


def check(config: Config, world_size: int) -> None:
    """Everything about the values that can be told before a process group, model or data exist.

    Raises:
        ConfigError: naming the key, the value and what would be right.
    """
    train = config.train
    for section, key, least in [
        ("train", "steps", 1 if config.init_from is None else 0), ("train", "batch_size", 1),
        ("train", "micro_batch_size", 1), ("train", "log_every", 1),
        ("train", "max_skipped", 1), ("train", "recompute_every", 0), ("eval", "every", 0), ("eval", "sequences", 1),
        ("checkpoint", "every", 0), ("checkpoint", "keep", 1), ("spectra", "every", 0),
        ("rollback", "window", 2), ("rollback", "skip", 1), ("rollback", "most", 0), ("spectra", "hidden", 0),
        ("data", "seq_len", 1),
    ]:  # fmt: skip
        value = getattr(getattr(config, section), key)
        if value < least:
            raise ConfigError(f"{section}.{key}={value} must be at least {least}")
    if config.rollback.spike is not None and not config.rollback.spike > 0:
        raise ConfigError(f"rollback.spike={config.rollback.spike} must be above 0, or null")
    if not train.timeout_minutes > 0:
        raise ConfigError(f"train.timeout_minutes={train.timeout_minutes} must be above 0")
    if not config.checkpoint.minutes > 0:
        raise ConfigError(f"checkpoint.minutes={config.checkpoint.minutes} must be above 0")
    if config.spectra.exact_up_to is not None and config.spectra.exact_up_to < 1:
        raise ConfigError(f"spectra.exact_up_to={config.spectra.exact_up_to} must be at least 1, or null for no limit")
    if config.spectra.hidden_by not in ("moments", "top"):
        raise ConfigError(f"spectra.hidden_by={config.spectra.hidden_by} is not moments or top")
    if train.dtype not in (*DTYPES, "bf16_sr", "auto"):
        raise ConfigError(f"train.dtype={train.dtype} is not one of {', '.join(DTYPES)}, bf16_sr, auto")
    if train.profile is not None and not 1 <= train.profile <= train.steps:
        raise ConfigError(f"train.profile={train.profile} is not one of the steps 1 to train.steps={train.steps}")
    if train.clip_by not in ("global", "parameter"):
        raise ConfigError(f"train.clip_by={train.clip_by} is not global or parameter")
    if train.recompute_keep not in ("inputs", "bottleneck"):
        raise ConfigError(f"train.recompute_keep={train.recompute_keep} is not inputs or bottleneck")
    if train.recompute_keep == "bottleneck" and not train.recompute_every:
        raise ConfigError(
            "train.recompute_keep=bottleneck has no effect without recomputation: add train.recompute_every=1"
        )
    for key in ("parts", "tails", "gradients", "updates"):
        pattern = getattr(config.spectra, key)
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ConfigError(f"spectra.{key}={pattern} is not a regular expression: {error}") from error
    if config.eval.compat not in (None, "galore"):
        raise ConfigError(f"eval.compat={config.eval.compat} is not galore or null")
    if train.batch_size % (world_size * train.micro_batch_size):
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not a multiple of {world_size * train.micro_batch_size}, which is "
            f"train.micro_batch_size={train.micro_batch_size} × {world_size} processes"
        )
    if config.data.streams is not None and config.data.streams % world_size:
        raise ConfigError(f"data.streams={config.data.streams} is not a multiple of the {world_size} processes")
    if config.optim["in_backward"]:
        if train.clip is not None and train.clip_by == "global":
            raise ConfigError(
                f"train.clip={train.clip} by train.clip_by=global needs all gradients at once, which "
                f"optim.in_backward=true never has; set train.clip_by=parameter, or train.clip=null"
            )
        if train.batch_size != world_size * train.micro_batch_size:
            raise ConfigError(
                f"train.batch_size={train.batch_size} over {world_size} processes accumulates gradients, which "
                f"optim.in_backward=true never keeps; set train.micro_batch_size={train.batch_size // world_size}"
            )
        if config.param.get("lasso"):
            raise ConfigError(
                f"param.lasso={config.param['lasso']} adds to the gradients after the backward pass, when "
                f"optim.in_backward=true has used them; set optim.in_backward=false"
            )
        if config.spectra.gradients is not None and config.spectra.every:
            raise ConfigError(
                f"spectra.gradients={config.spectra.gradients} looks at the gradients of a whole step, which "
                f"optim.in_backward=true never keeps; set spectra.gradients=null"
            )
    check_start(config, world_size)
    if not config.optim["lr"] > 0:
        raise ConfigError(f"optim.lr={config.optim['lr']} must be above 0")
    hydra.utils.get_object(config.engine["_target_"]).check(config, world_size)


def check_directories(config: Config) -> None:
    """What only a run that is about to start needs, not its plan: a directory of its own, and what it goes on from.

    Raises:
        ConfigError: naming the key, the value and what would be right.
    """
    if config.resume == "never" and Path(config.run.dir).exists():
        raise ConfigError(
            f"run.dir={config.run.dir} exists; go on with resume=auto, or choose another run.name or run.dir"
        )
    if config.resume not in ("never", "auto") and not Path(config.resume).exists():
        raise ConfigError(f"resume={config.resume} is not never, auto, or the path of a run or checkpoint")


def check_start(config: Config, world_size: int) -> None:
    """The same for a start from trained weights.

    Raises:
        ConfigError: naming the key, the value and what would be right.
    """
    compress, param = config.compress, config.param
    if config.init_from is None:
        if param.get("select") == "residual" and config.resume == "never":
            raise ConfigError("param.select=residual looks at trained weights; give some by init_from, or use random")
        return
    for key, values in {"by": ("weights", "outputs"), "ranks": ("uniform", "energy", "tail")}.items():
        if (value := getattr(compress, key)) not in values:
            raise ConfigError(f"compress.{key}={value} is not one of {', '.join(values)}")
    if compress.affine and compress.by == "weights":
        raise ConfigError("compress.affine=true has no effect without a text: add compress.by=outputs")
    if compress.budget is not None and not 0 < compress.budget <= 1:
        raise ConfigError(f"compress.budget={compress.budget} is not a share above 0 and at most 1")
    if compress.budget is not None and config.train.flops is not None:
        raise ConfigError(
            f"train.flops={config.train.flops:g} cannot be counted before compress.budget={compress.budget} has chosen "
            f"the ranks; set train.steps"
        )
    if compress.sequences < 1 or compress.sequences % world_size:
        raise ConfigError(f"compress.sequences={compress.sequences} is not a multiple of the {world_size} processes")
    if param.get("zero_init"):
        raise ConfigError(f"param.zero_init={param['zero_init']} would drop what init_from={config.init_from} gives")


def fingerprint(config: Config) -> str:
    """A hash of the whole resolved configuration: all processes must agree on it."""
    text = json.dumps(as_dict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def run_name(composed: DictConfig, overrides: list[str], swept: Sequence[str] = ()) -> str:
    """The name of a run that was given none: the experiment's, or <model>-<param>, and a hash of the other overrides
    if there are any.

    A function of the command line alone, so all processes and a requeued job find the same run. Of a sweep, whose
    `swept` keys have no value of their own, these are left out.
    """
    experiments = [o.removeprefix("experiment=") for o in overrides if o.startswith("experiment=")]
    subjects = [composed[group].name for group in ("model", "param") if group not in swept]
    name = experiments[-1] if experiments else "-".join(subjects)
    named = ("experiment=",) if experiments else ("model=", "param=")
    others = [o for o in telling(overrides) if not o.lstrip("+~").startswith(named)]
    return f"{name}-{short_hash(others)}" if others else name


def telling(overrides: list[str]) -> list[str]:
    """The overrides that change what a run computes: not where it is kept, shown or taken up from."""
    aside = ("resume=", "dry_run=", "run.", "tracking", "hydra")
    return [o for o in overrides if not o.lstrip("+~").startswith(aside)]


def short_hash(overrides: list[str]) -> str:
    """Eight digits that stand for overrides, in whatever order."""
    return hashlib.blake2b("\n".join(sorted(overrides)).encode(), digest_size=4).hexdigest()


def composition_sentence(error: Exception) -> str:
    """What a user reads of an error that Hydra met while composing: one line."""
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and "not in struct" in str(cause.msg):
        return unknown_key(cause.full_key, default_composition())
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def default_composition(*overrides: str) -> DictConfig:
    """conf/pretrain.yaml with overrides, composed outside of a Hydra job."""
    instance = GlobalHydra.instance()
    job = instance.hydra  # of the Hydra job within which this may be called
    instance.clear()
    conf = Path(__file__).resolve().parent.parent / "conf"
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            return hydra.compose("pretrain", overrides=list(overrides))
    finally:
        instance.hydra = job


def compose(*overrides: str) -> Config:
    """The configuration that `launch/pretrain.py` would make of these overrides: for scripts and tests.

    Raises:
        ConfigError: as `typed`.
    """
    composed = default_composition(*overrides)
    if composed.run.name is None:
        composed.run.name = run_name(composed, list(overrides))
    return typed(composed)


def from_stored(plain: dict[str, Any]) -> Config:
    """The configuration of a run as its checkpoints have it; keys that came later have their defaults.

    Raises:
        ConfigError: as `typed`.
    """
    stored = OmegaConf.create(plain)
    chosen = [f"{group}={stored[group].name}" for group in ("param", "optim", "schedule", "engine")]
    for section, defaults in default_composition(*chosen).items():
        if section not in stored:
            stored[section] = defaults
        elif isinstance(defaults, DictConfig):
            for key in defaults.keys() - stored[section].keys():
                stored[section][key] = defaults[key]
    return typed(stored)


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain containers."""
    return asdict(config)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys → leaf values."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in flat(child, f"{prefix}.{key}" if prefix else key).items()}


def differing(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ → (old, new)."""
    before, after = flat(old), flat(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }
