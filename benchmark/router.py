"""What the cluster's router takes for a request, on one core: microseconds of processor time.

    python benchmark/router.py [--replicas 1000] [--prefixes 100000]

Each prefix is 1,024 bytes that one replica has been sent; one more is known to all of them. Prompts of 4,096 bytes
begin with a known prefix, with that of all, or with nothing known. Goal: `choose` within 200 µs.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np

from minisgl.cluster.router import PrefixRouter, Prompt, text_blocks

PREFIX, PROMPT = 1024, 4096  # bytes


def taken(work: list[float], begun: float) -> float:
    now = time.thread_time()
    work.append(1e6 * (now - begun))
    return time.thread_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--prefixes", type=int, default=100_000)
    args = parser.parse_args()
    rng, router = random.Random(0), PrefixRouter("prefix", 0)
    names = [f"replica-{number}" for number in range(args.replicas)]
    router.set_replicas(names)
    router.loads |= {name: rng.uniform(0, 20_000) for name in names}
    texts = [rng.randbytes(PREFIX) for _ in range(args.prefixes)]
    for number, text in enumerate(texts):
        router.learn(names[number % len(names)], Prompt(text_blocks(text), PREFIX))
    shared = rng.randbytes(PREFIX)
    for name in names:
        router.learn(name, Prompt(text_blocks(shared), PREFIX))
    for kind, begins in (("one replica has it", texts), ("all have it", [shared]), ("nobody has it", [b""])):
        hashing, choosing, learning = list[float](), list[float](), list[float]()
        for _ in range(2000):
            text = rng.choice(begins)
            text += rng.randbytes(PROMPT - len(text))
            begun = time.thread_time()
            prompt = Prompt(text_blocks(text), len(text))
            begun = taken(hashing, begun)
            chosen = router.choose(prompt) or ""
            begun = taken(choosing, begun)
            router.learn(chosen, prompt)
            taken(learning, begun)
        shown = (("hash", hashing), ("choose", choosing), ("learn", learning))
        cells = [f"{what} {np.median(times):5.1f} (99 %: {np.percentile(times, 99):5.1f})" for what, times in shown]
        print(f"{kind:20}" + ", ".join(cells) + " µs")


if __name__ == "__main__":
    main()
