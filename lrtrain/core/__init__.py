"""Basics that every other package may import: seeds, the cache on disk, names of layers."""
