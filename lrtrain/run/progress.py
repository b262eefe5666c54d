"""Where a run stands."""

from dataclasses import dataclass, field

Window = list[int]
"""[first, end): positions of sequences in the order of the data."""


@dataclass
class Progress:
    """Where a run stands: all that is needed to go on besides model, optimizer and the data source's own state."""

    step: int = 0
    """Optimizer steps completed, skipped ones included."""
    position: int = 0
    """Sequences consumed: the next step takes position … position + batch_size − 1 of the data's order."""
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Time spent in steps, evaluation, spectra and checkpoints aside."""
    spectra_seconds: float = 0.0
    """Time spent in measuring spectra."""
    recent: list[float] = field(default_factory=list)
    """The last losses that were no spikes, for `rollback`."""
    left_out: list[Window] = field(default_factory=list)
    """What rollbacks have left out of the data."""
