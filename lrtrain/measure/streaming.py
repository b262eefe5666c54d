"""The leading direction of rows that pass by, without their (width, width) second moment."""

import torch
import torch.distributed as dist
from torch import Tensor

VECTORS = 4  # that are followed: the first converges by λ_5/λ_1 per look then, not by λ_2/λ_1


class LeadingDirection:
    """The leading eigenvector of the mean of zzᵀ over rows z (width,), with memory for some vectors alone.

    At the first look each block X of b rows improves what is known, Q (width, k) and Λ after t rows: they become
    the left singular vectors and the values of (t QΛ + XᵀXQ)/(t + b) (Yang, Hsieh & Wang, "History PCA", arXiv
    1802.05447, where it is a QR; no learning rate, unlike Oja's rule). Where the same rows come again (a fixed
    evaluation set), each further look is a step of the power method: XᵀXQ of all rows, whatever the blocks.
    """

    def __init__(self, width: int, device: torch.device):
        start = torch.randn(width, min(VECTORS, width), generator=torch.Generator().manual_seed(0))
        self.basis = torch.linalg.qr(start).Q.to(device)
        self.values = torch.zeros(self.basis.shape[1], device=device)
        self.first_look = True
        self.product = torch.zeros_like(self.basis)
        self.begin()

    def begin(self) -> None:
        """Start a look at the rows: the sums are of this look alone."""
        if self.product.any() and self.product.isfinite().all():
            self.basis, _ = _leading(self.product)
            self.first_look = False
        self.product = torch.zeros_like(self.basis)
        self.rows = self.energy = self.along = 0.0
        self.sum = torch.zeros_like(self.basis[:, 0])

    def add(self, rows: Tensor) -> None:
        """Take in the rows (…, width) that all processes have; a collective."""
        rows = rows.detach().reshape(-1, len(self.basis)).float()
        product, total = _summed(rows.T @ (rows @ self.basis)), _summed(rows.sum(0))
        count, energy = _summed(torch.stack([rows.new_tensor(len(rows)), rows.square().sum()])).tolist()
        self.product += product
        if count and self.first_look and product.isfinite().all():
            known = self.rows * self.basis * self.values
            self.basis, self.values = _leading((known + product) / (self.rows + count))
        self.along += float(_summed((rows @ self.basis[:, 0]).square().sum()))
        self.rows, self.energy = self.rows + count, self.energy + energy
        self.sum += total

    def metrics(self) -> dict[str, float]:
        """`top_share`, λ_1 over the trace, from below: the share of Σ‖z‖² along the leading direction as known at each
        row; `mean_share`, exactly, the share along the rows' mean. Nothing where all rows are zero; NaN where
        one is not finite."""
        if self.energy == 0:
            return {}
        mean = self.sum / self.rows
        return {
            "top_share": self.along / self.energy,
            "mean_share": float(mean.square().sum()) * self.rows / self.energy,
        }


def _leading(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (width, k) and values (k,) of `columns` (width, k)."""
    q, r = torch.linalg.qr(columns)
    u, values, _ = torch.linalg.svd(r)
    return q @ u, values


def _summed(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
