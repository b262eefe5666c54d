import numpy as np
import pytest

from lrtrain.data.order import permuted, sample_rows


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 64, 1000, 4097])
def test_every_row_comes_once_in_an_epoch(n):
    assert sorted(permuted(np.arange(n), n, seed=3, epoch=1)) == list(range(n))


@pytest.mark.parametrize("other", [{"seed": 1, "epoch": 0}, {"seed": 0, "epoch": 1}, {"seed": -1, "epoch": 0}])
def test_another_seed_or_epoch_is_another_order(other):
    indices = np.arange(1000)
    same = permuted(indices, 1000, seed=0, epoch=0) == permuted(indices, 1000, **other)
    assert same.sum() < 10  # one in a thousand agrees by chance


def test_the_order_never_changes():
    """A position in an old checkpoint must mean the same sample for ever: these values are constants."""
    assert permuted(np.arange(5), 1000, seed=1, epoch=2).tolist() == [361, 732, 341, 574, 501]
    assert permuted(np.arange(2), 10**12, seed=7, epoch=0).tolist() == [435673089804, 68400299108]


def test_neighbours_are_scattered():
    order = permuted(np.arange(10_000), 10_000, seed=0, epoch=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_positions_run_across_the_edges_of_epochs():
    n, seed = 7, 5
    whole = np.concatenate([permuted(np.arange(n), n, seed, epoch) for epoch in range(3)])
    assert (sample_rows(np.arange(3 * n), n, seed) == whole).all()
    assert (sample_rows(np.array([20, 6, 7]), n, seed) == whole[[20, 6, 7]]).all()
