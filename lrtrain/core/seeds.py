"""Random generators that depend on (seed, name) only."""

import hashlib

import torch


def integer_seed(seed: int, name: str) -> int:
    """A 63-bit seed that depends on (seed, name) only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big") >> 1


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name) only."""
    return torch.Generator().manual_seed(integer_seed(seed, name))
