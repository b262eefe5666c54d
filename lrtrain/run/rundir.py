"""The run directory: the checkpoint to resume, checks before resuming, and the run's small files."""

import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from lrtrain.checkpoint.checkpointer import find_checkpoint, newest_sound
from lrtrain.checkpoint.meta import CheckpointMeta
from lrtrain.config.compose import from_stored
from lrtrain.config.home import HomeRecord
from lrtrain.config.naming import LENGTH_AND_CADENCE, differing, flat
from lrtrain.config.schema import Config, as_dict
from lrtrain.config.stored import stored_targets
from lrtrain.core.files import write_durably, write_folder_durably
from lrtrain.data.tokenizer import save_tokenizer
from lrtrain.errors import ConfigError
from lrtrain.run.identity import RUN, RunIdentity

ASIDE = ("resume", "dry_run", "gpu", "run.", "tracking.")
"""Keys that do not affect what a run computes."""

NOT_OF_ROWS = ("data.cache_dir", "data.document_mask", "data.on_error")
"""Keys of the data that do not affect its rows."""


def checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that `resume` asks for; None for a fresh start.

    Raises:
        ConfigError: if the given path has no checkpoint, or all checkpoints of the run are damaged.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return newest_sound(Path(config.run.dir) / "checkpoints")
    return find_checkpoint(Path(config.resume))


def check_compatible(config: Config, data_fingerprint: str, checkpoint: Path, meta: CheckpointMeta) -> None:
    """Check that a checkpoint has the configured model and optimizer, and a resumed run its data.

    Raises:
        ConfigError: if not, naming the difference.
    """
    named = {str(target) for _, target in stored_targets(as_dict(config))}
    named |= {str(config.model.path)} if config.model.trust_remote_code else set()
    stored = from_stored(meta.config, checkpoint, named, meta.home.folders)
    changes = differing(as_dict(stored), as_dict(config))
    differences = [
        f"{key} is {old} there and {new} here"
        for key, (old, new) in changes.items()
        if key.startswith(("model.config.", "param.", "train.seed", "model.path"))
        and key != "param.execution"
        and not (meta.ranks and re.match(r"param\.rank(\.|$)", key))  # its layers have ranks of their own
    ]
    if differences:
        raise ConfigError(f"{checkpoint} is of another model: {'; '.join(differences)}")
    if "optim._target_" in changes:
        old, new = (values["optim"]["name"] for values in (meta.config, as_dict(config)))
        raise ConfigError(
            f"{checkpoint} has the state of another optimizer: optim is {old} there and {new} here; to start with "
            f"its weights use another run.name and init_from={checkpoint}"
        )
    if config.resume == "auto" and meta.data.fingerprint != data_fingerprint:
        raise ConfigError(
            f"{checkpoint} was trained on other data than data={config.data.name} gives here "
            f"({changed_data(changes)}); to start on new data from its weights use another run.name and "
            f"resume={checkpoint}"
        )


def changed_data(changes: dict[str, tuple[Any, Any]]) -> str:
    """What makes the data another one: the values of `data` that decide its rows and changed, or what they name."""
    told = {}  # data.source repeats other keys
    for key, (old, new) in changes.items():
        if key.startswith("data.") and not key.startswith(NOT_OF_ROWS):
            told.setdefault((str(old), str(new)), f"{key} is {old} there and {new} here")
    return "; ".join(told.values()) or "its files or its tokenizer changed"


def claim(
    config: Config, identity: RunIdentity, tokenizer: PreTrainedTokenizerBase, meta: CheckpointMeta | None
) -> None:
    """Write or update the configuration, tokenizer and identity of a run in its directory.

    Raises:
        ConfigError: if the directory cannot be written.
    """
    folder = Path(config.run.dir)
    if meta:
        tell_changed_modules(identity.home, meta)
    try:
        keep_config(config, folder, meta)
        write_folder_durably(folder / "tokenizer", lambda beside: save_tokenizer(tokenizer, beside))
        identity.write(folder)
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written: {error.strerror}") from error


def tell_changed_modules(home: HomeRecord, meta: CheckpointMeta) -> None:
    """Print which modules from outside lrtrain are not those that the checkpoint was trained with."""
    before = meta.home.modules
    if changed := [name for name, found in home.modules.items() if found != before.get(name, found)]:
        print(f"modules that changed since step {meta.step}: {', '.join(changed)}", flush=True)


def keep_config(config: Config, folder: Path, meta: CheckpointMeta | None) -> None:
    """Write config.yaml. If the existing one has other values, it is kept as config-step-00000040.yaml (the step that
    is resumed), and the changes are printed."""
    path, resumed = folder / "config.yaml", meta is not None and config.resume == "auto"
    former = stored_config(path)
    changes = changes_from(former or (meta.config if meta else None), config)
    if resumed and changes:
        shown = {
            key: values for key, values in changes.items() if not key.startswith("callbacks.")
        }  # which follow others
        told = ", ".join(f"{key}={new} (before: {old})" for key, (old, new) in shown.items())
        print(f"resuming with other values: {told}", flush=True)
    if former and not changes:
        return
    kept = folder / f"config-step-{meta.step if resumed and meta else 0:08d}.yaml"
    if former and not kept.exists():  # else no step was done with these values
        path.rename(kept)
    write_durably(path, OmegaConf.to_yaml(OmegaConf.create(as_dict(config))))


def stored_config(path: Path) -> dict[str, Any] | None:
    """The unresolved values in a configuration file; None if there is no file, or it is damaged."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        return None
    except Exception:  # a damaged file may be any YAML, or none
        found = None
    if isinstance(found, dict) and isinstance(found.get("optim"), dict):
        return {str(key): value for key, value in found.items()}
    print(f"{path} is damaged", file=sys.stderr, flush=True)
    return None


def changes_from(former: dict[str, Any] | None, config: Config) -> dict[str, tuple[Any, Any]]:
    """Keys that affect the run and whose values changed → (old, new); the old value of a new key is None."""
    known = flat(former) if former else {}
    changes = differing(former, as_dict(config)) if former else {}
    return {key: values for key, values in changes.items() if key in known and not key.startswith(ASIDE)}


def sibling_sentence(config: Config) -> str | None:
    """A hint if `resume=auto` finds no run of this name, but one with the same model and parameterization that may have
    been meant; None if there is none."""
    folder = Path(config.run.dir)
    if config.resume != "auto" or (folder / RUN).exists():
        return None
    stem = f"{config.model.name}-{config.param['name']}"
    beside = [path.parent for path in folder.parent.glob(f"*{stem}*/config.yaml") if path.parent != folder]
    newest = sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True)[:8]
    found = {path: changes_from(stored, config) for path in newest if (stored := stored_config(path / "config.yaml"))}
    if not found:
        return None
    nearest = min(found, key=lambda path: len(found[path]))
    telling = [key for key in found[nearest] if not f"{key}=".startswith(LENGTH_AND_CADENCE)]
    values = [(key, *found[nearest][key]) for key in telling[:4]]
    told = ", ".join(f"{key}={old} there and {new} here" for key, old, new in values)
    return (
        f"no run {config.run.name} yet: it starts anew. To resume {nearest.name} give run.name={nearest.name} ({told})"
    )
