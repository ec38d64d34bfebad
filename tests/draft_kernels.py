"""What `draft.cu` computes, in plain torch, request by request: for engines without a GPU, and to compare it with."""

from __future__ import annotations

import torch

from minisgl.kernel.sampling import SamplingColumns

Tensor = torch.Tensor


class DraftKernels:
    """In place of the module."""

    def __init__(self) -> None:
        self.num_followed = 0  # requests of steps that were moved to where the one before had got

    def plan(
        self, rows: Tensor, wanted: Tensor, cu_q: Tensor, positions: Tensor, logit_tokens: Tensor, input_ids: Tensor,
        ids: Tensor, token_ids: Tensor, padding_row: int, skips_last: bool, following: Tensor, last: Tensor,
        token: Tensor, numbers: Tensor, kept: Tensor,
    ) -> None:  # fmt: skip
        samples, told = logit_tokens.tolist(), range(int(skips_last), int(skips_last) + numbers.shape[1])
        for req, (row, begin, end) in enumerate(zip(rows.tolist(), cu_q.tolist(), cu_q[1:].tolist(), strict=False)):
            following[begin:end] = token_ids[row, positions[begin:end].long() + 1]
            own = [i for i, at in enumerate(samples) if begin <= at < end]
            wrong = [i for i in own[:-1] if int(ids[i]) != int(input_ids[min(samples[i] + 1, len(input_ids) - 1)])]
            first_wrong = [*wrong, *own[-1:], 0][0]
            kept[req], last[req] = first_wrong - own[0] if own else 0, samples[first_wrong]
            position = int(positions[last[req]])
            token[req] = token_ids[row, position + 1]
            for i, number in enumerate(told):
                for place in range(numbers.shape[3]):
                    is_wanted, at = int(wanted[req]) >= max(number + 1, place), position + 1 - told.start + number
                    end_of_block = at + min(int(wanted[req]), numbers.shape[3] - 1) + 1
                    found = (row, at + place, end_of_block) if is_wanted else (padding_row, 0, 1)
                    numbers[:, i, req, place] = torch.tensor(found)

    def follow(
        self, kept: Tensor, told: Tensor, follows: Tensor, cu_q: Tensor, rows: Tensor, positions: Tensor, ends: Tensor,
        seq_lens: Tensor, held: Tensor, params: Tensor, token_ids: Tensor,
    ) -> None:  # fmt: skip
        for req, before in enumerate(follows.tolist()):
            if before:
                num, begin, end = int(kept[before - 1]), int(cu_q[req]), int(cu_q[req + 1])
                positions[begin:end] += num
                ends[begin:end] += num
                SamplingColumns(params)["position"][begin:end] += num
                seq_lens[req] += num
                held[req] = num
                at = positions[begin + 1 : end].long()
                token_ids[int(rows[req]), at] = told[before - 1, : len(at)].int()
                self.num_followed += 1

    def best(
        self, logits: Tensor, weight: Tensor | None, x: Tensor, norm: Tensor, eps: float, moves: Tensor, most: int,
        out: Tensor,
    ) -> None:  # fmt: skip
        assert weight is None
        found = logits.argmax(-1)
        out.copy_((found + moves[found]).clamp(0, most) if len(moves) else found)
