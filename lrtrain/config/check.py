"""Which values of the configuration are right: told before a process group, model or data exist."""

import re
from pathlib import Path

import hydra

from lrtrain.config.schema import DTYPES, Config
from lrtrain.errors import ConfigError

MOST_TOKENS = 1 << 24  # of a model: sixty times those of the largest in use


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
    if not 1 <= config.model.vocab_size <= MOST_TOKENS:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size} must be from 1 to {MOST_TOKENS}")
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
    if train.deterministic and config.param.get("execution") == "auto":
        raise ConfigError(
            "param.execution=auto is chosen by a measurement, which may turn out otherwise the next time; with "
            "train.deterministic=true set param.execution=materialize or factored"
        )
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
