"""A linear layer's product and what stands around it, for kernels that compute all of it at once."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from minisgl.kernel.ops import Matrix

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Around:
    """bias: [out]; norm, eps: of x, which is normalised first; residual: [num_tokens, out], contiguous, which becomes
    its sum with the product, rounded once; gated: silu(gate) * up, the weight's first half being gate's rows."""

    bias: Tensor | None = None
    norm: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    gated: bool = False

    def num_out(self, rows: int) -> int:
        """Columns of the result. rows: of the weight."""
        return rows // 2 if self.gated else rows

    def target(self, x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """Where the result goes. rows: of the weight."""
        if self.residual is not None:
            return self.residual
        return torch.empty(len(x), self.num_out(rows), dtype=dtype, device=x.device)


class FusedMatrix(Matrix):
    """With kernels for some products, and what is around them."""

    @abstractmethod
    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`apply`, whatever the shape."""

    @abstractmethod
    def fused(self, x: Tensor, around: Around) -> Tensor | None:
        """None: no kernel takes this."""

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = self.fused(x, Around(bias))
        return self.plain(x, bias) if out is None else out

    def apply_add(self, x: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        out = self.fused(x, Around(bias, residual=residual)) if residual.is_contiguous() else None
        return super().apply_add(x, residual, bias) if out is None else out

    def norm_apply(self, x: Tensor, norm: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
        out = self.fused(x, Around(bias, norm, eps))
        return super().norm_apply(x, norm, eps, bias) if out is None else out

    def gate_up(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0, bias: Tensor | None = None) -> Tensor:
        fits = bias is None and self._activation == "silu"
        out = self.fused(x, Around(norm=norm, eps=eps, gated=True)) if fits else None
        return super().gate_up(x, norm, eps, bias) if out is None else out
