"""Planning a run: memory, traffic, and the steps of a FLOPs budget."""
