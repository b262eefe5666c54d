"""Processes and sharded tensors: the process group, small collectives, shards, work dealt out to processes."""

from lrtrain.distributed.world import start, stop

__all__ = ["start", "stop"]
