"""Where families differ between two products: activations of gated MLPs, and how a router chooses experts."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(1.702 gate) * (up + 1), gate being 7 at most, and up between -7 and 7; as gpt-oss has it."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


# By the names that specifications of models use: of gate and up, activation(gate) * up.
ACTIVATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: F.silu(gate).mul_(up),
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh").mul_(up),
    "clamped_swiglu": clamped_swiglu,
}


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """[num_tokens, num_experts] → probabilities, in float32, and numbers of each token's `top_k` most probable; with
    `renormalize` a token's probabilities are made to sum to 1."""
    weights, experts = router_logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, experts
