"""Processes and sharded tensors: the process group, small collectives, shards, work split over ranks by layer."""

from lrtrain.distributed.world import start, stop

__all__ = ["start", "stop"]
