"""How close logits of GGUF files are to those of the same values in float32: minisgl and llama.cpp, side by side.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python
    python -m benchmark.cpu.quality MODEL.gguf|built-in [--types Q4_0,Q4_K_M] [--kv-cache-dtype int8] [--work-dir DIR]

Without --types the file is compared as it is; with them, files that llama.cpp makes of it. The reference is
transformers with the blocks dequantized by the `gguf` package. Prints a Markdown table. For the texts of quality.yaml,
computed at once: the Kullback-Leibler divergence from the reference (nats) and its standard error, the root of the mean
squared difference of logits and the largest difference, perplexity, and how often the likeliest token is the
reference's. For the reference's greedy continuations, computed token by token: the divergence, and how many tokens of
32 come before the first that is another than the reference's. The last two columns are ours less llama.cpp's
divergence, at once and by one, in standard errors of the mean difference: between -2 and 2 they cannot be told apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml

from benchmark.cpu import checkpoint

NUM_TOKENS = 32
MAX_LEN = 512
TABLE = yaml.safe_load(Path(__file__).with_name("quality.yaml").read_text(encoding="utf-8"))
DOCUMENTS = Path(__file__).parents[2]
Logits = Callable[[Sequence[int], int], torch.Tensor]  # ids, and how many at a time → [len(ids), vocab], float32


@dataclass(frozen=True, slots=True)
class Sample:
    """Sequences, and what the reference makes of them. starts: where its continuations begin."""

    texts: list[list[int]]
    continued: list[list[int]]
    starts: list[int]
    text_logits: list[torch.Tensor]
    continued_logits: list[torch.Tensor]


def reference(path: Path, place: Path, tokenizer: Any, before: Sample | None) -> Sample:
    """Of the file's values in float32, by transformers. place: the model that it was made of; before: another type's
    sample, whose continuations are taken over."""
    import transformers

    transformers.logging.disable_progress_bar()
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if place.is_dir():  # of a file transformers does not read the size of heads
        source["config"] = transformers.AutoConfig.from_pretrained(place)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    documents = [(DOCUMENTS / name).read_text(encoding="utf-8") for name in TABLE["documents"]]
    texts = [tokenizer.encode(text[: 8 * MAX_LEN])[:MAX_LEN] for text in TABLE["texts"] + documents]
    prompts = [tokenizer.encode(prompt) for prompt in TABLE["prompts"]]
    with torch.inference_mode():
        continued = before.continued if before else []
        for prompt in prompts if before is None else ():
            ids, cache = list(prompt), None
            for _ in range(NUM_TOKENS):
                out = model(torch.tensor([ids if cache is None else ids[-1:]]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                ids.append(int(out.logits[0, -1].argmax()))
            continued.append(ids[:-1])
        logits = [model(torch.tensor([ids])).logits[0].float() for ids in texts + continued]
    split = len(texts)
    return Sample(texts, continued, [len(prompt) - 1 for prompt in prompts], logits[:split], logits[split:])


def minisgl_logits(path: Path, options: dict[str, Any]) -> Logits:
    """With what minisgl chooses for the file and the machine, beside the options."""
    from minisgl.config.args import args_from_options
    from minisgl.config.resolve import prepare
    from minisgl.core import Admission, PageUpdate, SamplingParams, ScheduledReq, StepPlan
    from minisgl.engine.cpu import create_steps
    from minisgl.engine.tables import StepIndex

    given = {"model": str(path), "max_seq_len": MAX_LEN, "device": "cpu", **options}
    engine = prepare(args_from_options(given)).engine
    steps = create_steps(engine, 0)
    pages, greedy = tuple(range(-(-MAX_LEN // engine.page_size))), SamplingParams(temperature=0.0, seed=0)

    def logits(ids: Sequence[int], at_once: int) -> torch.Tensor:
        parts = []
        for start in range(0, len(ids), at_once):
            size = min(at_once, len(ids) - start)
            admissions = () if start else (Admission(0, np.array(ids, dtype=np.int32), greedy),)
            updates, reqs = () if start else (PageUpdate(0, 0, pages),), (ScheduledReq(0, start, size, 1),)
            plan = StepPlan(start, admissions, updates, reqs, num_decode=int(size == 1))
            steps.tables.host.apply(plan)
            index = StepIndex.of(plan.reqs)
            steps.tables.send(plan, index)
            parts.append(steps.forward(steps.batch(index, plan.num_decode)).logits(torch.arange(size)).float().clone())
        return torch.cat(parts)

    return logits


def llama_logits(path: Path, num_threads: int) -> Logits:
    """llama.cpp as it comes, with a KV cache in F16."""
    from llama_cpp import Llama

    options = {"n_ctx": MAX_LEN, "n_batch": MAX_LEN, "n_threads": num_threads, "n_threads_batch": num_threads}
    model = Llama(str(path), logits_all=True, verbose=False, **cast(Any, options))

    def logits(ids: Sequence[int], at_once: int) -> torch.Tensor:
        model.reset()
        for start in range(0, len(ids), at_once):
            model.eval(list(ids[start : start + at_once]))
        return torch.from_numpy(model.scores[: len(ids)].copy()).float()

    return logits


def quantized(path: Path, kind: str, work_dir: Path) -> Path:
    """The file in another type, by llama.cpp."""
    import ctypes

    import llama_cpp

    made = work_dir / f"{path.stem}-{kind}.gguf"
    if not made.is_file():
        params = llama_cpp.llama_model_quantize_default_params()
        params.pure = kind == "MXFP4"  # which it would keep for experts
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}{'_MOE' if params.pure else ''}")
        params.allow_requantize = True
        partial = made.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(str(path).encode(), str(partial).encode(), ctypes.byref(params)):
            raise SystemExit(f"llama.cpp cannot make {kind} of {path}")
        partial.rename(made)
    return made


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL of each position, in nats; logits: [n, vocab]."""
    p, q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def perplexity(sample: Sample, logits: list[torch.Tensor]) -> float:
    """Of the texts."""
    pairs = zip(logits, sample.texts, strict=True)
    losses = [
        torch.nn.functional.cross_entropy(part[:-1], torch.tensor(ids[1:]), reduction="none") for part, ids in pairs
    ]
    return float(torch.cat(losses).mean().exp())


def row(sample: Sample, engine: Logits) -> tuple[list[str], list[torch.Tensor]]:
    """What the table says about an engine, and each position's divergence at once and by one."""
    logits = [engine(ids, MAX_LEN) for ids in sample.texts]
    told, seen = torch.cat(sample.text_logits), torch.cat(logits)
    difference = told - seen
    single = [engine(ids, 1) for ids in sample.continued]
    by_one = [divergence(*pair) for pair in zip(sample.continued_logits, single, strict=True)]
    same = []
    for expected, part, start in zip(sample.continued_logits, single, sample.starts, strict=True):
        equal = (expected.argmax(-1) == part.argmax(-1))[start:].tolist()
        same.append(equal.index(False) if False in equal else len(equal))
    at_once, single_kl = divergence(told, seen), torch.cat(by_one)
    columns = [
        f"{float(at_once.mean()):.2e} ± {float(at_once.std()) / len(at_once) ** 0.5:.0e}",
        f"{float(difference.square().mean().sqrt()):.4f}",
        f"{float(difference.abs().max()):.3f}",
        f"{perplexity(sample, logits):.3f}",
        f"{100 * float((told.argmax(-1) == seen.argmax(-1)).float().mean()):.1f}",
        f"{float(single_kl.mean()):.2e}",
        f"{sum(same) / len(same):.1f}",
    ]
    return columns, [at_once, single_kl]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """The mean difference, in its standard errors."""
    difference = ours - theirs
    return f"{float(difference.mean() / difference.std() * len(difference) ** 0.5):+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file, or built-in")
    parser.add_argument("--types", default="", help="as llama.cpp names them, with commas between")
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/minisgl-quality"))
    parser.add_argument("--tokenizer", type=Path, help="where the file has none")
    parser.add_argument("--kv-cache-dtype", help="ours")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    from minisgl.config.locate import load_tokenizer

    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    place = checkpoint.prepare(args.model, args.work_dir)
    model = place if place.is_file() else checkpoint.write_gguf(place, "BF16", args.work_dir)
    tokenizer = load_tokenizer(str(args.tokenizer or place))
    kinds = [kind for kind in args.types.split(",") if kind]
    print("| type | engine | KL | RMS | largest | perplexity | same token, % | KL by one | greedy, of 32 | beside | |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    sample: Sample | None = None
    for kind in kinds or [model.stem]:
        path = quantized(model, kind, args.work_dir) if kinds else model
        sample = reference(path.resolve(), place, tokenizer, sample)
        exact = f"{perplexity(sample, sample.text_logits):.3f}"
        print(f"| {kind} | float32 | 0 | 0 | 0 | {exact} | 100 | 0 | {NUM_TOKENS} | | |")
        theirs, their_kl = row(sample, llama_logits(path, args.threads))
        options = {"cpu_threads": args.threads, "kv_cache_dtype": args.kv_cache_dtype}
        ours, our_kl = row(sample, minisgl_logits(path, options))
        beside = [distance(*pair) for pair in zip(our_kl, their_kl, strict=True)]
        print(f"| | minisgl | {' | '.join(ours + beside)} |")
        print(f"| | llama.cpp | {' | '.join(theirs)} | | |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
