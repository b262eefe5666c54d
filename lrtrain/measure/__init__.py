"""What is measured of a model while it trains: held-out loss, spectra of weights, gradients, updates, hidden states."""
