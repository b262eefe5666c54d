"""What `prepare_data` leaves in the cache."""

from pathlib import Path

from lrtrain.data.prepare import prepare_data


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_a_second_call_builds_nothing(local, tmp_path):
    first = prepare_data(local(), seed=0)
    built = contents(tmp_path / "cache")
    second = prepare_data(local(), seed=0)
    assert contents(tmp_path / "cache") == built
    assert second.fingerprint == first.fingerprint
