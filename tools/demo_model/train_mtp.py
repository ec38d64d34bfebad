"""Train the demo model's head for multi-token prediction: `python tools/demo_model/train_mtp.py --data DIR --model DIR`.

The head sees what the model made of a token and the token that follows, and says which one comes after that; fed with
its own result it goes on (DeepSeek-V3, arXiv 2412.19437, section 2.2; names and order as in Qwen3-Next's checkpoints).
The model itself stays as it is. What is trained on are the rows that `prepare.py` made.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from model_files import CONTEXT, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train import HIDDEN, Layer, Muon, Norm, Qwen3, Rows, document_mask, schedule

DEPTH_WEIGHTS = (1.0, 0.7, 0.5)  # of the losses of the first token, the second, and the third
FILE = "model.safetensors"


class Head(nn.Module):
    """One decoder layer, which reads [batch, length, hidden] twice: of the tokens that follow, and of the model."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = Norm(HIDDEN), Norm(HIDDEN), Norm(HIDDEN)
        self.fc = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        layer = Layer(0.0)
        layer.mlp.gate_proj, layer.mlp.up_proj = (nn.Linear(HIDDEN, inner, bias=False) for _ in range(2))
        layer.mlp.down_proj = nn.Linear(inner, HIDDEN, bias=False)
        self.layers = nn.ModuleList([layer])
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.5 / parameter.size(1) ** 0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
        with torch.no_grad():  # at first it passes on what the model said
            self.fc.weight[:, HIDDEN:] += torch.eye(HIDDEN)

    def forward(self, following: Tensor, hidden: Tensor, model: Qwen3, mask: Tensor) -> Tensor:
        x = self.fc(torch.cat((self.pre_fc_norm_embedding(following), self.pre_fc_norm_hidden(hidden)), -1))
        length = x.size(1)
        return self.norm(self.layers[0](x, model.cos[:length], model.sin[:length], mask))


def losses(head: Head, model: Qwen3, batch: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Of one batch: the loss to be lowered; of each depth the loss, and the share of tokens that are foreseen."""
    ids, targets, weights, numbers = batch
    mask, table = document_mask(numbers), model.model.embed_tokens.weight
    with torch.no_grad():
        hidden, embedded = model(ids, mask), model.model.embed_tokens(targets)
    total, each, right = torch.zeros((), device=ids.device), [], []
    for depth, weight in enumerate(DEPTH_WEIGHTS, 1):
        hidden = head(embedded, hidden, model, mask)  # at i: of the token at i + 2
        counts = (weights[:, 1:] > 0.5) & (numbers[:, 1:] == numbers[:, :-1])
        counts[:, depth - 1 :] &= numbers[:, depth - 1 : -1] == numbers[:, :-depth]
        counts[:, : depth - 1] = False
        logits = (hidden[:, :-1][counts] @ table.t().to(hidden.dtype)).float()
        wanted = targets[:, 1:][counts]
        each.append(F.cross_entropy(logits, wanted))
        right.append((logits.argmax(-1) == wanted).float().mean())
        total = total + weight * each[-1]
        hidden = F.pad(hidden[:, :-1], (0, 0, 1, 0))  # as the model's, of what it said one token before
    return total, each, right


def cut(batch: tuple[Tensor, ...], length: int) -> tuple[Tensor, ...]:
    """Shorter rows, of which the same step has more."""
    return tuple(part.reshape(-1, length) for part in batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the model's directory; the head goes there")
    parser.add_argument("--go-on", action="store_true", help="from the head that is there, instead of random weights")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--max-seconds", type=float, default=3600.0, help="the learning rate falls by what is left")
    parser.add_argument("--rows", type=int, default=2, help="rows of 2,048 tokens in one step")
    parser.add_argument("--length", type=int, default=512, help="these are cut into")
    parser.add_argument("--inner", type=int, default=512, help="features of the head's MLP")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon")
    parser.add_argument("--adam-lr", type=float, default=0.003, help="of the norms")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    assert CONTEXT % args.length == 0
    model = Qwen3().to(args.device)
    stored = {name: weight.float() for name, weight in load_file(args.model / FILE).items()}
    model.load_state_dict({name: weight for name, weight in stored.items() if not name.startswith("mtp.")})
    model.requires_grad_(False)
    head = Head(args.inner).to(args.device)
    if args.go_on:
        head.load_state_dict({k.removeprefix("mtp."): v for k, v in stored.items() if k.startswith("mtp.")})
    rows = Rows(args.data, args.device, args.seed)
    muon = Muon([p for p in head.parameters() if p.dim() == 2], args.lr, 0.01)
    adam = torch.optim.AdamW([p for p in head.parameters() if p.dim() != 2], lr=args.adam_lr, weight_decay=0.0)
    began, progress, step = time.perf_counter(), 0.0, 0
    while progress < 1:
        with torch.autocast(args.device, dtype=torch.bfloat16):
            total, each, right = losses(head, model, cut(rows.next(args.rows, 0.0), args.length))
        total.backward()  # type: ignore[no-untyped-call]
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * schedule(progress)
        adam.step()
        muon.step(schedule(progress))
        head.zero_grad(set_to_none=True)
        step += 1
        seconds = time.perf_counter() - began
        progress = max(step / args.steps, seconds / args.max_seconds)
        if step % args.log_every == 0 or progress >= 1:
            shown = ", ".join(f"{loss:.3f} {share:.1%}" for loss, share in zip(each, right, strict=True))
            print(f"step {step}, {progress:.0%}, {seconds:.0f} s: {shown}", flush=True)
    weights = {f"mtp.{k}": v.to(torch.bfloat16).contiguous().cpu() for k, v in head.state_dict().items()}
    save_file(load_file(args.model / FILE) | weights, args.model / FILE, metadata={"format": "pt"})
    config = json.loads((args.model / "config.json").read_text())
    write_json(args.model / "config.json", config | {"mtp_num_hidden_layers": 1, "mtp_intermediate_size": args.inner})


if __name__ == "__main__":
    main()
