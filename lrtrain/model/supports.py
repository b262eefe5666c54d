"""Hashes of sparse supports: a checkpoint keeps one to notice if a seed ever gives another support."""

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lrtrain.model.structure import factorized_layers


def support_hash(model: nn.Module) -> str:
    """A hash over all buffers that a seed gives back: a checkpoint keeps it to notice if a seed ever did not."""
    return hash_of_supports(
        (name, {k: b for k, b in layer.named_buffers(recurse=False) if k in layer._non_persistent_buffers_set})
        for name, layer in factorized_layers(model).items()
    )


def hash_of_supports(supports: Iterable[tuple[str, Mapping[str, Tensor]]]) -> str:
    """The same, over the buffers of each layer in turn."""
    digest = hashlib.blake2b(digest_size=16)
    for name, buffers in supports:
        for key, buffer in sorted(buffers.items()):
            digest.update(f"{name}.{key}".encode())
            digest.update(buffer.cpu().numpy().tobytes())
    return digest.hexdigest()
