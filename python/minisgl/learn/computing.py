"""Checks of lessons 7 to 10: tokens from logits, a model's size, shares of ranks, and figures."""

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from minisgl.benchmark.shapes import write_shape
from minisgl.config.families import read_model_config
from minisgl.config.locate import DEMO_MODEL
from minisgl.kernel.sampling import SamplingColumns, sample_reference, uniform
from minisgl.learn import Wrong, compare

Array = npt.NDArray[np.float64]


def check_sample(sample: Callable[[list[float], float, int, float, float], int]) -> str:
    rng, generator = random.Random(7), torch.Generator().manual_seed(7)
    for position in range(300):
        logits = torch.randn(40, generator=generator) * 3
        temperature, top_k, top_p = rng.choice([0.0, 0.5, 1.0, 2.0]), rng.choice([0, 1, 5]), rng.choice([1.0, 0.9, 0.3])
        columns = SamplingColumns.of(1, seed=1, position=position, temperature=temperature, top_k=top_k, top_p=top_p)
        out = torch.empty(1, dtype=torch.int32)
        sample_reference(logits[None], columns, out)
        call = (logits.tolist(), temperature, top_k, top_p, float(uniform(columns["seed"], columns["position"])))
        compare(f"sample{call}", int(out), sample(*call))
    return "300 tokens, drawn as the sampler draws them."


def check_sizes(num_weights: Callable[[dict[str, Any]], int], kv_bytes: Callable[[dict[str, Any]], int]) -> str:
    with safe_open(DEMO_MODEL / "model.safetensors", "np") as file:
        stored = int(sum(np.prod(file.get_slice(n).get_shape()) for n in file.keys() if n[:4] != "mtp."))  # noqa: SIM118
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    compare("num_weights(of the built-in model)", stored, num_weights(config))
    for shape in ("qwen3-0.6b", "qwen3-14b"):
        with tempfile.TemporaryDirectory() as folder:
            model = read_model_config(write_shape(shape, folder))
            config = json.loads((Path(folder) / "config.json").read_text())
        compare(f"kv_bytes(of {shape})", model.kv_bytes_per_token("bfloat16"), kv_bytes(config))
    return f"{stored:,} weights in the built-in model, counted by you and in its file."


def check_part(part: Callable[[str, Array, int, int], Array]) -> str:
    shapes = dict.fromkeys(("q_proj", "gate_proj", "up_proj"), (32, 24)) | dict.fromkeys(("k_proj", "v_proj"), (16, 24))
    shapes |= dict.fromkeys(("o_proj", "down_proj"), (24, 32))
    for (name, (rows, columns)), size in product(shapes.items(), (1, 2, 4)):
        weight = np.arange(rows * columns, dtype=np.float64).reshape(rows, columns)
        for rank, share in enumerate(np.split(weight, size, axis=int(name in ("o_proj", "down_proj")))):
            got = np.asarray(part(name, weight, rank, size))
            call = f"part({name!r}, [{rows}, {columns}], {rank}, {size})"
            compare(f"the shape of {call}", share.shape, got.shape)
            if not np.array_equal(share, got):
                raise Wrong(f"{call} has the right shape, but holds other rows or columns: it begins {got[:1, :3]}")
    return "Seven weights, one to four ranks."


def check_speedup(speedup: Callable[[Sequence[float], Sequence[float]], float]) -> str:
    rng = random.Random(10)
    for _ in range(20):
        load = [rng.choice([1.0, 1.1, 2.5]) for _ in range(7)]  # what others do on the machine, pair by pair
        before, after = [10 * one for one in load], [rng.uniform(7, 9) * one for one in load]
        after[rng.randrange(7)] *= 4  # and once they hit one of a pair alone
        expected = sorted(b / a for b, a in zip(before, after, strict=True))[3]
        compare(f"speedup({before}, {after})", round(expected, 6), round(speedup(before, after), 6))
    return "20 noisy comparisons, and the noise did not fool it."
