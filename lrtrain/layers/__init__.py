"""Factorized linear layers: the interface in `base`, one file per parameterization."""
