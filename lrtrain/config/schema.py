"""The schema of the configuration: a dataclass per section, whose types define the allowed values. All defaults are in
conf/.

`param`, `optim`, `schedule` and `engine` are choices of a `_target_`: see `lrtrain.config.choice`.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from lrtrain.config.ranges import PositiveShare, Regex, ShareBelowOne
from lrtrain.config.values import STRICT


@dataclass
class RunConfig:
    name: str
    dir: str


@dataclass
class RecipeConfig:
    """Recommended settings for the model, which other sections refer to."""

    steps: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    lr: PositiveFloat
    rank: Any
    eval_every: NonNegativeInt
    checkpoint_every: NonNegativeInt


@dataclass
class ModelConfig:
    name: str
    path: str | None
    vocab_size: PositiveInt
    trust_remote_code: bool
    config: dict[str, Any]
    recipe: RecipeConfig


@dataclass
class TrainConfig:
    steps: NonNegativeInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    seed: int
    deterministic: bool
    dtype: Literal["fp32", "bf16", "bf16_sr", "auto"]
    compile: bool
    clip: PositiveFloat | None
    clip_by: Literal["global", "parameter"]
    recompute_every: NonNegativeInt
    recompute_keep: Literal["inputs", "bottleneck"]
    max_skipped: PositiveInt
    timeout_minutes: PositiveFloat
    log_every: PositiveInt
    flops: PositiveFloat | None
    profile: PositiveInt | None


@dataclass
class CompressConfig:
    """How `init_from` fits layers to source weights."""

    by: Literal["weights", "outputs"]
    affine: bool
    sequences: PositiveInt
    budget: PositiveShare | None
    ranks: Literal["uniform", "energy", "tail"]


@dataclass
class RollbackConfig:
    spike: PositiveFloat | None
    window: Annotated[int, Field(ge=2)]
    skip: PositiveInt
    most: NonNegativeInt


@dataclass
class EvalConfig:
    every: NonNegativeInt
    sequences: PositiveInt
    compat: Literal["galore"] | None


@dataclass
class CheckpointConfig:
    every: NonNegativeInt
    minutes: PositiveFloat
    keep: PositiveInt
    keep_every: PositiveInt | None
    asynchronous: bool


@dataclass
class TokenizerConfig:
    """Where the tokenizer comes from: a saved one, or one trained on the corpus."""

    path: str | None  # a folder or hub name that AutoTokenizer loads; null trains one
    vocab_size: PositiveInt | None  # pieces of the trained tokenizer; not read when `path` is given


@dataclass
class DataConfig:
    """The training data. `source` is instantiated by Hydra and may have keys of its own."""

    name: str
    source: dict[str, Any]
    path: Any  # files, folders or globs: a string or a list of strings; null where the source has its own
    text_field: str  # of the .jsonl, .json and .parquet rows
    streams: PositiveInt | None  # number of streams of a streamed source
    on_error: Literal["skip", "refuse"]  # for documents that cannot be read
    seq_len: PositiveInt  # tokens the model sees; a stored row has one more
    document_mask: bool  # documents of a row do not see each other, and positions restart
    validation_fraction: ShareBelowOne  # share of held-out documents, chosen by a hash of their text; 0: none
    cache_dir: str | None  # null: lrtrain.core.cache.cache_folder
    tokenizer: TokenizerConfig


@dataclass
class SpectraConfig:
    every: NonNegativeInt  # steps between measurements; 0: none
    exact_up_to: PositiveInt | None  # larger eigenproblems are estimated; None: all are exact
    hidden: NonNegativeInt  # validation sequences on which hidden states are measured; 0: none
    hidden_by: Literal["moments", "top"]  # moments: their whole second moment; top: its leading direction, cheap
    parts: Regex | None  # regular expression: layers whose head and tail are measured; None: none
    tails: Regex | None  # regular expression: layers compared with noise and a power law; None: none
    gradients: Regex | None  # regular expression: layers whose gradients are measured; None: none
    updates: Regex | None  # regular expression: layers whose updates are measured; None: none


@dataclass
class TrackingConfig:
    wandb: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


@dataclass
class GPUFlops:
    bf16: PositiveFloat
    fp32: PositiveFloat


@dataclass
class GPUEfficiency:
    flops: PositiveShare
    bandwidth: PositiveShare


@dataclass
class GPULinks:
    per_node: PositiveInt
    node: PositiveFloat
    network: PositiveFloat


@dataclass
class GPUConfig:
    """A GPU to plan for; units are in conf/gpu."""

    name: str
    memory: PositiveFloat
    flops: GPUFlops
    bandwidth: PositiveFloat
    efficiency: GPUEfficiency
    kernel: PositiveFloat
    launch: PositiveFloat
    links: GPULinks


@dataclass
class Config:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT  # of all sections

    run: RunConfig
    resume: str
    init_from: str | None
    dry_run: bool
    gpu: GPUConfig | None
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


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain containers."""
    return asdict(config)
