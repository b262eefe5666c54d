"""AdamW (Loshchilov and Hutter, 2019), torch's own fused kernel."""

from torch import Tensor

from lrtrain.optim.base import ShardedOptimizer


class AdamW(ShardedOptimizer):
    """AdamW for every parameter; state: two float32 tensors of each parameter's shape."""

    def takes(self, name: str, p: Tensor, role: str) -> bool:
        return False

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def direction(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        raise NotImplementedError
