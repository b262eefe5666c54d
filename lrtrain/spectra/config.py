"""The `spectra` group of the configuration."""

from dataclasses import dataclass


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
