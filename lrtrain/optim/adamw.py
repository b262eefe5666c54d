"""AdamW (Loshchilov and Hutter, 2019), torch's own in its fused form."""

import torch
from torch import nn

from lrtrain.optim.groups import parameter_groups


def adamw(model: nn.Module, lr: float, betas: list[float], eps: float, weight_decay: float) -> torch.optim.Optimizer:
    """torch's fused AdamW over the model's parameters; state: two tensors of each parameter's shape and dtype."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
