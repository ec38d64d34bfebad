"""What kernels of attention are told of a launch's sequences, whose keys and values lie in pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PagedSequences:
    """int32 on the device. page_table: [rows, max pages]; rows, seq_lens: [n]; cu_q: [n + 1], offsets of the sequences'
    tokens in q. seq_lens counts this step's tokens too, which come last."""

    page_table: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    cu_q: torch.Tensor
    page_size: int  # tokens

    def part(self, begin: int, end: int) -> PagedSequences:
        """The sequences [begin, end), of the tokens that are theirs."""
        cu_q = self.cu_q[begin : end + 1]
        cu_q = cu_q - cu_q[0] if begin else cu_q
        return PagedSequences(self.page_table, self.rows[begin:end], self.seq_lens[begin:end], cu_q, self.page_size)
