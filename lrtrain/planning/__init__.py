"""What a run will take before it runs: memory, traffic, steps of a budget."""
