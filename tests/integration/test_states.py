"""Layers with recurrent states: their reference against transformers, and what becomes of the states."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5GatedDeltaNet,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from minisgl.kernel.cpu import CpuOps
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.state import DeltaState, DeltaWeights, StateSequences, delta_rule

NUM_K, NUM_V, K_DIM, V_DIM, WIDTH = 2, 4, 8, 16, 4
CHANNELS, FEATURES = 2 * NUM_K * K_DIM + NUM_V * V_DIM, NUM_V * V_DIM


@pytest.mark.parametrize("rule", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("num_tokens", [1, 2, 64])
def test_the_delta_rule(rule: object, num_tokens: int) -> None:
    """A chunk at once is what transformers computes chunk by chunk, and token by token."""
    torch.manual_seed(num_tokens)
    q, k = (F.normalize(torch.randn(2, NUM_V, num_tokens, K_DIM), dim=-1) for _ in range(2))
    v, memory = torch.randn(2, NUM_V, num_tokens, V_DIM), torch.randn(2, NUM_V, K_DIM, V_DIM)
    beta, log_decay = torch.rand(2, NUM_V, num_tokens), -3 * torch.rand(2, NUM_V, num_tokens)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    gates = {"g": log_decay.transpose(1, 2), "beta": beta.transpose(1, 2)}
    expected, after = rule(*heads, **gates, initial_state=memory, output_final_state=True)  # type: ignore[operator]
    out, memory = delta_rule(q * K_DIM**-0.5, k, v, beta, log_decay, memory)
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(memory, after, atol=1e-5, rtol=1e-5)


def transformers_layer() -> Qwen3_5GatedDeltaNet:
    """Whose projections leave everything as it is: so what it computes between them is seen."""
    config = Qwen3_5TextConfig(
        hidden_size=CHANNELS + FEATURES + 2 * NUM_V,
        linear_num_key_heads=NUM_K,
        linear_num_value_heads=NUM_V,
        linear_key_head_dim=K_DIM,
        linear_value_head_dim=V_DIM,
        linear_conv_kernel_dim=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    layer = Qwen3_5GatedDeltaNet(config, 0).float()
    inner = layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a
    with torch.no_grad():
        for linear, rows in zip(
            inner, torch.eye(config.hidden_size).split([len(x.weight) for x in inner]), strict=True
        ):
            linear.weight.copy_(rows)
        layer.out_proj = torch.nn.Identity()
        layer.norm.weight.normal_()
        layer.dt_bias.normal_()
    return layer


def empty_state(num_slots: int, dtype: torch.dtype = torch.float32) -> DeltaState:
    """In which other slots hold what must not be seen."""
    conv = torch.full((num_slots, CHANNELS, WIDTH - 1), torch.nan, dtype=dtype)
    return DeltaState(conv, torch.full((num_slots, NUM_V, K_DIM, V_DIM), torch.nan))


@pytest.mark.parametrize(
    "steps", [[(70, 1, 5)], [(1, 1, 1), (1, 1, 1)], [(3, 64, 1), (66, 1, 2), (1, 1, 1), (1, 0, 4)]]
)
def test_gated_delta_net_equals_transformers(steps: Sequence[Sequence[int]]) -> None:
    """Three sequences in steps of any lengths, in slots of any order."""
    layer = transformers_layer()
    weights = DeltaWeights(
        layer.conv1d.weight[:, 0].detach(),
        layer.A_log.detach(),
        layer.dt_bias.detach(),
        layer.norm.weight.detach(),
        layer.layer_norm_epsilon,
    )
    slots, state = [4, 0, 2], empty_state(6)
    for slot in slots:
        state.conv[slot], state.memory[slot] = 0, 0
    sequences = [torch.randn(sum(counts), layer.hidden_size) for counts in zip(*steps, strict=True)]
    with torch.no_grad():
        expected = [layer(x[None])[0] for x in sequences]
    done, outputs = [0, 0, 0], [[], [], []]
    for counts in steps:
        present = [i for i, count in enumerate(counts) if count]
        x = torch.cat([sequences[i][done[i] : done[i] + counts[i]] for i in present])
        cu_q = torch.tensor([0, *(counts[i] for i in present)]).cumsum(0)
        seqs = StateSequences(torch.tensor([slots[i] for i in present]), cu_q)
        qkvz, ba = x.split((CHANNELS + FEATURES, 2 * NUM_V), -1)
        out = TorchOps().gated_delta_net(qkvz, ba, weights, state, seqs)
        for i, part in zip(present, out.split([counts[i] for i in present]), strict=True):
            outputs[i].append(part)
            done[i] += counts[i]
    for parts, one in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), one, atol=1e-5, rtol=1e-5)
    assert state.memory[[1, 3, 5]].isnan().all()


@pytest.mark.parametrize("kernels", [False, True])
def test_drafts_of_which_a_part_holds(kernels: bool) -> None:
    """Steps of tokens that are sure and of drafts, of which some are wrong: what is right is what transformers computes
    of the right tokens alone."""
    layer = transformers_layer()
    norm = layer.norm.weight.detach(), layer.layer_norm_epsilon
    weights = DeltaWeights(layer.conv1d.weight[:, 0].detach(), layer.A_log.detach(), layer.dt_bias.detach(), *norm)
    state = DeltaState(*empty_state(3)[:2], torch.full((3, 4, layer.hidden_size), torch.nan))
    state.conv[1], state.memory[1] = 0, 0
    steps = [(5, 3, 1), (1, 4, 4), (1, 4, 0), (1, 2, 2), (66, 0, 0), (1, 0, 0), (2, 1, 1)]  # sure, tried, then right
    x = torch.randn(sum(sure + right for sure, _, right in steps), layer.hidden_size)
    with torch.no_grad():
        expected = layer(x[None])[0]
    at, held, ops = 0, 0, CpuOps(2) if kernels else TorchOps()
    for sure, tried, right in steps:
        tokens = torch.cat((x[at : at + sure + right], torch.randn(tried - right, layer.hidden_size)))
        seqs = StateSequences(*(torch.tensor(some) for some in ([1], [0, sure + tried], [held], [tried])))
        out = ops.gated_delta_net(*tokens.split((CHANNELS + FEATURES, 2 * NUM_V), -1), weights, state, seqs)
        torch.testing.assert_close(out[: sure + right], expected[at : at + sure + right], atol=1e-5, rtol=1e-5)
        at, held = at + sure + right, right
    assert state.memory[[0, 2]].isnan().all()


def test_a_convolution_takes_in_what_held() -> None:
    """Of a draft, as `F.conv1d` computes the right tokens alone."""
    weight, gated = torch.randn(6, WIDTH), torch.randn(14, 18)
    before, behind, x = gated.chunk(3, -1)
    padded = F.pad((before * x).T[None], (WIDTH - 1, 0))
    expected = behind * F.conv1d(padded, weight[:, None], groups=6)[0].T
    state, at, held = [torch.zeros(2, 6, WIDTH - 1), torch.zeros(2, 3, 18)], 0, 0
    for sure, tried, right in [(3, 3, 2), (1, 3, 0), (1, 2, 2), (2, 0, 0), (1, 1, 1), (1, 0, 0)]:
        tokens = torch.cat((gated[at : at + sure + right], torch.randn(tried - right, 18)))
        seqs = StateSequences(*(torch.tensor(some) for some in ([1], [0, sure + tried], [held], [tried])))
        out = TorchOps().short_conv(tokens, weight, None, state, seqs)
        torch.testing.assert_close(out[: sure + right], expected[at : at + sure + right], atol=1e-5, rtol=1e-5)
        at, held = at + sure + right, right
    assert at == len(gated)
