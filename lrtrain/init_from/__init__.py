"""Starting from trained weights: reading them, allocating ranks, fitting each layer."""
