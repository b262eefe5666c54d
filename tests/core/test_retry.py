"""Passing faults of a disk are outlived; others end with the file's name."""

import errno
from collections.abc import Iterator

import pytest

from lrtrain.core.retry import retried
from lrtrain.errors import RunFailed


class Disk:
    """Five items, and so many failures before the one at `place` can be read."""

    def __init__(self, failures: int, place: int, error: Exception):
        self.failures, self.place, self.error = failures, place, error

    def read_from(self, had: int) -> Iterator[int]:
        for i in range(had, 5):
            if i == self.place and self.failures:
                self.failures -= 1
                raise self.error
            yield i


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("lrtrain.core.retry.PAUSES", (0.0, 0.0))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_passing_fault_loses_and_repeats_nothing(place, code, caplog):
    assert list(retried(Disk(2, place, OSError(code, "gone")).read_from, "a.txt")) == [0, 1, 2, 3, 4]
    assert caplog.text.count("a.txt cannot be read (gone); trying again") == 2


def test_a_lasting_fault_ends_with_the_name_of_the_file():
    with pytest.raises(RunFailed, match=r"a.txt cannot be read \(gone\)"):
        list(retried(Disk(3, 2, OSError(errno.EIO, "gone")).read_from, "a.txt"))


@pytest.mark.parametrize("error", [OSError("Invalid data stream"), FileNotFoundError(2, "no"), EOFError()])
def test_damage_and_a_missing_file_are_not_read_again(error):
    with pytest.raises(type(error)):
        list(retried(Disk(1, 2, error).read_from, "a.txt"))
