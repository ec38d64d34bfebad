"""One decode step on a GPU, kernel by kernel, beside what it must read; and how long the GPU is idle.

    python benchmark/profile_step.py [--shape qwen3-0.6b] [--batch 1] [--context 1000] [--overlap on off] [flags]

Further flags go to the engine (`--attn triton`, `--tp 2`: rank 0 is shown). Each setting of overlap is a fresh process.
Prints Markdown: a table of kernels (per step: launches, time, bytes that must be read, share of the floor), then the
idle time between and inside steps. With programmatic dependent launch kernels overlap, so that times may add up to more
than the step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from minisgl.benchmark import run_script
from minisgl.benchmark.floor import kv_read, measure_gpu, weights_read
from minisgl.benchmark.shapes import write_shape
from minisgl.config.args import parse_args
from minisgl.config.model import DTYPE_BYTES, ModelConfig, MoE

WARM_STEPS = 24
# The first kernel of a step, and what ends one: between the two the host may keep the GPU waiting.
FIRST = re.compile(r"prepare_kernel|embed|indexSelect", re.IGNORECASE)
LAST = re.compile(r"sample|store_ids|argmax|Memcpy DtoH", re.IGNORECASE)
# Kernels by name, the first that matches. Products of unnamed libraries are told apart by their order in the step.
ROLES = [
    ("attention", r"stream_kernel|cluster_kernel|decode_kernel|attn|attention|flash|fmha|BatchDecode|BatchPrefill"),
    ("", r"merge|combine|reduce"),
    ("gate_up", r"gate_up"),
    ("down", r"down"),
    ("product", r"gemm|gemv|skinny|packed_|linear|matmul|nvjet|xmma|cutlass"),
]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that ran on the GPU. Microseconds."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


def read_trace(path: Path) -> list[Event]:
    """Kernels, copies and fills of a Chrome trace, in order of their start."""
    rows = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [Event(r["name"], float(r["ts"]), float(r["dur"])) for r in rows if r.get("cat") in kinds]
    return sorted(events, key=lambda event: event.start)


def split_steps(events: list[Event], num_steps: int) -> list[list[Event]]:
    """Whole steps, each from its first kernel on, without the first two and the last, which the profiler disturbs."""
    counts = Counter(event.name for event in events)
    once = [name for name, count in counts.items() if abs(count - num_steps) <= 4]
    named = [name for name in once if FIRST.search(name)]
    if not once:
        raise SystemExit(f"no kernel runs once a step: {counts.most_common(40)}")
    first = min(named or once, key=lambda name: next(i for i, event in enumerate(events) if event.name == name))
    starts = [i for i, event in enumerate(events) if event.name == first]
    return [events[a:b] for a, b in itertools.pairwise(starts)][2:-1]


def idle_times(steps: list[list[Event]]) -> tuple[list[float], list[float], list[float]]:
    """Microseconds in which nothing runs: between steps (from the end of sampling to the first kernel of the next step)
    and inside them, one value for each step; and every single gap."""
    between, inside, gaps = [], [], []
    flat = [(event, index) for index, step in enumerate(steps) for event in step]
    busy_until, open_gap, current = flat[0][0].end, 0.0, [0.0, 0.0]
    after_last = False
    for (event, step), (_, previous) in zip(flat[1:], flat, strict=False):
        gap = max(0.0, event.start - busy_until)
        gaps.append(gap)
        if step != previous:
            between.append(open_gap + gap)
            inside.append(current[0])
            current, after_last, open_gap = [0.0, 0.0], False, 0.0
        elif after_last:
            open_gap += gap
        else:
            current[0] += gap
        if LAST.search(event.name):
            after_last, current[0], open_gap = True, current[0] + open_gap, 0.0
        busy_until = max(busy_until, event.end)
    return between, inside, gaps


def experts_of(model: ModelConfig) -> MoE | None:
    return next((layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)), None)


def role_bytes(model: ModelConfig, dtype: str, lengths: list[int], tp_size: int) -> dict[str, float]:
    """Bytes that the kernels of each role read in one step on one rank."""
    layer = model.hidden_size * DTYPE_BYTES[dtype] * model.num_layers
    query = model.num_qo_heads * model.head_dim / tp_size
    sizes = {
        "attention": kv_read(model, dtype, lengths, tp_size),
        "qkv": (query + 2 * max(1, model.num_kv_heads // tp_size) * model.head_dim) * layer,
        "o": query * layer,
        "head": model.vocab_size * model.hidden_size * DTYPE_BYTES[dtype] / tp_size,
    }
    if (moe := experts_of(model)) is not None:
        sizes["router"] = moe.num_experts * layer
    experts = weights_read(model, dtype, len(lengths), tp_size) - sizes["qkv"] - sizes["o"] - sizes["head"]
    experts -= sizes.get("router", 0) + 2 * layer  # norms
    return sizes | {"gate_up": experts * 2 / 3, "down": experts / 3}


def roles_of(step: list[Event], model: ModelConfig) -> list[str]:
    """What each event of a step does, "" if not known. Products come in the order of the layer, then the head; where
    there is another number of them, they stay "product"."""
    roles = [next((role for role, words in ROLES if re.search(words, e.name, re.IGNORECASE)), "") for e in step]
    order = ["qkv", "o", "router"] if experts_of(model) else ["qkv", "o", "gate_up", "down"]
    order = [role for role in order if role not in roles] * model.num_layers + ["head"]
    if roles.count("product") != len(order):
        return roles
    names = iter(order)
    return [next(names) if role == "product" else role for role in roles]


def short(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and parameters."""
    while (plain := re.sub(r"<[^<>]*>|\([^()]*\)", "", name)) != name:
        name = plain
    return name.split("::")[-1].split()[-1][:48] if name.split() else name


def print_report(args: argparse.Namespace, engine: Any, lengths: list[int], events: list[Event]) -> None:
    """All tables. lengths: of the requests' contexts, the new token included."""
    steps = split_steps(events, args.steps)
    wall = statistics.median(b[0].start - a[0].start for a, b in itertools.pairwise(steps))
    shape, tp_size = (engine.model, engine.dtype), engine.tp_size
    num_bytes = kv_read(*shape, lengths, tp_size) + weights_read(*shape, len(lengths), tp_size)
    floor = 1e6 * num_bytes / args.bandwidth
    print(
        f"### {args.shape}, batch {len(lengths)}, context {statistics.mean(lengths):.0f}, overlap {args.overlap[0]}\n"
    )
    print(
        f"Attention: {engine.prefill_backend},{engine.decode_backend}. A step takes {wall:.1f} us (median of ", end=""
    )
    print(f"{len(steps)}); floor {floor:.1f} us, {100 * floor / wall:.1f} % of it reached.\n")
    roles = [roles_of(step, engine.model) for step in steps]
    print_kernels(steps, roles, role_bytes(*shape, lengths, tp_size), args.bandwidth)
    print("\n| idle | median, us | p99, us |\n|---|---|---|")
    for name, values in zip(("between steps", "inside a step", "single gap"), idle_times(steps), strict=True):
        ordered = sorted(values)
        print(f"| {name} | {statistics.median(ordered):.2f} | {ordered[int(0.99 * (len(ordered) - 1))]:.2f} |")
    print(flush=True)


def print_kernels(steps: list[list[Event]], roles: list[list[str]], sizes: dict[str, float], bandwidth: float) -> None:
    """The kernels of a step by the time that they take. roles: of each step's events; sizes: bytes by role."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for names, step in zip(roles, steps, strict=True):
        for role, event in zip(names, step, strict=True):
            total = totals[role, short(event.name)]
            total[0] += 1 / len(steps)
            total[1] += event.duration / len(steps)
    times: Counter[str] = Counter()
    for (role, _), (_, duration) in totals.items():
        times[role] += duration  # type: ignore[assignment]
    print("| role | kernel | launches | us | MB | floor, us | share |\n|---|---|---|---|---|---|---|")
    for (role, name), (count, duration) in sorted(totals.items(), key=lambda item: -item[1][1]):
        cells = " | | "
        if role in sizes:  # several kernels of one role share its bytes by their time
            num_bytes = sizes[role] * duration / times[role]
            least = 1e6 * num_bytes / bandwidth
            cells = f"{num_bytes / 1e6:.2f} | {least:.1f} | {100 * least / duration:.0f} %"
        print(f"| {role} | `{name}` | {count:g} | {duration:.1f} | {cells} |")
    print(f"| all | | {sum(n for n, _ in totals.values()):g} | {sum(d for _, d in totals.values()):.1f} | | | |")


def profile(args: argparse.Namespace, flags: list[str]) -> None:
    """Run the engine, and print the report of its steps."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from minisgl import LLM, SamplingParams
    from minisgl.benchmark.offline import engine_options
    from minisgl.llm import Pending

    if not torch.cuda.is_available():
        raise SystemExit("profile_step.py needs a GPU")
    rng = Random(0)
    num_tokens = WARM_STEPS + args.steps + 32 + args.batch * args.context // 1024  # the first wait for the last
    prompts = [[rng.randint(0, 10_000) for _ in range(args.context)] for _ in range(args.batch)]
    params = SamplingParams(num_tokens, 0.6, ignore_eos=True)
    with tempfile.TemporaryDirectory() as directory:
        trace = args.trace or Path(directory) / "trace.json"
        options = engine_options(parse_args(flags))
        options |= {"model_path": str(write_shape(args.shape, directory)), "dummy_weight": True}
        options |= {"disable_overlap": args.overlap == ["off"]}

        class ProfiledLLM(LLM):
            """Profiles the turns after every request has had WARM_STEPS tokens."""

            turns_left = -1
            profiler: Any = None
            lengths: list[int]

            def turn(self) -> list[Pending]:
                ended = super().turn()
                counts = [len(pending.replies) for pending in self.pending.values()]
                if self.profiler and self.turns_left < 0 and min(counts, default=0) >= WARM_STEPS:
                    self.turns_left = args.steps
                    self.lengths = [args.context + count + args.steps // 2 for count in counts]
                    self.profiler.start()
                elif self.turns_left > 0:
                    self.turns_left -= 1
                    if not self.turns_left:
                        self.profiler.stop()
                return ended

        llm = ProfiledLLM(options.pop("model_path"), **options)
        with llm:
            llm.generate(prompts[:1], SamplingParams(8, 0.6, ignore_eos=True), progress=False)
            with torch_profile(activities=[ProfilerActivity.CUDA]):  # the first use takes long
                time.sleep(0.1)
            llm.profiler = torch_profile(activities=[ProfilerActivity.CUDA])
            llm.generate(prompts, params, progress=False)
            llm.profiler.export_chrome_trace(str(trace))
            print_report(args, llm.config.engine, llm.lengths, read_trace(trace))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1000, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=24, help="steps to profile")
    parser.add_argument("--overlap", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--bandwidth", type=float, help="bytes/s (default: measured)")
    parser.add_argument("--trace", type=Path, help="keep the Chrome trace here")
    args, flags = parser.parse_known_args()
    parse_args(flags)  # a wrong one is told once
    if args.bandwidth is None and (machine := measure_gpu()) is not None:
        args.bandwidth = machine.bandwidth
        sys.argv += ["--bandwidth", str(machine.bandwidth)]  # for the processes below
        print(f"ceilings of {machine}")
    if len(args.overlap) == 1:
        profile(args, flags)
        return
    for overlap in args.overlap:  # the last one given counts
        subprocess.run([sys.executable, *sys.argv, "--overlap", overlap], check=False)


if __name__ == "__main__":
    run_script(main)
