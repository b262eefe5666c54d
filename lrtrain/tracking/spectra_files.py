"""Full spectra on disk: `<run.dir>/spectra/step-00000100.npz`, one float32 array per layer name.

Sparse-plus-low-rank layers whose parts were measured also have `<layer>/<part>` for each of `PARTS`: its contribution
to each singular value (`lrtrain.measure.parts`)."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lrtrain.core.files import make_folder_durably, sync_folder

PARTS = ("low_rank", "sparse", "low_rank_null", "sparse_null")


def save_spectra(run_dir: Path, step: int, spectra: Mapping[str, np.ndarray]) -> None:
    path = _path(run_dir, step)
    make_folder_durably(path.parent)
    unfinished = path.with_suffix(".tmp")
    arrays = {layer: np.asarray(sigma, dtype=np.float32) for layer, sigma in spectra.items()}
    try:
        with unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        unfinished.unlink(missing_ok=True)  # remove a partial file, e.g. on a full disk
        raise
    os.replace(unfinished, path)
    sync_folder(path.parent)


def load_spectra(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Singular values by layer name."""
    with np.load(_path(run_dir, step), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if "/" not in name}


def load_parts(run_dir: Path, step: int) -> dict[str, dict[str, np.ndarray]]:
    """Layer name → one of `PARTS` → its contributions to the singular values."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(_path(run_dir, step), allow_pickle=False) as arrays:
        for layer, _, name in (key.rpartition("/") for key in arrays.files if "/" in key):
            found.setdefault(layer, {})[name] = arrays[f"{layer}/{name}"]
    return found


def spectra_steps(run_dir: Path) -> list[int]:
    """The steps that have spectra, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in run_dir.glob("spectra/step-*.npz"))


def _path(run_dir: Path, step: int) -> Path:
    return run_dir / "spectra" / f"step-{step:08d}.npz"
