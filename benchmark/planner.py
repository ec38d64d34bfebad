"""What planning costs the host per decode step, on one core and without a device.

    python benchmark/planner.py [--requests 256] [--page-size 16] [--steps 400]

Prints medians of `plan` and `retire` in milliseconds. Target: together under 0.5 ms for 256 running requests.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import SamplingParams, StepPlan, StepResult
from minisgl.scheduler.planner import Planner


def measure(num_requests: int, page_size: int, num_steps: int) -> tuple[float, float]:
    """Median seconds of `plan` and of `retire` over decode-only steps with one step in flight."""
    random.seed(0)
    max_seq_len = 500 + num_steps + 16
    config = SchedulerConfig(
        max_running_requests=num_requests,
        max_prefill_length=8192,
        max_seq_len=max_seq_len,
        num_pages=num_requests * (max_seq_len // page_size + 64),
        page_size=page_size,
    )
    planner = Planner(config)
    for uid in range(num_requests):
        prompt = [random.randrange(10_000) for _ in range(500)]
        planner.add(uid, prompt, SamplingParams(max_tokens=num_steps, seed=0))
    plan_seconds: list[float] = []
    retire_seconds: list[float] = []
    previous: StepPlan | None = None
    while True:
        start = time.perf_counter()
        planned = planner.plan()
        end = time.perf_counter()
        if planned is None:
            return statistics.median(plan_seconds), statistics.median(retire_seconds)
        plan = planned.plan
        if previous is not None:
            result = StepResult(previous.step_id, [(5,)] * sum(req.num_samples for req in previous.reqs))
            before = time.perf_counter()
            planner.retire(result)
            if plan.num_decode == len(plan.reqs) == num_requests:
                plan_seconds.append(end - start)
                retire_seconds.append(time.perf_counter() - before)
        previous = plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    plan, retire = measure(args.requests, args.page_size, args.steps)
    print(f"plan {plan * 1e3:.3f} ms, retire {retire * 1e3:.3f} ms, together {(plan + retire) * 1e3:.3f} ms")


if __name__ == "__main__":
    main()
