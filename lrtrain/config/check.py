"""Consistency of values across keys, checked before a process group, model or data exist.

The allowed values of a single key follow from the types of the schema and of signatures: see `lrtrain.config.values`.
"""

import re
from pathlib import Path

import hydra

from lrtrain.config.schema import Config
from lrtrain.core.words import processes
from lrtrain.errors import ConfigError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MOST_TOKENS = 1 << 24  # largest vocabulary of a model: sixty times the largest in use


def check(config: Config, world_size: int) -> None:
    """Check the configuration for inconsistent values.

    Raises:
        ConfigError: if there are any, naming the key, the value and what would be right.
    """
    train = config.train
    if train.steps == 0 and config.init_from is None:
        raise ConfigError("train.steps=0 trains nothing; 0 is for weights that init_from gives")
    if config.model.vocab_size > MOST_TOKENS:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size} must be from 1 to {MOST_TOKENS}")
    if train.deterministic and config.param.get("execution") == "auto":
        raise ConfigError(
            "param.execution=auto is chosen by a measurement, which may differ the next time; with "
            "train.deterministic=true set param.execution=materialize, factored or triton"
        )
    if train.profile is not None and train.profile > train.steps:
        raise ConfigError(f"train.profile={train.profile} is not one of the steps 1 to train.steps={train.steps}")
    if train.recompute_keep == "bottleneck" and not train.recompute_every:
        raise ConfigError(
            "train.recompute_keep=bottleneck has no effect without recomputation: add train.recompute_every=1"
        )
    if train.batch_size % (world_size * train.micro_batch_size):
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not a multiple of {world_size * train.micro_batch_size}, which is "
            f"train.micro_batch_size={train.micro_batch_size} × {processes(world_size)}"
        )
    if config.data.streams is not None and "streams" not in config.data.source:
        raise ConfigError(f"data.streams={config.data.streams} has no effect: data={config.data.name} is no stream")
    if config.data.streams is not None and config.data.streams % world_size:
        raise ConfigError(f"data.streams={config.data.streams} is not a multiple of the {world_size} processes")
    if config.optim["in_backward"]:
        check_in_backward(config, world_size)
    if config.init_from is not None:
        check_start(config, world_size)
    elif unused := used_by_init_from(config):
        raise ConfigError(f"{unused} has no effect without init_from: give the weights to start from, or leave it out")
    elif config.param.get("select") == "residual" and config.resume == "never":
        raise ConfigError("param.select=residual looks at trained weights; give some by init_from, or use random")
    engine, optimizer = (hydra.utils.get_object(node["_target_"]) for node in (config.engine, config.optim))
    engine.check(config, world_size)
    if isinstance(optimizer, type):  # else a function that makes one
        states = engine.spread(config, world_size).states
        optimizer.check(config.optim, config.train.dtype, states)  # pyright: ignore[reportAttributeAccessIssue]


def used_by_init_from(config: Config) -> str | None:
    """The first key of `compress` that asks for something, with its value."""
    compress = config.compress
    if compress.by != "weights":
        return f"compress.by={compress.by}"
    if compress.affine:
        return "compress.affine=true"
    return None if compress.budget is None else f"compress.budget={compress.budget}"


def check_in_backward(config: Config, world_size: int) -> None:
    """Check that nothing needs all gradients at once, or accumulated gradients, with updates in the backward pass.

    Raises:
        ConfigError: if something does, naming the key, the value and what would be right.
    """
    train = config.train
    if train.clip is not None and train.clip_by == "global":
        raise ConfigError(
            f"train.clip={train.clip} by train.clip_by=global needs all gradients at once, which "
            f"optim.in_backward=true never has; set train.clip_by=parameter, or train.clip=null"
        )
    if train.batch_size != world_size * train.micro_batch_size:
        raise ConfigError(
            f"train.batch_size={train.batch_size} over {processes(world_size)} accumulates gradients, which "
            f"optim.in_backward=true never keeps; set train.micro_batch_size={train.batch_size // world_size}"
        )
    if config.spectra.gradients is not None and config.spectra.every:
        raise ConfigError(
            f"spectra.gradients={config.spectra.gradients} looks at the gradients of a whole step, which "
            f"optim.in_backward=true never keeps; set spectra.gradients=null"
        )
    for name, node in config.callbacks.items():
        if getattr(hydra.utils.get_object(node["_target_"]), "needs_gradients", False):
            raise ConfigError(
                f"callbacks.{name} reads the gradients of a whole step, which optim.in_backward=true never keeps; set "
                f"optim.in_backward=false, or leave it out with ~callbacks.{name}"
            )


def check_directories(config: Config) -> None:
    """Check run directory and `resume` of a run that is about to start (not needed for its plan).

    Raises:
        ConfigError: if they do not fit, naming the key, the value and what would be right.
    """
    if config.gpu is not None:
        raise ConfigError(f"gpu={config.gpu.name} is a GPU to plan for: add dry_run=true; a run takes those it finds")
    if config.resume != "auto" and is_taken(Path(config.run.dir)):
        raise ConfigError(
            f"run.dir={config.run.dir} exists; go on with resume=auto, or choose another run.name or run.dir"
        )
    if config.resume not in ("never", "auto") and not Path(config.resume).exists():
        raise ConfigError(f"resume={config.resume} is not never, auto, or the path of a run or checkpoint")


def is_taken(folder: Path) -> bool:
    """Whether a run directory holds anything but a lock, which a start leaves if it is killed early."""
    return folder.exists() and (not folder.is_dir() or any(path.name != "lock" for path in folder.iterdir()))


def check_start(config: Config, world_size: int) -> None:
    """Check the keys of a start from trained weights.

    Raises:
        ConfigError: if they are inconsistent, naming the key, the value and what would be right.
    """
    compress, param, path = config.compress, config.param, Path(str(config.init_from))
    local = len(path.parts) > 1 and path.parent.is_dir()
    if config.resume == "never" and not path.exists() and (local or not HUB_NAME.fullmatch(str(config.init_from))):
        raise ConfigError(f"init_from={config.init_from} does not exist")
    if compress.affine and compress.by == "weights":
        raise ConfigError("compress.affine=true has no effect without a text: add compress.by=outputs")
    if compress.budget is not None and config.train.flops is not None:
        raise ConfigError(
            f"train.flops={config.train.flops:g} cannot be counted before compress.budget={compress.budget} has chosen "
            f"the ranks; set train.steps"
        )
    if compress.by == "outputs" and compress.sequences % world_size:
        raise ConfigError(f"compress.sequences={compress.sequences} is not a multiple of the {world_size} processes")
    if param.get("zero_init"):
        raise ConfigError(f"param.zero_init={param['zero_init']} would drop what init_from={config.init_from} gives")
