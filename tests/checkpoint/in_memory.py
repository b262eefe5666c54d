"""A run to export that trained nothing: its values are the initial ones, made larger."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from lrtrain.checkpoint.weights import RunWeights
from lrtrain.config.compose import compose
from lrtrain.data.tokenizer import SENTENCEPIECE, from_sentencepiece, save_tokenizer, train_sentencepiece
from lrtrain.model.build import make_model
from lrtrain.model.init import materialize
from lrtrain.model.structure import factorized_layers
from lrtrain.model.supports import support_hash


class InMemory(RunWeights):
    """The model that `overrides` choose.

    Args:
        folder: where its tokenizer is.
    """

    def __init__(self, folder: Path, overrides: list[str]):
        self.config = compose(*overrides)
        self.checkpoint = folder / "checkpoints" / "step-1"
        self.model = make_model(self.config)
        self.layers = factorized_layers(self.model)
        self.trained = make_model(self.config)
        materialize(self.trained, self.config.train.seed, torch.device("cpu"))
        facts = {"step": 1, "progress": SimpleNamespace(tokens=1), "support_hash": support_hash(self.trained)}
        self.meta = cast(Any, SimpleNamespace(**facts))
        with torch.no_grad():
            for name, p in self.trained.named_parameters():
                p.mul_(3) if p.dim() > 1 else p.add_(0.1 * torch.randn(p.shape, generator=seeded(name)))

    def tensors(self, names) -> dict[str, Tensor]:
        state = self.trained.state_dict()
        return {name: state[name].clone() for name in names}

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.trained.eval()(input_ids=ids).logits


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def write_tokenizer(folder: Path, texts: list[str], size: int) -> None:
    """The tokenizer of a run in `folder`, as a run writes it."""
    model = train_sentencepiece(texts, size)
    (folder / "tokenizer").mkdir(parents=True)
    save_tokenizer(from_sentencepiece(model), folder / "tokenizer")
    (folder / "tokenizer" / SENTENCEPIECE).write_bytes(model)
