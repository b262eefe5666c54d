"""Engines shard the model and run the step; the only place that knows FSDP and DeepSpeed."""
