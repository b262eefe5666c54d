"""The `spectra` group of the configuration."""

from dataclasses import dataclass


@dataclass
class SpectraConfig:
    every: int  # optimizer updates between two measurements; 0 switches them off
    parts: str | None  # regular expression: the layers of which head and tail are told apart; None: of none
