"""The leading direction of a stream of rows, without their (width, width) second moment."""

import torch
import torch.distributed as dist
from torch import Tensor

VECTORS = 4  # vectors to track, so that the first converges by λ_5/λ_1 per pass instead of λ_2/λ_1


class LeadingDirection:
    """The leading eigenvector of the mean of zzᵀ over rows z (width,), with memory for a few vectors only.

    In the first pass, each block X of b rows updates the estimate Q (width, k), Λ after t rows to the left singular
    vectors and values of (t QΛ + XᵀXQ)/(t + b) (Yang, Hsieh & Wang, "History PCA", arXiv 1802.05447, who use a QR; no
    learning rate, unlike Oja's rule). Each further pass over the same rows (a fixed evaluation set) is a step of the
    power method, XᵀXQ over all rows.
    """

    def __init__(self, width: int, device: torch.device):
        start = torch.randn(width, min(VECTORS, width), generator=torch.Generator().manual_seed(0))
        self.basis = torch.linalg.qr(start).Q.to(device)
        self.values = torch.zeros(self.basis.shape[1], device=device)
        self.first_look = True
        self.product = torch.zeros_like(self.basis)
        self.begin()

    def begin(self) -> None:
        """Start a pass over the rows, with new sums."""
        if self.product.any() and self.product.isfinite().all():
            self.basis, _ = _leading(self.product)
            self.first_look = False
        self.product = torch.zeros_like(self.basis)
        self.rows = self.energy = self.along = 0.0
        self.sum = torch.zeros_like(self.basis[:, 0])

    def add(self, rows: Tensor) -> None:
        """Add the rows (…, width) of all processes; a collective."""
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
        """`top_share`, a lower bound on λ_1 ÷ trace: the share of Σ‖z‖² along the leading direction as estimated at
        each row; `mean_share`, the exact share of the rows' mean. Empty if all rows are zero; NaN if one is not
        finite."""
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
