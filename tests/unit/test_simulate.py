"""`minisgl simulate`: what becomes of each request, beside the real scheduler's loop, a formula, and what files say."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minisgl import simulate
from minisgl.benchmark.floor import Machine
from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Masks, SamplingParams, StepPlan, StepResult
from minisgl.errors import ConfigError
from minisgl.message.messages import UserMsg, pack_ids
from minisgl.scheduler.scheduler import Scheduler
from minisgl.scheduler.transport import LocalTransport
from minisgl.simulate.cluster import Simulation
from minisgl.simulate.times import Served, by_floor, features, fitted
from minisgl.simulate.workload import Request, Session, generate

CONFIG = SchedulerConfig(32, 256, 2048, 4096, 16)
SERVED = Served("a test's", CONFIG, [0.002, 1e-4, 1e-7, 0.0, 2e-5, 1e-9])


def drawn(*flags: str, replicas: int = 1, max_seq_len: int = CONFIG.max_seq_len) -> list[Session]:
    return generate(simulate.make_parser().parse_args([*flags]), replicas, max_seq_len)


LOAD = ("--rate", "8", "--duration", "5", "--prefix-len", "200", "--input-len", "5:100", "--output-len", "1:40")


def simulated(
    sessions: Sequence[Session], replicas: int = 1, policy: str = "prefix", served: Served = SERVED
) -> Simulation:
    simulation = Simulation(served, replicas, policy)
    simulation.run(sessions)
    return simulation


def ttft(simulation: Simulation, percentile: float = 90) -> float:
    return float(np.percentile([record.arrivals[0] for record in simulation.records], percentile))


@pytest.mark.parametrize("policy", ["random", "power-of-two", "prefix"])
@pytest.mark.parametrize("num_pages", [4096, 48])
def test_each_request_ends_once_with_all_its_tokens(policy: str, num_pages: int) -> None:
    """With few pages some have to begin again."""
    max_seq_len = 48 * CONFIG.page_size
    served = replace(SERVED, config=replace(CONFIG, num_pages=num_pages, max_seq_len=max_seq_len))
    flags = ("--rate", "40", "--duration", "1", "--prefix-len", "60", "--input-len", "5:30", "--output-len", "90:120")
    sessions = drawn(*flags, replicas=3, max_seq_len=max_seq_len)
    simulation = simulated(sessions, 3, policy, served)
    turns = [turn for session in sessions for turn in session]
    expected = sorted((sum(length for _, length in turn.segments), turn.output_len) for turn in turns)
    assert sorted((record.num_prompt, record.num_output) for record in simulation.records) == expected
    assert len(simulation.itl) == sum(turn.output_len - 1 for turn in turns)
    assert all(replica.planner.is_idle and not replica.flows for replica in simulation.replicas)
    assert all(0 < record.arrivals[0] <= record.e2e for record in simulation.records)
    assert (sum(replica.planner.num_retracted for replica in simulation.replicas) > 0) == (num_pages == 48)


def test_models_with_states_go_on_from_snapshots() -> None:
    served = by_floor("qwen3.5-4b", Machine(4e12, 8e14), 0.7)
    assert served.config.has_states and served.config.num_snapshots == 256
    assert not by_floor("qwen3-0.6b", Machine(4e12, 8e14), 0.7).config.has_states
    cached = []
    for num_snapshots in (64, 0):  # without them nothing is found
        served = replace(SERVED, config=replace(CONFIG, has_states=True, num_snapshots=num_snapshots))
        cached.append(sum(record.num_cached for record in simulated(drawn(*LOAD), served=served).records))
    assert cached[0] > 0 == cached[1]


def test_a_seed_decides_all() -> None:
    first, again, other = (
        simulated(drawn(*LOAD, "--duration", "2", "--seed", seed, replicas=3), 3, "random").records
        for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


class Device:
    """Steps that take as long as they do in the simulation, for the real scheduler. Its clock is `now`."""

    def __init__(self) -> None:
        self.now = self.free = 0.0
        self.steps: deque[tuple[float, StepResult]] = deque()

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> Device:
        self.free = max(self.now, self.free) + SERVED.seconds(plan)
        self.steps.append((self.free, StepResult(plan.step_id, [(1,)] * sum(req.num_samples for req in plan.reqs))))
        return self

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def result(self) -> StepResult:
        ended, result = self.steps.popleft()
        self.now = max(self.now, ended)
        return result

    def close(self) -> None:
        pass


@pytest.mark.parametrize("overlap", [True, False])
def test_one_replica_is_what_the_real_scheduler_does(overlap: bool) -> None:
    """To the last bit of each time."""
    rng, config = np.random.default_rng(0), replace(CONFIG, overlap=overlap)
    requests = [
        Request(0.0, ((7, 50), (number, int(rng.integers(1, 400)))), int(rng.integers(1, 60)), 1, "")
        for number in range(10, 60)
    ]
    device, transport = Device(), LocalTransport()
    scheduler = Scheduler(config, device, transport)
    messages = []
    for uid, request in enumerate(requests):
        ids = np.repeat([token for token, _ in request.segments], [length for _, length in request.segments]).tolist()
        params = SamplingParams(request.output_len, seed=0, ignore_eos=True)
        messages.append(UserMsg(uid, pack_ids(ids), params))
    transport.put(messages)
    ends: dict[int, float] = {}
    while len(ends) < len(requests):
        scheduler.turn()
        ends |= {reply.uid: device.now for reply in transport.take_outputs() if reply.finish_reason is not None}
    served = replace(SERVED, config=config)
    records = simulated([[request] for request in requests], served=served).records
    assert sorted(record.e2e for record in records) == sorted(ends.values())


def test_more_replicas_and_faster_ones_do_not_keep_requests_waiting_longer() -> None:
    sessions = drawn(*LOAD, "--rate", "40", "--duration", "2")
    few, more, most = (ttft(simulated(sessions, replicas)) for replicas in (1, 2, 4))
    assert few > more > most
    faster = replace(SERVED, coefficients=[weight / 2 for weight in SERVED.coefficients])
    assert ttft(simulated(sessions, served=faster)) < few


def test_waiting_is_that_of_a_queue_with_one_server_and_equal_services() -> None:
    """Each waits for as long as the one before did, and for its service, less the time between them (D. V. Lindley,
    "The theory of queues with a single server", 1952)."""
    config, step, utilisation = SchedulerConfig(8, 16, 64, 64, 16, cache_type="naive", overlap=False), 0.01, 0.5
    served, flags = Served("", config, [step, 0, 0, 0, 0, 0]), ("--rate", str(utilisation / step), "--duration", "40")
    sessions = drawn(*flags, "--turns", "1", "--prefix-len", "0", "--input-len", "16", "--output-len", "1")
    times, waits = [session[0].time for session in sessions], [0.0]
    for gap in np.diff(times):
        waits.append(max(0.0, waits[-1] + step - gap))
    records = sorted(simulated(sessions, served=served).records, key=lambda record: record.start)
    assert len(records) == 2_000
    assert [record.e2e - step for record in records] == pytest.approx(waits, abs=1e-9)
    assert np.mean(waits) / step == pytest.approx(utilisation / (2 * (1 - utilisation)), rel=0.15)  # by Pollaczek


def test_the_api_of_a_replica_takes_one_request_after_the_other() -> None:
    requests = [[Request(time, ((number, 20),), 1, 0)] for number, time in enumerate((0.0, 0.0, 0.1, 3.0), 1)]
    served = Served("", CONFIG, [0.001, 0, 0, 0, 0, 0], overhead=0.5)
    for replicas, expected in ((1, [0.5, 0.5, 1.0, 1.4]), (4, [0.5] * 4)):
        waited = sorted(record.arrivals[0] for record in simulated(requests, replicas, "power-of-two", served).records)
        assert waited == pytest.approx([seconds + 0.001 for seconds in expected])


def test_the_prefix_router_finds_more_in_caches() -> None:
    sessions = drawn(*LOAD, "--prefix-len", "500", "--duration", "2", replicas=8)
    by_chance, by_prefix = (
        sum(record.num_cached for record in simulated(sessions, 8, policy).records) for policy in ("random", "prefix")
    )
    assert by_prefix > 1.5 * by_chance


def test_replicas_come_and_go_with_the_load() -> None:
    load = drawn(*LOAD, "--rate", "2", "--duration", "100", "--input-len", "300:900", "--output-len", "1:10")
    sessions = [*load, [Request(400, ((1, 9),), 1, 2, "late")]]
    slow = replace(SERVED, coefficients=[50 * weight for weight in SERVED.coefficients])
    slow = replace(slow, config=replace(CONFIG, num_pages=256))
    simulation = Simulation(slow, 4, "prefix", autoscale=True)
    simulation.run(sessions)
    assert len(simulation.records) == sum(map(len, sessions))
    assert len(simulation.replicas) >= 2
    assert simulation.replicas[0].started == 0
    assert all(replica.started >= 30 for replica in simulation.replicas[1:])
    assert sum(replica.ended == 0 for replica in simulation.replicas) == 1
    assert ttft(simulation) < ttft(simulated(sessions, served=slow))


def test_a_fit_finds_what_steps_are_made_of() -> None:
    rng, steps = np.random.default_rng(3), []
    weights = np.array([0.01, 2e-4, 1e-7, 0.0, 3e-5, 2e-9])
    for _ in range(600):
        shares = [(int(rng.integers(0, 2000)), 1)] * int(rng.integers(0, 60))
        shares += [(int(rng.integers(0, 1000)), int(rng.integers(2, 512)))] * int(rng.integers(0, 2)) or [(5, 1)]
        steps.append((shares, float(weights @ features(shares) * rng.uniform(0.8, 1.2))))
    served = fitted("", CONFIG, steps)
    for shares in ([(100, 1)], [(1500, 1)] * 50, [(0, 512)], [(500, 300), *[(40, 1)] * 20]):
        plan = StepPlan(0, (), (), tuple((0, start, count, 1) for start, count in shares))  # type: ignore[misc]
        assert served.seconds(plan) == pytest.approx(weights @ features(shares), rel=0.04)
    assert min(served.coefficients) >= 0


def run(*flags: str) -> None:
    assert simulate.main(flags) == 0


def test_both_forms_of_traces_are_read(tmp_path: Path) -> None:
    """The second request of Mooncake's has the first's blocks; what is sent at the same time shares nothing else."""
    trace, out, plot = tmp_path / "t.jsonl", tmp_path / "out.json", tmp_path / "plot.svg"
    rows = [
        {"timestamp": 5000, "input_length": 1100, "output_length": 3, "hash_ids": [4, 5, 6], "more": 1},
        {"timestamp": 8000, "input_length": 1536, "output_length": 1, "hash_ids": [4, 5, 8]},
    ]
    trace.write_text(
        "".join(json.dumps(row) + "\n\n" for row in rows) + '{"timestamp": 9, "prompt_len": 5, "output_len": 2}'
    )
    flags = ("--trace", str(trace), "--replicas", "1,2", "--json", str(out), "--plot", str(plot), "--price", "3600")
    run(*flags, "--speed", "2", "--page-size", "16", "--disable-overlap", "--router", "prefix,random")
    results = json.loads(out.read_text())["results"]
    assert [(row["replicas"], row["router"]) for row in results] == [
        (n, r) for n in (1, 2) for r in ("prefix", "random")
    ]
    first = results[0]
    assert first["cached, %"] == pytest.approx(100 * 1024 / (1100 + 1536 + 5))
    assert 2 < first["requests"] / first["requests/s"] < 2.2  # seconds: from 5 to 9, at twice the speed, and a little
    assert first["cost/M out"] == pytest.approx(first["requests"] / first["requests/s"] * 1e6 / 6)
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nonsense", r"t\.jsonl, line 2: not JSON: JSON is malformed"),
        ('{"timestamp": 1, "prompt_len": 4}', r"line 2: .*output_len"),
        ('{"input_length": 4, "output_length": 4}', r"line 2: .*timestamp"),
        ('{"timestamp": -1, "prompt_len": 4, "output_len": 4}', r"line 2: .*>= 0.*timestamp"),
        ('{"timestamp": 1, "prompt_len": 0, "output_len": 4}', r"line 2: .*>= 1.*prompt_len"),
        ('{"timestamp": 1, "input_length": "x", "output_length": 4}', r"line 2: .*input_length"),
        (
            '{"timestamp": 1, "input_length": 600, "output_length": 4, "hash_ids": [1]}',
            "line 2: hash_ids: 1, for 2 blocks",
        ),
        ('{"timestamp": 1, "prompt_len": 90000, "output_len": 4}', "line 2: the prompt has 90000 tokens"),
        ("[1]", "line 2: Expected `object`"),
        ('{"timestamp": 1e999, "prompt_len": 1, "output_len": 4}', "line 2: "),
    ],
)
def test_what_is_wrong_with_a_trace_is_one_line(tmp_path: Path, line: str, expected: str) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "prompt_len": 5, "output_len": 2}\n' + line + "\n")
    with pytest.raises(ConfigError, match=expected) as error:
        run("--trace", str(trace))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--replicas", "0"], "--replicas: '0': expected a whole number from 1"),
        (["--replicas", "2,x"], "--replicas: '2,x'"),
        (["--router", "prefix,nearest"], "--router: .*one or more of prefix, power-of-two, random"),
        (["--rate", "-1"], "--rate: '-1': expected a number above 0"),
        (["--rate", "nan"], "--rate"),
        (["--trace", "none.jsonl"], "--trace none.jsonl: No such file"),
        (["--shape", "none"], "shape 'none'"),
        (["--calibration", "none"], "--calibration none: No such file"),
        (["--port", "80"], "--port: a simulation does not depend on it"),
        (["--replica", "2"], r"unknown argument --replica.*; see minisgl simulate --help"),
        (["--num-pages", "40"], "--prefix-len and --input-len: .*the context is 640"),
        (["--json", "none/out.json"], "--json none/out.json: there is no such directory"),
        (["--schedule-policy", "best"], "--schedule-policy"),
    ],
)
def test_what_is_wrong_with_flags_is_one_line(flags: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        run(*flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": []}, r"--calibration .*c\.json: .*length >= 16.*steps"),
        ({"steps": [[[[0, 5]], 0.0]] * 20}, r".*> 0.*steps"),
        ({"config": {"model": "other", "scheduler": {}}}, "scheduler"),
        ({"config": {}}, "model"),
    ],
)
def test_what_is_wrong_with_a_calibration_is_one_line(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    file = tmp_path / "c.json"
    config = {"model": "mine", "scheduler": {"max_running_requests": 8, "max_prefill_length": 64, "page_size": 16}}
    config["scheduler"] |= {"max_seq_len": 512, "num_pages": 99}  # type: ignore[operator]
    document = {"config": config, "steps": [[[[0, 5]], 0.01]] * 20, "more": None}
    file.write_text(json.dumps(document))
    flags = ("--calibration", str(file), "--replicas", "1", "--duration", "2", "--prefix-len", "9", "--input-len", "9")
    run(*flags, "--model", "mine")
    with pytest.raises(ConfigError, match="model: it is of mine, not of --model yours"):
        run(*flags, "--model", "yours")
    file.write_text(json.dumps(document | change))
    with pytest.raises(ConfigError, match=expected) as error:
        run(*flags)
    assert "\n" not in str(error.value)
