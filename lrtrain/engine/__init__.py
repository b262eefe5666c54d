"""Engines shard the model and run steps; only this package uses FSDP and DeepSpeed."""
