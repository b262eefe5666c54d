"""The schema of the configuration: a dataclass per section. Every default is in conf/.

`param`, `optim`, `schedule` and `engine` are choices of a `_target_`: see `lrtrain.config.choice`.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class RunConfig:
    name: str
    dir: str


@dataclass
class RecipeConfig:
    """Sizes that suit the model: other sections refer to them."""

    steps: int
    batch_size: int
    micro_batch_size: int
    lr: float
    rank: Any
    eval_every: int
    checkpoint_every: int


@dataclass
class ModelConfig:
    name: str
    path: str | None
    vocab_size: int
    trust_remote_code: bool
    config: dict[str, Any]
    recipe: RecipeConfig


@dataclass
class TrainConfig:
    steps: int
    batch_size: int
    micro_batch_size: int
    seed: int
    deterministic: bool
    dtype: str
    compile: bool
    clip: float | None
    clip_by: str
    recompute_every: int
    recompute_keep: str
    max_skipped: int
    timeout_minutes: float
    log_every: int
    flops: float | None
    profile: int | None


@dataclass
class CompressConfig:
    """How `init_from` gives layers their values."""

    by: str
    affine: bool
    sequences: int
    budget: float | None
    ranks: str


@dataclass
class RollbackConfig:
    spike: float | None
    window: int
    skip: int
    most: int


@dataclass
class EvalConfig:
    every: int
    sequences: int
    compat: str | None


@dataclass
class CheckpointConfig:
    every: int
    minutes: float
    keep: int
    keep_every: int | None
    asynchronous: bool


@dataclass
class TokenizerConfig:
    """Where the tokenizer comes from: a saved one, or one trained on the corpus."""

    path: str | None  # a folder or hub name that AutoTokenizer loads; null trains one
    vocab_size: int | None  # pieces of the trained tokenizer; not read when `path` is given


@dataclass
class DataConfig:
    """What the model reads. `source` is instantiated by Hydra and may take keys of its own."""

    name: str
    source: dict[str, Any]
    path: Any  # files, folders or globs: a string or a list of strings; null where the source has its own
    text_field: str  # of the .jsonl, .json and .parquet rows
    streams: int | None  # canonical streams of a streamed source
    on_error: str  # skip or refuse: what to do about a document that cannot be read
    seq_len: int  # tokens the model sees; a stored row has one more
    validation_fraction: float  # of the documents, chosen by a hash of their text; 0 holds none out
    cache_dir: str | None  # null: lrtrain.core.cache.cache_folder
    tokenizer: TokenizerConfig


@dataclass
class SpectraConfig:
    every: int  # optimizer updates between two measurements; 0 switches them off
    exact_up_to: int | None  # larger eigenproblems are not solved but estimated; None: all are solved
    hidden: int  # validation sequences on which hidden states are measured; 0: none
    hidden_by: str  # moments: the whole spectrum of their second moment; top: its leading direction alone, cheap
    parts: str | None  # regular expression: the layers of which head and tail are told apart; None: of none
    tails: str | None  # regular expression: the layers whose spectra are held against noise and a power law; None: none
    gradients: str | None  # regular expression: the layers whose gradients are measured; None: of none
    updates: str | None  # regular expression: the layers whose updates are measured; None: of none


class WandbMode(StrEnum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class TrackingConfig:
    wandb: WandbMode
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


@dataclass
class Config:
    run: RunConfig
    resume: str
    init_from: str | None
    dry_run: bool
    model: ModelConfig
    param: dict[str, Any]
    optim: dict[str, Any]
    schedule: dict[str, Any]
    data: DataConfig
    engine: dict[str, Any]
    train: TrainConfig
    compress: CompressConfig
    rollback: RollbackConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    spectra: SpectraConfig
    tracking: TrackingConfig
    callbacks: dict[str, Any]


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic; `auto` and `bf16_sr`: bf16 on CUDA and fp32 on CPU, where bfloat16 has few fast
    kernels."""
    if config.train.dtype in DTYPES:
        return DTYPES[config.train.dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def parameter_dtype(config: Config) -> torch.dtype:
    """What parameters and gradients are kept in: bfloat16 with `train.dtype=bf16_sr`, else float32."""
    return torch.bfloat16 if config.train.dtype == "bf16_sr" else torch.float32


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain containers."""
    return asdict(config)
