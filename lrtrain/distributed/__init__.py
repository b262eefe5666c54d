"""Processes and sharded tensors: the process group, small collectives, shards, work distributed by layer."""

from lrtrain.distributed.world import start, stop

__all__ = ["start", "stop"]
