"""A drafter's kernels on a GPU against torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minisgl.core import ScheduledReq
from minisgl.engine.draft import HeadDrafter
from minisgl.engine.tables import StepIndex
from minisgl.kernel.sampling import records
from tests.draft_kernels import DraftKernels

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]  # the first test compiles

Tensor = torch.Tensor
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NUM_ROWS, PADDING_ROW, LENGTH = 40, 39, 200


@pytest.fixture(scope="module")
def ops() -> Any:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from minisgl.kernel.cuda import CudaOps

    torch.manual_seed(0)
    with torch.inference_mode():
        yield CudaOps(torch.cuda.get_device_capability())


def planned(ops: Any, reqs: list[ScheduledReq], head: Any, most: int, seed: int) -> tuple[Tensor, ...]:
    """What is planned for a draft of so many tokens behind a step of these requests, half of whose drafts are wrong."""
    generator, index = torch.Generator().manual_seed(seed), StepIndex.of(reqs)
    table = torch.randint(3, (NUM_ROWS, LENGTH), generator=generator, dtype=torch.int32).cuda()
    names = "logit_tokens", "rows", "next_draft_lens", "token_rows", "positions"
    numbers = {name: torch.from_numpy(getattr(index, name).astype(np.int32)).cuda() for name in names}
    tensors = SimpleNamespace(**numbers, cu_q=torch.from_numpy(index.offsets.astype(np.int32)).cuda())
    input_ids = table[tensors.token_rows.long(), tensors.positions.long()].long()
    ids = table[tensors.token_rows.long(), tensors.positions.long() + 1][tensors.logit_tokens.long()].clone()
    ids[torch.rand(len(ids), generator=generator).cuda() < 0.3] += 1
    tables = SimpleNamespace(token_ids=table, padding_row=PADDING_ROW)
    shard = SimpleNamespace(ops=ops, config=SimpleNamespace(draft_len=most), device=table.device)
    drafter = HeadDrafter(head, SimpleNamespace(tables=tables, shard=shard), None)  # type: ignore[arg-type]
    batch = SimpleNamespace(tensors=tensors, index=index)
    return *drafter._plan(batch, input_ids, ids, slice(None), most), drafter.left[0][: len(reqs)]  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [0, 1, 3, 7])
@pytest.mark.parametrize(("skips_last", "block"), [(True, None), (False, None), (False, (8, 5))])
@pytest.mark.parametrize("kind", ["decode", "verify", "prefill", "mixed"])
def test_what_is_told_stands_where_torch_says(
    ops: Any, kind: str, skips_last: bool, block: tuple[int, int] | None, most: int
) -> None:
    numbers = np.random.default_rng(most)
    for num_reqs in (1, 2, 33):
        reqs = []
        for row in range(num_reqs):
            num_new = {"decode": 1, "verify": 4, "prefill": 150}.get(kind, int(numbers.choice([1, 3, 160])))
            samples = num_new if num_new < 5 else 1
            wanted = int(numbers.integers(most + 1))
            reqs.append(ScheduledReq(row, int(numbers.integers(1, 30)), num_new, samples, wanted))
        head = SimpleNamespace(skips_last=skips_last, block=block)
        expected = planned(SimpleNamespace(draft=None), reqs, head, most, seed=num_reqs)[:4]
        *actual, kept = planned(ops, reqs, head, most, seed=num_reqs)
        assert torch.equal(kept, planned(SimpleNamespace(draft=DraftKernels()), reqs, head, most, seed=num_reqs)[4])
        for name, one, other in zip(("following", "last", "token", "numbers"), actual, expected, strict=True):
            if most or name == "following":
                assert one.dtype == other.dtype
                assert torch.equal(one, other), f"{name} of {num_reqs} requests"


@pytest.mark.parametrize("longest", [1, 3, 8])
def test_a_step_is_moved_to_where_the_one_before_has_got(ops: Any, longest: int) -> None:
    generator = np.random.default_rng(longest)
    for num_reqs in (1, 5, 33):
        reqs = []
        for row in range(num_reqs):
            num_new, follows = int(generator.integers(1, longest + 2)), int(generator.integers(num_reqs + 1))
            reqs.append(ScheduledReq(row, int(generator.integers(1, 150)), num_new, num_new, 0, 0, follows))
        kept = torch.from_numpy(generator.integers(0, longest + 1, num_reqs + 3).astype(np.int32)).cuda()
        told = torch.from_numpy(generator.integers(0, 999, (num_reqs + 3, longest))).cuda()
        index, found = StepIndex.of(reqs), []
        for kernels in (ops.draft, DraftKernels()):
            names = "follows", "offsets", "rows", "positions", "ends", "seq_lens", "drafted"
            numbers = [torch.from_numpy(getattr(index, name).astype(np.int32)).cuda() for name in names]
            values = {"seed": 5, "position": index.sample_positions, "mask": 7}
            params = torch.from_numpy(records(len(index.positions), **values)).cuda()
            table = torch.full((NUM_ROWS, LENGTH), -1, dtype=torch.int32).cuda()
            kernels.follow(kept, told, *numbers, params, table)
            found.append([*numbers, params, table])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        num_moved = sum(share.num_new for share in reqs if share.follows and kept[share.follows - 1])
        assert int((found[0][3].cpu() != torch.from_numpy(index.positions)).sum()) == num_moved


def test_requests_without_samples_are_nobodys(ops: Any) -> None:
    reqs = [ScheduledReq(0, 4, 8, 0), ScheduledReq(1, 4, 3, 3, 2), ScheduledReq(2, 0, 9, 0)]
    head = SimpleNamespace(skips_last=True, block=None)
    expected = planned(SimpleNamespace(draft=None), reqs, head, 3, seed=1)
    actual = planned(ops, reqs, head, 3, seed=1)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[3], expected[3])
    assert all(0 <= last < 20 for last in actual[1].tolist())
    assert actual[4].tolist()[::2] == [0, 0]
    assert actual[3][0].tolist() == [[PADDING_ROW, 1, PADDING_ROW], [PADDING_ROW] * 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 64, 509, 4096, 151936])
def test_the_largest_logit(ops: Any, vocab: int, dtype: torch.dtype) -> None:
    for n in (0, 1, 3, 130):
        for width in (vocab, vocab + 3):
            logits = torch.randn(n, width, device="cuda").to(dtype)[:, :vocab]
            out = torch.empty(n, dtype=torch.int64, device="cuda")
            moves = torch.randint(2 * vocab, (vocab,), device="cuda")
            ops.draft.best(logits, None, logits, logits, 0.0, out[:0], 0, out)
            first = torch.from_numpy(logits.float().cpu().numpy().argmax(1)).cuda()  # of equal ones
            assert out.tolist() == first.tolist()
            ops.draft.best(logits, None, logits, logits, 0.0, moves, vocab + 7, out)
            assert out.tolist() == (moves[first] + first).clamp(max=vocab + 7).tolist()


def test_logits_that_are_no_numbers_give_a_token(ops: Any) -> None:
    logits = torch.full((3, 4096), float("nan"), dtype=torch.bfloat16, device="cuda")
    logits[1, 77], logits[2] = -float("inf"), -float("inf")
    out = torch.empty(3, dtype=torch.int64, device="cuda")
    for _ in range(2):
        ops.draft.best(logits, None, logits, logits, 0.0, out[:0], 0, out)
        assert out.tolist() == [0, 77, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "hidden"), [(300, 64), (4096, 256), (40000, 4096), (32003, 1024)])
def test_the_best_of_all_parts_by_all_bits(ops: Any, vocab: int, hidden: int, dtype: torch.dtype) -> None:
    """Each of the parts, which take turns of a vector of tokens, names its best by the logits."""
    size = 16 // dtype.itemsize
    weight, gain = torch.randn(vocab, hidden, device="cuda").to(dtype), torch.rand(hidden, device="cuda").to(dtype)
    for n in (1, 3, 96):
        x = torch.randn(n, hidden, device="cuda").to(dtype)
        exact = (x.float() * gain.float()) @ weight.float().T  # of each row the norm is one factor
        logits = (exact + torch.randn(n, vocab, device="cuda") * exact.std()).to(dtype)
        out = torch.empty(n, dtype=torch.int64, device="cuda")
        ops.draft.best(logits, weight, x, gain, 1e-6, out[:0], 0, out)
        padded = np.full((n, -(-vocab // (64 * size)), 64, size), -np.inf, np.float32)
        padded.reshape(n, -1)[:, :vocab] = logits.float().cpu().numpy()
        best = padded.transpose(0, 2, 1, 3).reshape(n, 64, -1).argmax(-1)  # in its part, the first of equal ones
        tokens = torch.from_numpy((best // size * 64 + np.arange(64)) * size + best % size).cuda()
        named = torch.nn.functional.pad(exact, (0, 64 * size), value=-torch.inf).gather(1, tokens)
        assert bool((out[:, None] == tokens).any(1).all())
        assert bool((exact.gather(1, out[:, None])[:, 0] >= named.amax(1) - 1e-4 * hidden**0.5).all())
