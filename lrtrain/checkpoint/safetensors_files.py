"""Safetensors files, written and read one tensor at a time.

The library's writer needs all tensors of a file at once; here the header is written first, from shapes, then tensor
after tensor, so writing a model takes the memory of its largest tensor.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrtrain.errors import ConfigError

INDEX = "model.safetensors.index.json"
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.uint16: "U16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def write(folder: Path, tensors: Mapping[str, Tensor], produce: Callable[[str], Tensor], most: int) -> None:
    """Write `produce(name)` for all names into files of at most `most` bytes (or one tensor), named as in transformers.

    Args:
        tensors: tensors on meta (shapes and dtypes) by name.
        produce: called once for each name, in the order of `tensors`.
    """
    shards = split(tensors, most)
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(header({name: tensors[name] for name in names}))
            for name in names:
                tensor = produce(name)
                assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype), name
                stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del tensor  # before the next one is made
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))


def split(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """The names, in order, in groups of at most `most` bytes (or one tensor)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a file: the length of a JSON text, and the text, with the position of each tensor."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def opened(path: Path) -> safe_open:
    """An open safetensors file. Raises ConfigError if it is missing or incomplete."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


class SafetensorsFolder:
    """The tensors of a transformers checkpoint in a folder.

    Raises:
        ConfigError: if it holds no safetensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX).is_file():
            self.files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with opened(folder / "model.safetensors") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ConfigError(f"{folder} has no model.safetensors; save the model with save_pretrained")

    def shape(self, name: str) -> torch.Size:
        """The shape of one tensor; raises KeyError for an unknown name."""
        with opened(self.folder / self.files[name]) as file:
            return torch.Size(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One tensor; raises KeyError for an unknown name."""
        with opened(self.folder / self.files[name]) as file:
            return file.get_tensor(name)
