"""The `spectra` group of the configuration."""

from dataclasses import dataclass


@dataclass
class SpectraConfig:
    every: int  # optimizer updates between two measurements; 0 switches them off
    hidden: int  # validation sequences on which hidden states are measured; 0: none
    parts: str | None  # regular expression: the layers of which head and tail are told apart; None: of none
    gradients: str | None  # regular expression: the layers whose gradients are measured; None: of none
    updates: str | None  # regular expression: the layers whose updates are measured; None: of none
