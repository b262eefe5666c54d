"""The run directory: what is taken up from it, what it is refused for, and what a new one begins with."""

import json
import re
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from lrtrain.checkpoint.checkpointer import find_checkpoint, newest_sound, write_durably
from lrtrain.checkpoint.meta import CheckpointMeta
from lrtrain.config.compose import from_stored
from lrtrain.config.naming import differing
from lrtrain.config.schema import Config, as_dict
from lrtrain.config.stored import stored_targets
from lrtrain.data.tokenizer import save_tokenizer
from lrtrain.errors import ConfigError


def checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that `resume` asks for; None for a fresh start.

    Raises:
        ConfigError: if a path was given that has none, or all that a run has are damaged.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return newest_sound(Path(config.run.dir) / "checkpoints")
    return find_checkpoint(Path(config.resume))


def check_compatible(config: Config, data_fingerprint: str, checkpoint: Path, meta: CheckpointMeta) -> None:
    """A checkpoint fits only the model it was made of, and a run goes on only with its data.

    Raises:
        ConfigError: naming the difference.
    """
    named = {str(target) for _, target in stored_targets(as_dict(config))}
    named |= {str(config.model.path)} if config.model.trust_remote_code else set()
    stored = as_dict(from_stored(meta.config, checkpoint, named))
    differences = [
        f"{key} is {old} there and {new} here"
        for key, (old, new) in differing(stored, as_dict(config)).items()
        if key.startswith(("model.config.", "param.", "train.seed", "model.path"))
        and key != "param.execution"
        and not (meta.ranks and re.match(r"param\.rank(\.|$)", key))  # its layers have ranks of their own
    ]
    if differences:
        raise ConfigError(f"{checkpoint} is of another model: {'; '.join(differences)}")
    if config.resume == "auto" and meta.data.fingerprint != data_fingerprint:
        raise ConfigError(
            f"{checkpoint} was trained on other data than data={config.data.name} gives here; to start on new data "
            f"from its weights use another run.name and resume={checkpoint}"
        )


def known_run(config: Config) -> dict[str, Any] | None:
    """What identifies the run that `resume=auto` goes on with; None if there is none yet."""
    path = Path(config.run.dir) / "run.json"
    return json.loads(path.read_text()) if config.resume == "auto" and path.is_file() else None


def claim(config: Config, settled: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Create the run directory with its configuration and tokenizer; what identifies the run.

    How layers are executed belongs to it, and where that was `settled`: another execution rounds differently, and
    resuming would not be exact.

    Raises:
        ConfigError: if the directory cannot be created or written, or is another run's.
    """
    folder = Path(config.run.dir)
    run = {"id": uuid.uuid4().hex[:12], "name": config.run.name, **settled}
    try:
        folder.mkdir(parents=True, exist_ok=config.resume == "auto")
        write_durably(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(as_dict(config))))
        save_tokenizer(tokenizer, folder / "tokenizer")
        write_durably(folder / "run.json", json.dumps(run))
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written: {error.strerror}") from error
    return run


def hold(lock: FileLock) -> None:
    """Keep every other process out of the lock's folder until this one releases it or ends, however it ends.

    Raises:
        ConfigError: if another one has it.
    """
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        folder = Path(lock.lock_file).parent
        raise ConfigError(f"run.dir={folder} is in use by a run that has not ended; choose another run.name") from error
