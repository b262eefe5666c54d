"""Hashes of sparse supports, stored in checkpoints to detect that a seed gives another support."""

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lrtrain.model.structure import factorized_layers


def support_hash(model: nn.Module) -> str:
    """A hash of all buffers of a model that are regenerated from the seed."""
    return hash_of_supports(
        (name, {k: b for k, b in layer.named_buffers(recurse=False) if k in layer._non_persistent_buffers_set})
        for name, layer in factorized_layers(model).items()
    )


def hash_of_supports(supports: Iterable[tuple[str, Mapping[str, Tensor]]]) -> str:
    """A hash of the buffers of layers, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, buffers in supports:
        for key, buffer in sorted(buffers.items()):
            digest.update(f"{name}.{key}".encode())
            digest.update(buffer.cpu().numpy().tobytes())
    return digest.hexdigest()
