"""Measurements during training: held-out loss, spectra of weights, gradients, updates and hidden states."""
