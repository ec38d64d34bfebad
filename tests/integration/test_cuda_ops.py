"""The GPU's own kernels against the torch reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from minisgl.config.model import MoE
from minisgl.kernel.ops import Around, KVSlots, RopeAngles, TorchOps
from minisgl.kernel.sampling import SamplingColumns, TokenStore, filter_weights, sample_reference, uniform

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]  # the first test compiles

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
REFERENCE = TorchOps()


@pytest.fixture(scope="module")
def ops():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from minisgl.kernel.cuda import CudaOps

    torch.manual_seed(0)
    with torch.inference_mode():
        yield CudaOps(torch.cuda.get_device_capability())


def randn(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def close(actual, expected, atol_factor=1):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    tolerance = 2 * TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * atol_factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 600])
@pytest.mark.parametrize("hidden", [64, 72, 1024, 2560, 5120, 12288])
def test_norms(ops, dtype, n, hidden):
    wide = randn(n, hidden + 16, dtype=dtype, scale=3)
    weight = randn(hidden, dtype=dtype)
    for x in (wide[:, :hidden], wide[:, :hidden].contiguous()):
        close(ops.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 64, 600])
@pytest.mark.parametrize("hidden", [64, 33, 2880, 5120])
def test_a_norm_adds_what_is_late(ops, dtype, n, hidden):
    """To its input, once that is normalised; what lies beside the rows stays."""
    wide, weight, late = randn(n, hidden + 16, dtype=dtype), randn(hidden, dtype=dtype), randn(hidden, dtype=dtype)
    before = wide.clone()
    expected = REFERENCE.rms_norm(before[:, :hidden], weight, 1e-6)
    close(ops.rms_norm(wide[:, :hidden], weight, 1e-6, late), expected)
    assert torch.equal(wide[:, :hidden], before[:, :hidden] + late)
    assert torch.equal(wide[:, hidden:], before[:, hidden:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 5, 100])
@pytest.mark.parametrize(("hidden", "outputs"), [(64, 9), (2880, 32), (2048, 128), (8192, 8), (8200, 4)])
def test_norm_and_product_of_a_router(ops, dtype, n, hidden, outputs):
    wide, gain = randn(n, hidden + 16, dtype=dtype, scale=3), 1 + randn(hidden, dtype=dtype, scale=0.1)
    weight, bias = randn(outputs, hidden, dtype=dtype, scale=hidden**-0.5), randn(outputs, dtype=dtype)
    for x in (wide[:, :hidden], wide[:, :hidden].contiguous()):
        for added in (None, bias):
            normed, out = ops.matrix(weight).norm_and_apply(x, gain, Around(added, eps=1e-6))
            close(normed, REFERENCE.rms_norm(x, gain, 1e-6))
            exact = REFERENCE.rms_norm(x.float(), gain.float(), 1e-6) @ weight.float().T
            close(out, (exact if added is None else exact + bias.float()).to(dtype), 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 129, 250, 512, 520, 1100])
@pytest.mark.parametrize(("hidden", "outputs", "top_k"), [(64, 9, 1), (2880, 32, 4), (3072, 31, 8), (2048, 33, 8)])
@pytest.mark.parametrize("sums_to_1", [True, False])
def test_norm_and_choices_of_a_router(ops, dtype, n, hidden, outputs, top_k, sums_to_1, monkeypatch):
    """As the logits have it that are computed in float32, but for those that are nearly equal."""
    from minisgl.kernel import cuda

    if n == 1100:  # more tokens than all clusters of a launch have at once
        monkeypatch.setattr(cuda, "ROUTED", (n, *cuda.ROUTED[1:]))
    wide, gain = randn(n, hidden + 16, dtype=dtype, scale=3), 1 + randn(hidden, dtype=dtype, scale=0.1)
    weight, bias = randn(outputs, hidden, dtype=dtype, scale=hidden**-0.5), randn(outputs, dtype=dtype)
    spec, is_hopper = MoE(outputs, top_k, 64, sums_to_1), torch.cuda.get_device_capability() == (9, 0)
    takes = is_hopper and n * outputs > cuda.FEW_OUTPUTS and n <= cuda.ROUTED[0] and outputs <= cuda.ROUTED[1]
    for x in (wide[:, :hidden], wide[:, :hidden].contiguous()):
        for added in (None, bias):
            normed, routed = ops.matrix(weight).norm_and_apply(x, gain, Around(added, eps=1e-6), spec)
            close(normed, REFERENCE.rms_norm(x, gain, 1e-6))
            assert isinstance(routed, tuple) == takes
            if not takes:
                continue
            weights, experts = routed
            exact = normed.float() @ weight.float().T + (0 if added is None else added.float())
            chosen = exact.gather(1, experts.long())
            torch.testing.assert_close(chosen, exact.topk(top_k).values, atol=4e-2, rtol=2e-2)
            assert (experts.sort().values.diff() > 0).all()
            share = chosen.softmax(-1) if sums_to_1 else exact.softmax(-1).gather(1, experts.long())
            torch.testing.assert_close(weights, share, atol=2e-2, rtol=2e-2)


def test_shapes_that_no_kernel_takes_fall_back(ops):
    x, weight = randn(3, 5, 33), randn(33)
    close(ops.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))
    gate_up = randn(3, 66)
    close(ops.act_and_mul(gate_up), REFERENCE.act_and_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_q", "num_kv"), [(1, 1), (14, 2), (32, 8), (64, 4)])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("before", [0, 3])
def test_norm_rope_store(ops, dtype, head_dim, num_q, num_kv, with_norm, before):
    """before: heads of the same rows, as gates are."""
    for n in (0, 1, 5, 600):
        rows = randn(n, before + num_q + 2 * num_kv, head_dim, dtype=dtype)
        qkv = rows[:, before:]
        norm = 1 + randn(num_q + num_kv, head_dim, dtype=dtype, scale=0.1) if with_norm else None
        angles = torch.randn(n, 1, head_dim // 2, device="cuda") * 3
        cos, sin = angles.cos(), angles.sin()
        rope = RopeAngles(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
        slots = torch.randperm(n + 10, device="cuda")[:n]
        caches = [torch.zeros(n + 10, num_kv, head_dim, dtype=dtype, device="cuda") for _ in range(4)]
        exact = KVSlots(caches[0].float(), caches[1].float(), slots)
        ours = KVSlots(caches[2], caches[3], slots)
        # In fp32 from the norm on: the reference rounds cos and sin to the dtype, our kernel does not.
        qk = qkv[:, : num_q + num_kv]
        normed = qk if norm is None else REFERENCE.rms_norm(qk, norm, 1e-6)
        wide = torch.cat((normed, qkv[:, num_q + num_kv :]), 1).float()
        q = REFERENCE.norm_rope_store(wide, None, 1e-6, rope, exact)
        found = ops.norm_rope_store(rows.clone()[:, before:], norm, 1e-6, rope, ours)
        close(found, q.to(dtype), 4)  # rounding differs by an ulp before the sum
        close(ours.k, exact.k.to(dtype), 4)
        assert torch.equal(ours.v, exact.v.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_norm_rope_store_to_e4m3(ops, dtype, head_dim):
    """Values are rounded to the nearest, or to the largest there is; keys to a type of 16 bits first."""
    qkv = randn(50, 14 + 4, head_dim, dtype=dtype, scale=3)
    qkv[0, -1] = 1e4
    rope = RopeAngles(*(torch.randn(50, 1, head_dim, device="cuda").cos() for _ in range(2)))
    slots = torch.randperm(60, device="cuda")[:50]
    exact = KVSlots(*torch.zeros(2, 60, 2, head_dim, device="cuda"), slots)
    narrow = KVSlots(*torch.zeros(2, 60, 2, head_dim, dtype=torch.uint8, device="cuda"), slots)
    q = REFERENCE.norm_rope_store(qkv.float(), None, 1e-6, rope, exact)
    close(ops.norm_rope_store(qkv.clone(), None, 1e-6, rope, narrow), q.to(dtype), 4)
    k, v = (x.view(torch.float8_e4m3fn).float() for x in (narrow.k, narrow.v))
    assert torch.equal(v, exact.v.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert ((k - exact.k).abs() <= exact.k.abs() / 15 + 2**-9).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "inner"), [(0, 64), (1, 8), (3, 3072), (300, 9728), (1, 28672)])
def test_silu_and_mul(ops, dtype, n, inner):
    gate_up = randn(n, 2 * inner, dtype=dtype, scale=4)
    close(ops.act_and_mul(gate_up), REFERENCE.act_and_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_embedding(ops, dtype, n):
    weight = randn(100, 520, dtype=dtype)
    ids = torch.randint(0, 100, (n,), device="cuda")
    assert torch.equal(ops.matrix(weight).rows(ids), weight[ids])
    part = ops.matrix(weight[40:60].contiguous()).rows(ids, first=40)
    here = (ids >= 40) & (ids < 60)
    assert torch.equal(part, weight[ids] * here[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_add(ops, dtype):
    x, weight, residual, bias = (randn(*s, dtype=dtype) for s in ((5, 64), (48, 64), (5, 48), (48,)))
    weight = weight / 8
    for b in (None, bias):
        expected = REFERENCE.matrix(weight).apply(x, Around(b, residual=residual.clone()))
        actual = residual.clone()
        assert ops.matrix(weight).apply(x, Around(b, residual=actual)) is actual
        torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("n", "head_dim"), [(0, 64), (1, 128), (300, 80), (3, 256)])
@pytest.mark.parametrize("num_tables", [1, 2])
@pytest.mark.parametrize("num_angles", [1, 2])
def test_step_inputs(ops, page_size, n, head_dim, num_tables, num_angles):
    token_ids = torch.randint(0, 50000, (9, 130), dtype=torch.int32, device="cuda")
    sizes = num_tables, 9, 128 // page_size
    page_tables = [*torch.randint(0, 1000, sizes, dtype=torch.int32, device="cuda").unbind()]
    rows = torch.randint(0, 9, (n,), dtype=torch.int32, device="cuda")
    positions = torch.randint(0, 128, (n,), dtype=torch.int32, device="cuda")
    angles = [torch.randn(128, 2 * head_dim, device="cuda") for _ in range(num_angles)]
    args = (rows, positions, token_ids, page_tables, page_size, angles)
    ids, slots, ropes = ops.step_inputs(*args)
    expected_ids, expected_slots, expected = REFERENCE.step_inputs(*args)
    assert torch.equal(ids, expected_ids) and len(slots) == num_tables
    assert all(map(torch.equal, slots, expected_slots))
    for rope, table in zip(ropes, expected, strict=False):  # there may be more: a launch makes one of each
        assert torch.equal(rope.cos, table.cos) and torch.equal(rope.sin, table.sin)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_scatter_skips_negative_indices(ops, dtype):
    table = torch.zeros(7, 100, dtype=torch.int32, device="cuda")
    index = torch.randperm(700, device="cuda")[:400].to(dtype)
    values = torch.arange(1, 401, dtype=torch.int32, device="cuda")
    index[5] = -1
    ops.scatter(table, index, values)
    ops.scatter(table, index[:0], values[:0])
    kept = index >= 0
    assert torch.equal(table.view(-1)[index[kept].long()], values[kept])
    assert int((table != 0).sum()) == 399


def test_store_ids(ops):
    table = torch.full((5, 20), 9, dtype=torch.int32, device="cuda")
    rows = torch.tensor([4, 0, 2], dtype=torch.int32, device="cuda")
    positions = torch.tensor([19, 0, 7], device="cuda")
    ops.store_ids(table, rows, positions, torch.tensor([3, -1, 8], dtype=torch.int32, device="cuda"))
    assert table[4, 19] == 3 and table[0, 0] == 0 and table[2, 7] == 8 and int((table != 9).sum()) == 3


# --- sampling


def params(n, temperature=1.0, **given):
    seed = np.arange(n) * -7046029254386353131 + 11
    return SamplingColumns.of(n, "cuda", temperature=temperature, seed=seed, position=np.arange(n) * 3 + 1, **given)


def no_ids(logits):
    return torch.full((len(logits),), -7, dtype=torch.int32, device="cuda")


def reference(logits, p):
    return sample_reference(logits, p, no_ids(logits))


def sampled(ops, logits, p):
    return ops.sample(logits, p, no_ids(logits))


def check(logits, p, ids):
    """The token is kept by the filters, and the uniform number falls on it, up to rounding of the masses."""
    temperature = p["temperature"]
    assert torch.equal(ids[temperature == 0], reference(logits, p)[temperature == 0])
    for row in (temperature > 0).nonzero()[:, 0].tolist():
        one, own = logits[row : row + 1], SamplingColumns(p.words[row : row + 1])
        weights = ((one.float() - one.float().max()) / temperature[row]).exp()
        kept = filter_weights(one, weights, own)[0]
        cdf = kept.cumsum(0, dtype=torch.float64)
        cdf, token = cdf / cdf[-1], int(ids[row])
        number = float(uniform(own["seed"], own["position"]))
        before = float(cdf[token - 1]) if token else 0.0
        assert kept[token] > 0
        assert before - 1e-5 <= number <= float(cdf[token]) + 1e-5, (row, token)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 100, 4097, 32003, 151936])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_sampling_agrees_with_the_reference(ops, dtype, vocab, spread):
    logits = randn(12, vocab, dtype=dtype, scale=spread)
    for kwargs in (
        {"temperature": 0.0},
        {},
        {"temperature": 0.4},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 3000, "temperature": 2.0},
        {"top_p": 0.9},
        {"top_p": 0.3, "temperature": 0.7},
        {"top_p": 1e-8},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.95, "min_p": 0.01, "temperature": 0.8},
        {"top_k": 2**31 - 1, "top_p": 0.9999},
    ):
        p = params(12, **kwargs)
        check(logits, p, sampled(ops, logits, p))


def test_unaligned_and_strided_rows(ops):
    wide = randn(9, 1013, scale=3)
    for shift in range(9):
        logits = wide[:, shift : 1001 + shift]
        for kwargs in ({"temperature": 0.0}, {}, {"top_k": 20, "top_p": 0.8}):
            p = params(9, **kwargs)
            assert torch.equal(sampled(ops, logits, p), sampled(ops, logits.contiguous(), p))
            check(logits, p, sampled(ops, logits, p))


def test_ties_are_kept_from_the_lowest_index(ops):
    logits = torch.zeros(400, 30011, dtype=torch.bfloat16, device="cuda")
    ids = sampled(ops, logits, params(400, top_k=3))
    assert set(ids.tolist()) == {0, 1, 2}
    logits[:, 20000:20010] = 5
    ids = sampled(ops, logits, params(400, top_k=4))
    assert set(ids.tolist()) == {20000, 20001, 20002, 20003}
    assert set(sampled(ops, logits, params(400, temperature=0.0)).tolist()) == {20000}
    assert set(sampled(ops, logits, params(400, temperature=0.01, top_p=0.35)).tolist()) == {20000, 20001, 20002, 20003}


def check_equal_weights(ops, logits, p, kept):
    """`kept`: the ids that the filters keep, ascending; all must weigh the same, which makes the token exact."""
    number = uniform(p["seed"], p["position"]) * len(kept)
    assert torch.equal(sampled(ops, logits, p).long(), kept[number.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-1.0, 0.0, 3.0])
@pytest.mark.parametrize("vocab", [30011, 152064])
@pytest.mark.parametrize("batch", [1, 24, 400])
def test_rows_of_equal_logits(ops, dtype, value, vocab, batch):
    logits = torch.full((batch, vocab), value, dtype=dtype, device="cuda")
    ids = torch.arange(vocab, device="cuda")
    top_p = 0.3
    part = float(torch.tensor(top_p))  # as float32
    for kwargs, count in (
        ({}, vocab),
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 2000}, 2000),
        ({"top_k": vocab - 1}, vocab - 1),
        ({"top_p": top_p}, math.ceil(part * vocab)),
        ({"top_k": 2000, "top_p": top_p}, math.ceil(part * 2000)),
        ({"top_k": 3, "min_p": 1.0}, 3),
    ):
        check_equal_weights(ops, logits, params(batch, **kwargs), ids[:count])
    assert not sampled(ops, logits, params(batch, temperature=0.0)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 24, 400])
def test_subnormal_logits_are_not_zero(ops, dtype, batch):
    logits = torch.zeros(batch, 30011, dtype=dtype, device="cuda")
    bits = logits.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    lowest = torch.iinfo(bits.dtype).min
    bits[:, 1::3] = lowest  # -0, which is 0
    bits[:, 2::3] = lowest + 1  # the largest below 0
    bits[:, 5000:5004] = 1  # the smallest above 0
    above, below = (bits[0] == 1).nonzero()[:, 0], (bits[0] == lowest + 1).nonzero()[:, 0]
    zero = ((bits[0] == 0) | (bits[0] == lowest)).nonzero()[:, 0]
    order = torch.cat((above, zero, below))
    for top_k in (1, 4, 6, 4 + len(zero) - 1, 4 + len(zero), 4 + len(zero) + 2, 30010):
        check_equal_weights(ops, logits, params(batch, top_k=top_k), order[:top_k].sort().values)
    assert set(sampled(ops, logits, params(batch, temperature=0.0)).tolist()) == {5000}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_fail_alone(ops, dtype):
    logits = randn(8, 9001, dtype=dtype)
    logits[0, 8999], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3] = float("-inf")
    logits[3, 77] = -3.0
    logits[4, 5:] = float("-inf")
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    logits.view(bits)[5, 100] = -1  # a NaN with its sign set
    for kwargs in ({"temperature": 0.0}, {}, {"top_k": 10, "top_p": 0.9}, {"top_k": 9000}, {"min_p": 0.1}):
        ids = sampled(ops, logits, params(8, **kwargs)).tolist()
        assert [ids[i] for i in (0, 1, 2, 3, 5)] == [-1, -1, -1, 77, -1]
        assert 0 <= ids[4] < 5 and ids[6] >= 0 and ids[7] >= 0


def test_a_rows_token_does_not_depend_on_the_batch(ops):
    logits = randn(64, 50257, scale=2)
    p = params(64, top_k=np.arange(64) % 3 * 30, top_p=0.97)
    ids = sampled(ops, logits, p)
    for _ in range(3):
        assert torch.equal(sampled(ops, logits, p), ids)
    # Batches of this size and of one row run with more threads per block.
    assert torch.equal(sampled(ops, logits[:24], SamplingColumns(p.words[:24])), ids[:24])
    for row in range(0, 64, 9):
        alone = sampled(ops, logits[row : row + 1], SamplingColumns(p.words[row : row + 1]))
        assert int(alone[0]) == int(ids[row])


def test_sampled_tokens_go_to_the_table(ops):
    logits = randn(3, 1000)
    logits[1, 5] = float("nan")
    table = torch.full((4, 20), 7777, dtype=torch.int32, device="cuda")
    p = params(3, top_p=0.9)
    rows = torch.tensor([3, 0, 1], dtype=torch.int32, device="cuda")
    ids = ops.sample(logits, p, no_ids(logits), TokenStore(table, rows))
    assert table[rows.long(), p["position"]].tolist() == ids.clamp(min=0).tolist() and int(ids[1]) == -1
    assert int((table != 7777).sum()) == 3


def test_sampled_tokens_follow_the_distribution(ops):
    n = 40000
    logits = randn(1, 300, scale=2)
    p = params(n, top_p=0.9, temperature=1.2)
    seen = sampled(ops, logits.repeat(n, 1), p).long().bincount(minlength=300).float() / n
    weights = ((logits.float() - logits.float().max()) / 1.2).exp()
    expected = filter_weights(logits, weights, SamplingColumns(p.words[:1]))[0]
    assert ((seen > 0) <= (expected > 0)).all()
    assert (seen - expected / expected.sum()).abs().max() < 0.012


def test_sampling_in_a_graph_reads_its_parameters_anew(ops):
    logits, p = randn(4, 1000), params(4)
    sampled(ops, logits, p), reference(logits, p)  # loads what cannot be loaded during capture
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = sampled(ops, logits, p)
        reference_out = reference(logits, p)
    for temperature, top_k in ((0.0, 0), (1.0, 5), (1.5, 0)):
        logits.copy_(randn(4, 1000))
        p["temperature"].fill_(temperature)
        p["top_k"].fill_(top_k)
        graph.replay()
        assert torch.equal(out, sampled(ops, logits, p))
        check(logits, p, out)
        check(logits, p, reference_out)
