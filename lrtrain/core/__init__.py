"""What every other package may import: seeds, the cache on disk, the names of layers."""
