"""The transformers model with its linear layers factorized: build, initial values, counts, loss."""
