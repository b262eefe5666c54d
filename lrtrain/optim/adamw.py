"""AdamW (Loshchilov and Hutter, 2019), by torch's fused kernel."""

from lrtrain.optim.base import ShardedOptimizer


class AdamW(ShardedOptimizer):
    """AdamW for every parameter; state: two float32 tensors of each parameter's shape."""

    elementwise_shardable = True
