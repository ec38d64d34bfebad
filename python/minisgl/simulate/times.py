"""How long a step takes, fitted to steps that were measured (`minisgl bench --calibrate`), or to ceilings of a GPU."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from minisgl.benchmark.dataset import naming
from minisgl.benchmark.floor import Machine, kv_read, prefill_flops, weights_read
from minisgl.benchmark.shapes import read_shape
from minisgl.config.runtime import SchedulerConfig
from minisgl.core import StepPlan
from minisgl.errors import ConfigError

Share = tuple[int, int]  # of a step: the first position that is computed, and how many
Step = tuple[list[Share], Annotated[float, Meta(gt=0)]]  # its shares, and the seconds that it took


def features(shares: Iterable[Share]) -> tuple[float, ...]:
    """What a step's time is a sum of: a constant, decodes, tokens that these read, prefills, their tokens, and how many
    pairs of tokens attend to each other in them."""
    decodes = context = prefills = tokens = pairs = 0
    for start, count in shares:
        if count == 1:
            decodes, context = decodes + 1, context + start
        else:
            prefills, tokens, pairs = prefills + 1, tokens + count, pairs + count * (2 * start + count)
    return 1, decodes, context, prefills, tokens, pairs / 2


@dataclass(frozen=True, slots=True)
class Served:
    """What each replica is. about: the model, and whence the coefficients of a step's `features` are, in words.
    overhead: seconds that its API takes for a request, one after the other."""

    about: str
    config: SchedulerConfig
    coefficients: list[float]
    overhead: float = 0.0

    def seconds(self, plan: StepPlan) -> float:
        made_of = features([(start, count) for _, start, count, *_ in plan.reqs])
        return sum([weight * value for weight, value in zip(self.coefficients, made_of, strict=True)])


def fitted(about: str, config: SchedulerConfig, steps: list[Step]) -> Served:
    """No coefficient is negative, and squared errors are least in proportion to the times that they give: a step that
    was held up, or was too fast, counts for no more than others."""
    table, seconds = np.array([features(shares) for shares, _ in steps]), np.array([taken for _, taken in steps])
    predicted, used = np.full(len(seconds), seconds.mean()), np.full(table.shape[1], True)
    for _ in range(12):  # rounds of weighting; in each a negative coefficient is left out from then on
        coefficients = np.zeros(len(used))
        coefficients[used] = np.linalg.lstsq(table[:, used] / predicted[:, None], seconds / predicted, rcond=None)[0]
        used &= coefficients >= 0
        predicted = np.maximum(table @ (coefficients * used), seconds.mean() / 1000)
    error = 100 * np.median(np.abs(seconds / predicted - 1))
    return Served(f"{about}; {len(steps)} steps fitted, median error {error:.1f} %", config, coefficients.tolist())


class _Settings(Struct):
    model: str
    scheduler: SchedulerConfig


class _Calibration(Struct):  # what `minisgl bench --calibrate` writes, as far as it is read
    config: _Settings
    steps: Annotated[list[Step], Meta(min_length=16)]


def calibrated(path: str, model: str | None) -> Served:
    """model: that is meant; None: the file's. Raises: ConfigError naming file and field."""
    with naming(flag := f"--calibration {path}"):
        found = msgspec.json.decode(Path(path).read_bytes(), type=_Calibration)
    if model not in (None, found.config.model):
        raise ConfigError(f"{flag}: config.model: it is of {found.config.model}, not of --model {model}")
    return fitted(found.config.model, found.config.scheduler, found.steps)


def by_floor(shape: str, machine: Machine, efficiency: float) -> Served:
    """A server of the shape on one GPU with an H200's memory, at such a share of the machine's ceilings. Where the
    floor is not linear, as with experts, it is fitted all the same. Raises: ConfigError if the weights do not fit."""
    model, steps = read_shape(shape), list[Step]()
    for decodes, context, tokens, start in product((1, 8, 64, 256), (99, 999, 9999), (0, 64, 512, 4096), (0, 2048)):
        kv_bytes = kv_read(model, model.dtype, [context + 1] * decodes)
        seconds = (weights_read(model, model.dtype, decodes + tokens) + kv_bytes) / machine.bandwidth
        seconds += prefill_flops(model, start + tokens, start) / machine.flops if tokens else 0.0
        steps.append(([(context, 1)] * decodes + [(start, tokens)] * bool(tokens), seconds / efficiency))
    page_bytes, slots = 16 * model.kv_bytes_per_token(model.dtype), 513 if model.states else 0
    room = 0.9 * 141e9 - model.weight_bytes(model.dtype) - slots * model.state_bytes()
    if (num_pages := int(room / page_bytes)) < 1:
        raise ConfigError(f"--shape {shape}: the weights do not fit one GPU of 141 GB")
    limits, snapshots = (256, 8192, model.max_position, num_pages, 16), slots // 2
    config = SchedulerConfig(*limits, has_states=slots > 0, num_snapshots=snapshots)
    return fitted(f"{shape}, {100 * efficiency:.0f} % of {machine}", config, steps)
