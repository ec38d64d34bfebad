"""Train the demo model: `python tools/demo_model/train.py --data DIR --model DIR`.

The network is Qwen3's, written out here so that packed documents can be masked from each other and compiled; its
parameters carry Hugging Face's names, and the export is an ordinary checkpoint. On several GPUs of one machine:
`torchrun --nproc-per-node 4 tools/demo_model/train.py ...`; each then takes `--rows` rows in a step.
"""

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from model_files import CONFIG, CONTEXT, write_small_files
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

HIDDEN, HEAD_DIM = CONFIG["hidden_size"], CONFIG["head_dim"]
NUM_HEADS, NUM_KV_HEADS = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
LOSS_BIT = 1 << 15


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.size(-1),), weight.float(), CONFIG["rms_norm_eps"]).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm; `mask` is a flex BlockMask on a GPU, a boolean tensor elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, NUM_HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, NUM_KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, NUM_KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(NUM_HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.q_norm = Norm(HEAD_DIM)
        self.k_norm = Norm(HEAD_DIM)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, NUM_HEADS, HEAD_DIM)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, NUM_KV_HEADS, HEAD_DIM)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, NUM_KV_HEADS, HEAD_DIM).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if isinstance(mask, BlockMask):
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout of Hugging Face; cos and sin: [length, head_dim]."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, CONFIG["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(HIDDEN, CONFIG["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(CONFIG["intermediate_size"], HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """`dropout` is the share of what attention and MLP add that training leaves out."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = Attention()
        self.mlp = MLP()
        self.input_layernorm = Norm(HIDDEN)
        self.post_attention_layernorm = Norm(HIDDEN)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask), self.dropout)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout)


class Decoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], HIDDEN)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = Norm(HIDDEN)


class Qwen3(nn.Module):
    """Token ids [batch, length] to hidden states [batch, length, hidden]; the embedding is also the LM head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = Decoder(dropout)
        inverse = 1.0 / CONFIG["rope_theta"] ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angles = torch.arange(CONTEXT).float()[:, None] * inverse
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), dim=-1).sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 if "embed" in name else 0.5 / math.sqrt(parameter.size(1)))
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, mask: Any) -> Tensor:
        length = ids.size(1)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, self.cos[:length], self.sin[:length], mask)
        return self.model.norm(x)


def weighted_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy under `weights`, in float32."""
    logits = (hidden @ head.t().to(hidden.dtype)).float()
    losses = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), reduction="none")
    return (losses * weights.reshape(-1)).sum() / weights.sum().clamp(min=1.0)


class Muon:
    """Momentum orthogonalised by a Newton-Schulz iteration, for the weight matrices (Jordan et al., 2024).

    Matrices of one shape are updated together, because seventy small iterations one by one would cost more than the
    model's own step.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, decay: float, momentum: float = 0.95) -> None:
        self.lr, self.momentum, self.decay = lr, momentum, decay
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.groups = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grads = torch.stack([p.grad for p in group if p.grad is not None]).float()
            buffer.lerp_(grads, 1 - self.momentum)
            update = orthogonalise(grads.lerp(buffer, self.momentum))
            lr = self.lr * scale
            step = lr * max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            torch._foreach_mul_(tuple(group), 1 - lr * self.decay)
            torch._foreach_add_(tuple(group), list((update * -step).unbind()))


def orthogonalise(matrices: Tensor) -> Tensor:
    """[count, rows, columns]: each matrix with its singular values moved near one, by five quintic steps."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Rows:
    """All packed rows, on the device, in a seeded order that starts anew after each pass."""

    def __init__(self, data_dir: Path, device: str, seed: int) -> None:
        tokens = np.concatenate([np.load(path) for path in sorted(data_dir.glob("tokens_*.npy"))])
        numbers = np.concatenate([np.load(path) for path in sorted(data_dir.glob("numbers_*.npy"))])
        self.tokens = torch.from_numpy(tokens.view(np.int16)).to(device)
        self.numbers = torch.from_numpy(numbers).to(device)
        self.random = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)
        self.device = device

    def next(self, count: int, prompt_weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs, targets, loss weights and document numbers, each [count, CONTEXT]."""
        while len(self.order) < count:
            self.order = torch.cat((self.order, torch.randperm(len(self.tokens), generator=self.random)))
        rows, self.order = self.order[:count].to(self.device), self.order[count:]
        raw = self.tokens[rows].int() & 0xFFFF
        numbers = self.numbers[rows]
        ids = (raw & (LOSS_BIT - 1)).long()
        same = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] > 0)
        weights = torch.where(raw[:, 1:] >= LOSS_BIT, 1.0, prompt_weight) * same
        return ids[:, :-1], ids[:, 1:], weights, numbers[:, :-1].contiguous()


def document_mask(numbers: Tensor) -> Any:
    """Causal attention within each document."""
    if not numbers.is_cuda:
        length = numbers.size(1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return ((numbers[:, :, None] == numbers[:, None, :]) & causal)[:, None]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (numbers[batch, query] == numbers[batch, key])

    return create_block_mask(visible, numbers.size(0), None, CONTEXT, CONTEXT, device="cuda", _compile=True)


def schedule(progress: float) -> float:
    """A short warm-up, a plateau, and a linear decay to zero over the second half."""
    return min(1.0, progress / 0.01 + 0.02, 2.0 * (1.0 - progress) + 1e-3)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean over all processes, in one message."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


def steps_that_fit(args: argparse.Namespace, seconds_per_step: float) -> int:
    """How many steps `--max-seconds` leaves time for; all processes take the first one's word."""
    fit = torch.tensor(min(args.steps, int(args.max_seconds / seconds_per_step)), device=args.device)
    if dist.is_initialized():
        dist.broadcast(fit, 0)
    return int(fit)


def train(args: argparse.Namespace) -> Qwen3:
    device = args.device
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = Qwen3(args.dropout).to(device)
    if args.init:
        model.load_state_dict(load_file(args.init / "model.safetensors", device=device))
    torch.manual_seed(args.seed + rank)
    rows = Rows(args.data, device, args.seed + rank)
    parameters = list(model.parameters())
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muon = Muon(matrices, args.lr, args.decay)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    loss_of = weighted_loss
    if device == "cuda":
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
        loss_of = torch.compile(weighted_loss)
    say = print if rank == 0 else (lambda *args, **options: None)
    say(f"{sum(p.numel() for p in parameters)} parameters, {len(rows.tokens)} rows", flush=True)
    began, steps, step = 0.0, args.steps, 0
    while step < steps:
        if step == 10:  # The first steps compile; the clock of --max-seconds starts after them.
            began = time.perf_counter()
        scale = schedule(step / steps)
        ids, targets, weights, numbers = rows.next(args.rows, args.prompt_weight)
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden = model(ids, document_mask(numbers))
            loss = loss_of(hidden, model.model.embed_tokens.weight, targets, weights)
        loss.backward()
        if world > 1:
            average_gradients(parameters)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * scale
        adam.step()
        muon.step(scale)
        model.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every == 0 or step == steps:
            last = loss.item()
            elapsed = time.perf_counter() - began if began else 0.0
            if elapsed and step >= 200:
                steps = min(steps, steps_that_fit(args, elapsed / (step - 10)))
            speed = (step - 10) * args.rows * world * CONTEXT / elapsed / 1e6 if elapsed else 0.0
            say(f"step {step} of {steps} loss {last:.4f} {elapsed:.0f} s {speed:.2f} M tokens/s", flush=True)
    return model


def export(model: Qwen3, model_dir: Path) -> None:
    """Write the weights in bf16, and the small files beside them."""
    write_small_files(model_dir)
    weights = {name: tensor.to(torch.bfloat16).contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="directory of the tokenizer; the weights go there")
    parser.add_argument("--init", type=Path, help="go on from this checkpoint instead of random weights")
    parser.add_argument("--steps", type=int, default=7352)
    parser.add_argument("--max-seconds", type=float, default=800.0, help="fewer steps, if they would take longer")
    parser.add_argument("--rows", type=int, default=32, help="rows of 2,048 tokens in one step")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon")
    parser.add_argument("--adam-lr", type=float, default=0.003, help="of the embedding and the norms")
    parser.add_argument("--decay", type=float, default=0.01, help="weight decay of the matrices")
    parser.add_argument("--dropout", type=float, default=0.1, help="of what attention and MLP add")
    parser.add_argument("--prompt-weight", type=float, default=0.1, help="loss weight of what the model does not say")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = train(args)
    if not dist.is_initialized() or dist.get_rank() == 0:
        export(model, args.model)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
