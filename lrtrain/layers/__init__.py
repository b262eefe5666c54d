"""Factorized linear layers: the contract in `base`, one file per parameterization."""
