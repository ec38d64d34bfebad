"""`minisgl bench`: the numbers, the datasets, and the load generator against a server with known timings."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

import httpx
import pytest

from minisgl import benchmark
from minisgl.__main__ import main as minisgl_main
from minisgl.benchmark import dataset, floor, metrics, offline, serve
from minisgl.benchmark.dataset import Lengths, Sample
from minisgl.benchmark.metrics import Record
from minisgl.benchmark.shapes import SHAPES, stand_in_tokenizer, write_shape
from minisgl.config.families import read_model_config
from minisgl.errors import ConfigError

ROOT = Path(__file__).parents[2]
TTFT, GAP = 0.1, 0.04  # of the fake server, in seconds; longer where other work has the cores


class FakeServer:
    """An OpenAI-compatible server that streams `max_tokens` tokens with known pauses; `fault` is how it misbehaves."""

    def __init__(self, fault: str | None = None) -> None:
        self.fault = fault
        self.bodies: list[dict[str, Any]] = []
        self.num_open = 0
        self.most_open = 0
        self.pauses: list[list[float]] = []  # of each answer: what has gone by before each of its tokens, in seconds

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length:")[2].split("\r\n")[0] or 0)
            body = json.loads(await reader.readexactly(length)) if length else {}
            if head.startswith("get"):
                writer.write(_response("200 OK", json.dumps({"data": [{"id": "fake-model"}]})))
            elif self.fault == "refuse":
                writer.write(_response("400 Bad Request", '{"error": {"message": "max_tokens is too large"}}'))
            else:
                await self.stream(body, "chat" in head, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def stream(self, body: dict[str, Any], chat: bool, writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        count = body["max_tokens"]
        if chat:
            writer.write(_event({"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}))
        self.pauses.append(pauses := [])
        for index in range(count):
            begin = time.perf_counter()
            await asyncio.sleep(3600 if self.fault == "hang" else GAP if index else TTFT)
            pauses.append(time.perf_counter() - begin)
            finish = "length" if index == count - 1 else None
            text = {"delta": {"content": "x"}} if chat else {"text": "x"}
            writer.write(_event({"choices": [text | {"finish_reason": finish}]}))
            if self.fault == "break off" and index == 1:
                return
        usage = {"prompt_tokens": 7, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 3}}
        writer.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        self.num_open -= 1


def _response(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


@asynccontextmanager
async def serving(fake: FakeServer) -> AsyncIterator[str]:
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def bench(fake: FakeServer, *flags: str) -> tuple[list[Record], float]:
    async with serving(fake) as url:
        args = serve.make_parser().parse_args(["--base-url", url, *flags])
        return await serve.run(args, serve.make_samples(args))


def known_latencies(fake: FakeServer) -> dict[str, float]:
    """Medians over its answers, but for the warm-up's, of what it has paused."""
    answers = fake.pauses[1:]
    gaps = [pauses[1:] for pauses in answers]
    known = {"ttft": [pauses[0] for pauses in answers], "tpot": [mean(each) for each in gaps]}
    known |= {"itl": [gap for each in gaps for gap in each], "e2e": [sum(pauses) for pauses in answers]}
    return {name: median(values) for name, values in known.items()}


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_known_timings_are_measured(endpoint: str) -> None:
    for _ in range(10):
        fake = FakeServer()
        records, duration = await bench(fake, "--num-prompts", "4", "--output-len", "5", "--endpoint", endpoint)
        summary = metrics.summarize(records, duration)
        assert (summary.num_requests, summary.num_failed) == (4, 0)
        assert (summary.num_prompt, summary.num_output, summary.num_cached) == (28, 20, 12)
        late = {name: summary.latencies[name]["p50"] - 1000 * known for name, known in known_latencies(fake).items()}
        if all(-3 <= ms <= 60 for ms in late.values()):
            break  # what else the machine does delays what is measured: the best run tells
    assert all(-3 <= ms <= 60 for ms in late.values()), late
    assert summary.output_rate == pytest.approx(20 / duration)
    assert len(fake.bodies) == 5  # the warm-up's too
    assert fake.bodies[0]["model"] == "fake-model"
    assert "ignore_eos" not in fake.bodies[0]


async def test_requests_are_repeatable_and_as_asked() -> None:
    flags = ("--num-prompts", "3", "--input-len", "4:9", "--output-len", "1:2", "--ignore-eos", "--warmup", "0")
    first, second = FakeServer(), FakeServer()
    await bench(first, *flags)
    await bench(second, *flags)
    order = [sorted(map(json.dumps, fake.bodies)) for fake in (first, second)]
    assert order[0] == order[1]
    assert all(4 <= len(body["prompt"]) <= 9 and body["ignore_eos"] for body in first.bodies)


async def test_concurrency_is_bounded() -> None:
    fake = FakeServer()
    records, duration = await bench(fake, "--num-prompts", "4", "--output-len", "1", "--max-concurrency", "2")
    assert fake.most_open == 2
    assert duration >= 2 * TTFT - 0.01
    first_end = min(record.start + record.e2e for record in records)
    assert sorted(record.start >= first_end for record in records)[2:] == [True, True]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("refuse", "HTTP 400: max_tokens is too large"),
        ("break off", "the stream ended before the answer did"),
        ("hang", "not finished within --time-limit 0.4 s"),
    ],
)
async def test_failures_are_counted(fault: str, expected: str) -> None:
    limit = "0.4" if fault == "hang" else "100"
    flags = ("--num-prompts", "2", "--output-len", "4", "--warmup", "0", "--time-limit", limit)
    records, duration = await asyncio.wait_for(bench(FakeServer(fault), *flags), 100)
    summary = metrics.summarize(records, duration)
    assert summary.num_failed == 2
    assert summary.latencies == {}
    assert list(summary.errors) == [expected]


def test_no_server_is_one_line_and_status_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert minisgl_main(["bench", "serve", "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert capfd.readouterr().err.startswith("minisgl: error: --base-url http://127.0.0.1:9/v1: ")


class ModelsAt:
    """A server that lists its models at one path only."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, request: httpx.Request) -> httpx.Response:
        found = request.url.path == self.path
        return httpx.Response(200, json={"data": [{"id": "m"}]}) if found else httpx.Response(404)


@pytest.mark.parametrize(
    ("given", "listed", "expected"),
    [
        ("http://s", "/v1/models", "http://s/v1"),
        ("http://s/", "/v1/models", "http://s/v1"),
        ("http://s/v1", "/v1/models", "http://s/v1"),
        ("http://s/v1/", "/v1/models", "http://s/v1"),
        ("http://s/v1/chat/completions", "/v1/models", "http://s/v1"),
        ("http://s/v1/completions", "/v1/models", "http://s/v1"),
        ("http://s/api/v3", "/api/v3/models", "http://s/api/v3"),
        ("http://s/proxy", "/proxy/v1/models", "http://s/proxy/v1"),
    ],
)
async def test_the_base_url_with_or_without_its_end(given: str, listed: str, expected: str) -> None:
    async with httpx.AsyncClient(transport=httpx.MockTransport(ModelsAt(listed))) as client:
        assert await serve.find_server(client, given, None) == (expected, "m")
        assert await serve.find_server(client, given, "mine") == (expected, "mine")
    async with httpx.AsyncClient(transport=httpx.MockTransport(ModelsAt("/none"))) as client:
        with pytest.raises(ConfigError, match=f"^--base-url {given}: .*models does not answer"):
            await serve.find_server(client, given, None)
        assert (await serve.find_server(client, given, "mine"))[1] == "mine"  # some servers list none


def test_no_floor_without_ceilings(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "measure_gpu", lambda: None)
    assert minisgl_main(["bench", "serve", "--shape", "qwen3-0.6b"]) == 2
    assert "--bandwidth and --peak-flops" in capfd.readouterr().err
    monkeypatch.setattr(serve, "measure_gpu", lambda: floor.Machine(3e12, 7e14, "a card, measured"))
    args = serve.make_parser().parse_args(["--peak-flops", "5e14"])
    assert serve.machine_of(args, "cpu") is None
    assert str(serve.machine_of(args, "cuda")) == "a card, measured: 3 TB/s, 500 TFLOP/s"


@pytest.mark.parametrize("vocab_size", [64, 256, 4096, 151_936])
def test_every_token_of_the_stand_in_tokenizer_is_text(vocab_size: int) -> None:
    tokenizer = stand_in_tokenizer(vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(vocab_size)]
    assert all(texts)
    assert not any("\ufffd" in text for text in texts)
    assert len(set(texts)) == vocab_size
    if vocab_size > 200:
        assert tokenizer.encode(" time year day").ids == [
            tokenizer.token_to_id(f"Ġ{w}") for w in ("time", "year", "day")
        ]
        text = 'A line: {"a": 1}\n'
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        assert tokenizer.encode("ä").ids == [ord("?")] * 2


def run_script(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmark" / name), *flags]
    hidden = "import sys; sys.modules['matplotlib'] = None; import runpy; sys.argv = sys.argv[1:]"
    if name == "plot.py":  # as if matplotlib were not installed
        command = [sys.executable, "-c", f"{hidden}; runpy.run_path(sys.argv[0], run_name='__main__')", *command[1:]]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
    )


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ("plot.py", ["--latencies", "run.json", "out.png"], "matplotlib"),
        ("plot.py", ["no_such_file.jsonl"], "no_such_file.jsonl"),
        ("offline/ablations.py", ["--tpp", "4"], "unknown argument --tpp"),
        ("offline/ablations.py", ["--only", "radox"], "radox"),
        ("offline/features.py", ["--modle", "x"], "unknown argument --modle"),
        ("online/serve.py", ["--page-siez", "16"], "unknown argument --page-siez"),
        ("profile_step.py", ["--dtype", "float13"], "--dtype float13"),
        ("floor.py", ["--shape", "qwen9"], "shape 'qwen9'"),
    ],
)
def test_scripts_tell_what_is_wrong_in_one_line(script: str, flags: list[str], expected: str) -> None:
    done = run_script(script, *flags)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_report_files_and_exit_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--output", str(tmp_path / "out.json"), "--json", str(tmp_path / "lines"), "--shape", "qwen3-0.6b"]
    args = serve.make_parser().parse_args(flags)
    args.machine = floor.Machine()
    good = Record(0.0, 0.5, (0.1, 0.3, 0.5), 10, 3, 4)
    bad = Record(0.0, 0.1, error="HTTP 500: [no]")
    assert serve.report(args, "a title", [good, bad], 2.0) == 0
    out = capfd.readouterr().out
    assert "1 done, 1 failed" in out
    assert "10 in (40% from the cache), 3 out" in out
    assert "1 × HTTP 500: [no]" in out
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["summary"]["latencies"]["tpot"]["p50"] == pytest.approx(200)
    assert document["summary"]["output_rate"] == 1.5
    assert document["requests"][0]["arrivals"] == [0.1, 0.3, 0.5]
    assert document["config"]["seed"] == 0
    (line,) = (tmp_path / "lines").read_text().splitlines()
    assert json.loads(line)["summary"] == document["summary"]
    # Three steps: the prompt, and two that read 1.19 GB of weights and hardly any KV.
    assert document["summary"]["floor"] == pytest.approx(3 * 1.192e9 / 4.3e12, rel=0.02)
    assert "reached: 0.0%" in out
    assert "by these ceilings: an H200's: 4.3 TB/s, 788 TFLOP/s" in out
    assert serve.report(serve.make_parser().parse_args([]), "a title", [bad], 2.0) == 1


def test_latencies_of_one_request() -> None:
    record = Record(0.0, 1.0, (0.2, 0.5, 1.0), num_output=5)
    assert record.ttft == 0.2
    assert record.tpot == pytest.approx(0.2)  # 4 tokens after the first, in 0.8 s
    assert record.itl == pytest.approx([0.3, 0.5])
    assert Record(0.0, 1.0, (0.2,), num_output=1).tpot is None


def test_poisson_arrivals() -> None:
    samples = [Sample([1], 1)] * 2000
    offsets = serve.arrival_offsets(samples, 50.0, seed=1)
    assert offsets[0] == 0
    assert offsets == sorted(offsets) == serve.arrival_offsets(samples, 50.0, seed=1)
    assert 2000 / offsets[-1] == pytest.approx(50, rel=0.1)
    assert serve.arrival_offsets(samples[:3], math.inf, seed=1) == [0, 0, 0]


async def test_a_trace_says_when_and_how_much(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 7 + i / 2, "prompt_len": 4 + i, "output_len": 1 + i} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    fake = FakeServer()
    records, _ = await bench(fake, "--trace", str(file), "--warmup", "0")
    assert sorted((len(body["prompt"]), body["max_tokens"]) for body in fake.bodies) == [(4, 1), (5, 2), (6, 3)]
    assert [record.start for record in records] == pytest.approx([0, 0.5, 1], abs=0.25)
    file.write_text('{"prompt_len": 4, "output_len": 1}')
    with pytest.raises(ConfigError, match="line 1: timestamp must be"):
        await bench(fake, "--trace", str(file))


def load(file: Path, count: int | None, outputs: Lengths) -> list[Sample]:
    return dataset.load_jsonl("--dataset", str(file), count, outputs, Random(0), 256)


def test_jsonl_dataset(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "output_len": 5}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    chat = Sample([{"role": "user", "content": "b"}], 9)
    assert load(file, 3, Lengths(9, 9)) == [Sample("a", 5), chat, Sample("a", 5)]
    assert chat.is_chat
    args = serve.make_parser().parse_args(["--dataset", str(file)])
    with pytest.raises(ConfigError, match="need --endpoint chat"):
        serve.make_samples(args)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        ("{\n", "line 1: not JSON"),
        ('{"text": "a"}\n', "line 1: expected an object with `prompt`"),
        ('{"prompt": "a"}\n{"prompt": "a", "output_len": 0}\n', r"line 2: Expected `int` >= 1 - at `\$\.output_len`"),
    ],
)
def test_bad_dataset_names_the_line(content: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load(file, 2, Lengths(1, 1))


@pytest.mark.parametrize("command", ["serve", "offline"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--output-len", "0"],
        ["--input-len", "9:3"],
        ["--num-prompts", "0"],
        ["--seed", "-1"],
        ["--warmup", "-1"],
        ["--output", "/no/such/directory/out.json"],
        ["--bandwidth", "0"],
        ["--numprompts", "1"],
    ],
)
def test_bad_flags_are_one_line(command: str, flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert minisgl_main(["bench", command, *flags]) == 2
    error = capfd.readouterr().err
    assert error.startswith("minisgl: error: ")
    assert error.count("\n") == 1
    assert flags[0] in error


def offline_samples(*flags: str) -> tuple[list[Sample], list[Sample]]:
    args = offline.make_parser().parse_args(flags)
    offline.fill_in(args)
    return offline.make_samples(args)


@pytest.mark.parametrize("workload", offline.WORKLOADS)
def test_offline_workloads_are_repeatable(workload: str) -> None:
    flags = ("--workload", workload, "--num-prompts", "7", "--warmup", "1", "--prefix-len", "3")
    measured, warmup = offline_samples(*flags)
    assert (measured, warmup) == offline_samples(*flags)
    assert (len(measured), len(warmup)) == (7, 1)
    assert len({tuple(sample.prompt[:3]) for sample in measured}) == 1
    assert len({str(sample.prompt) for sample in measured}) == 7


def test_the_standard_workload_is_the_fields() -> None:
    measured, warmup = offline_samples("--workload", "standard")
    assert (len(measured), len(warmup)) == (256, 8)
    assert sum(len(sample.prompt) for sample in measured) == 142_827
    assert sum(sample.output_len for sample in measured) == 133_966


def floor_rate(shape: str, directory: Path, tp_size: int = 1) -> float:
    """Tokens per second of the standard workload at the floor of the default machine."""
    model = read_model_config(write_shape(shape, directory / shape))
    samples, _ = offline_samples("--workload", "standard")
    load = [(len(sample.prompt), sample.output_len, 0) for sample in samples]
    return 133_966 / floor.floor_of(model, "bfloat16", load, floor.Machine(), tp_size).seconds


def test_a_quantized_shape_has_the_floor_of_its_format(tmp_path: Path) -> None:
    """Of 4 bits, and 4 bytes for each 128 of them, with a head in 16; and of a byte each."""
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    layers, head = 40 * (7168 * 5120 + 5120 * 5120 + 3 * 17408 * 5120), 151936 * 5120
    for fields, each in ((awq, 0.5 + 4 / 128), (fp8, 1.0)):
        path = write_shape("qwen3-14b", tmp_path / str(fields["quant_method"]))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
        read = floor.weights_read(read_model_config(path), "packed", 1)
        assert read == pytest.approx(each * layers + 2 * head, rel=0.001)


def test_experts_alone_are_stored_in_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: 17 bytes for 32 weights, of 4 experts of 32; and 2 bytes for each of all others."""
    model = read_model_config(write_shape("gpt-oss-20b", tmp_path / "model"))
    others = 24 * 2880 * (64 * 64 * 2 + 2 * 8 * 64) + 201088 * 2880
    experts = 24 * 4 * 3 * 2880 * 2880
    assert floor.weights_read(model, "packed", 1) == pytest.approx(2 * others + experts * 17 / 32, rel=0.01)


def test_floors_of_the_standard_workload(tmp_path: Path) -> None:
    assert floor_rate("qwen3-0.6b", tmp_path) == pytest.approx(36_400, rel=0.01)
    assert floor_rate("qwen3-14b", tmp_path) == pytest.approx(8_170, rel=0.02)
    assert floor_rate("qwen3-32b", tmp_path, 4) == pytest.approx(15_600, rel=0.01)
    assert floor_rate("qwen3-32b", tmp_path, 2) == pytest.approx(7_800, rel=0.01)


def test_floors_of_single_steps(tmp_path: Path) -> None:
    def milliseconds(shape: str, tp_size: int = 1) -> float:
        model = read_model_config(write_shape(shape, tmp_path / shape))
        num_bytes = floor.weights_read(model, "bfloat16", 1, tp_size) + floor.kv_read(model, "bfloat16", [128], tp_size)
        return 1000 * num_bytes / 4.3e12

    assert milliseconds("qwen3-0.6b") == pytest.approx(0.28, abs=0.005)
    assert milliseconds("qwen3-14b") == pytest.approx(6.5, abs=0.05)
    assert milliseconds("qwen3-32b", 4) == pytest.approx(3.7, abs=0.05)
    # Of 128 experts one token chooses 8.
    assert milliseconds("qwen3-30b-a3b") == pytest.approx(1.41, abs=0.02)
    with pytest.raises(ConfigError, match=r"expected qwen3-0\.6b"):
        write_shape("qwen9", tmp_path)


def test_floors_of_states_and_windows(tmp_path: Path) -> None:
    """What a hybrid remembers is read and written, whatever the context is; a window's keys and pairs end with it."""
    model = read_model_config(write_shape("qwen3.5-4b", tmp_path / "hybrid"))
    states, keys = 24 * 32 * 128 * 128 * 4, 8 * 4 * 256 * 2 * 2
    assert floor.kv_read(model, "bfloat16", [100, 300]) == 2 * 2 * states + 400 * keys
    mlps, attention = 3 * 9216 * 2560, (3 * 16 + 2 * 4) * 256 * 2560
    net, rule = (2 * 2048 + 3 * 4096 + 2 * 32) * 2560, 3 * 32 * 128 * 128
    weights = 32 * mlps + 8 * attention + 24 * (net + rule)
    pairs = 8 * 4 * 16 * 256 * 1000**2 / 2
    assert floor.prefill_flops(model, 1000) == 2 * 1000 * weights + pairs + 2 * 248320 * 2560
    shape = {**SHAPES["qwen3-0.6b"], "sliding_window": 100, "use_sliding_window": True, "max_window_layers": 27}
    path = tmp_path / "windows"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(shape))
    model = read_model_config(path)
    assert floor.kv_read(model, "bfloat16", [1000]) == (27 * 1000 + 100) * 8 * 128 * 2 * 2


def test_offline_takes_the_servers_flags(capfd: pytest.CaptureFixture[str]) -> None:
    _, flags = offline.make_parser().parse_known_args(["--num-prompts", "3", "--tp", "2", "--dtype", "float32"])
    from minisgl.config.args import parse_args

    assert offline.engine_options(parse_args(flags, {})) == {"tensor_parallel_size": 2, "dtype": "float32"}
    assert minisgl_main(["bench", "offline", "--dtype", "float13"]) == 2
    assert "--dtype float13" in capfd.readouterr().err


def test_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert minisgl_main(["bench"]) == 2
    assert benchmark.main(["--help"]) == 0
    assert "offline" in capfd.readouterr().out
