"""The order of an epoch: a permutation with random access, a function of (seed, epoch) only.

A Feistel network is a bijection of [0, 4^b) for any round function. Walking its cycle until the
value is below n makes it a bijection of [0, n) (Black and Rogaway, 2002, "Ciphers with arbitrary finite
domains"). Nothing of size n is stored, and no library's random generator is used, so a position means
the same sample with every version of numpy and torch.
"""

import numpy as np

ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permuted(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `indices` (k,), each in [0, n), under the permutation of (seed, epoch): (k,) int64."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(indices.astype(np.uint64), half_bits, keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def sample_rows(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Rows (k,) int64 of the samples at global `positions` (k,): row perm_{p // n}(p mod n) for p."""
    rows = np.empty(len(positions), dtype=np.int64)
    epochs, indices = np.divmod(positions, n)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permuted(indices[here], n, seed, int(epoch))
    return rows


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, 4^half_bits), applied to `values` (k,) uint64."""
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << bits) | right


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """Keys (ROUNDS,) uint64; negative seeds wrap round."""
    start = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64) + GOLDEN) ^ np.uint64(epoch))
    return _mix(start + GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014), elementwise on uint64, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
