"""Spectra of what is trained: singular values of weights and the numbers made from them."""
