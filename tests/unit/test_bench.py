"""`minisgl bench`: the numbers, the datasets, and the load generator against a server with known timings."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minisgl import benchmark
from minisgl.__main__ import main as minisgl_main
from minisgl.benchmark import dataset, metrics, offline, serve
from minisgl.benchmark.dataset import Lengths, Sample
from minisgl.benchmark.metrics import Record
from minisgl.errors import ConfigError

TTFT, GAP = 0.1, 0.04  # of the fake server, in seconds


class FakeServer:
    """An OpenAI-compatible server that streams `max_tokens` tokens with known pauses; `fault` is how it misbehaves."""

    def __init__(self, fault: str | None = None) -> None:
        self.fault = fault
        self.bodies: list[dict[str, Any]] = []
        self.num_open = 0
        self.most_open = 0

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
        for index in range(count):
            await asyncio.sleep(3600 if self.fault == "hang" else GAP if index else TTFT)
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


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_known_timings_are_measured(endpoint: str) -> None:
    fake = FakeServer()
    records, duration = await bench(fake, "--num-prompts", "4", "--output-len", "5", "--endpoint", endpoint)
    summary = metrics.summarize(records, duration)
    assert (summary.num_requests, summary.num_failed) == (4, 0)
    assert (summary.num_prompt, summary.num_output, summary.num_cached) == (28, 20, 12)
    # A busy machine adds to a pause, never takes away from it (but for the clock's grain).
    for name, expected in (("ttft", TTFT), ("tpot", GAP), ("itl", GAP), ("e2e", TTFT + 4 * GAP)):
        assert expected * 1000 - 3 <= summary.latencies[name]["p50"] <= expected * 1000 + 60, name
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
    assert sorted(record.start > TTFT / 2 for record in records) == [False, False, True, True]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("refuse", "HTTP 400: max_tokens is too large"),
        ("break off", "the stream ended before the answer did"),
        ("hang", "not finished within --time-limit 0.4 s"),
    ],
)
async def test_failures_are_counted(fault: str, expected: str) -> None:
    flags = ("--num-prompts", "2", "--output-len", "4", "--warmup", "0", "--time-limit", "0.4")
    records, duration = await asyncio.wait_for(bench(FakeServer(fault), *flags), 30)
    summary = metrics.summarize(records, duration)
    assert summary.num_failed == 2
    assert summary.latencies == {}
    assert list(summary.errors) == [expected]


def test_no_server_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert minisgl_main(["bench", "serve", "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert capsys.readouterr().err.startswith("minisgl: error: --base-url http://127.0.0.1:9/v1: ")


def test_report_files_and_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    args = serve.make_parser().parse_args(flags)
    good = Record(0.0, 0.5, (0.1, 0.3, 0.5), 10, 3, 4)
    bad = Record(0.0, 0.1, error="HTTP 500: [no]")
    assert serve.report(args, "a title", [good, bad], 2.0) == 0
    out = capsys.readouterr().out
    assert "1 done, 1 failed" in out
    assert "10 in (40% from the cache), 3 out" in out
    assert "1 × HTTP 500: [no]" in out
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["summary"]["latencies"]["tpot"]["p50"] == pytest.approx(200)
    assert document["summary"]["output_rate"] == 1.5
    assert document["requests"][0]["arrivals"] == [0.1, 0.3, 0.5]
    assert document["config"]["seed"] == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert serve.report(serve.make_parser().parse_args([]), "a title", [bad], 2.0) == 1


def test_plot_without_matplotlib_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert minisgl_main(["bench", "serve", "--plot", "x.png"]) == 2
    assert "pip install 'minisgl[plot]'" in capsys.readouterr().err


def test_latencies_of_one_request() -> None:
    record = Record(0.0, 1.0, (0.2, 0.5, 1.0), num_output=5)
    assert record.ttft == 0.2
    assert record.tpot == pytest.approx(0.2)  # 4 tokens after the first, in 0.8 s
    assert record.itl == pytest.approx([0.3, 0.5])
    assert Record(0.0, 1.0, (0.2,), num_output=1).tpot is None


def test_poisson_arrivals() -> None:
    offsets = serve.arrival_offsets(2000, 50.0, seed=1)
    assert offsets[0] == 0
    assert offsets == sorted(offsets) == serve.arrival_offsets(2000, 50.0, seed=1)
    assert 2000 / offsets[-1] == pytest.approx(50, rel=0.1)
    assert serve.arrival_offsets(3, math.inf, seed=1) == [0, 0, 0]


def test_jsonl_dataset(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "output_len": 5}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    samples = dataset.load_jsonl(str(file), 3, Lengths(9, 9), np.random.default_rng(0))
    chat = Sample([{"role": "user", "content": "b"}], 9)
    assert samples == [Sample("a", 5), chat, Sample("a", 5)]
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
        ('{"prompt": "a"}\n{"prompt": "a", "output_len": 0}\n', "line 2: output_len"),
    ],
)
def test_bad_dataset_names_the_line(content: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        dataset.load_jsonl(str(file), 2, Lengths(1, 1), np.random.default_rng(0))


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
        ["--numprompts", "1"],
    ],
)
def test_bad_flags_are_one_line(command: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert minisgl_main(["bench", command, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("minisgl: error: ")
    assert error.count("\n") == 1
    assert flags[0] in error


def test_offline_workloads_are_repeatable() -> None:
    for name, workload in offline.WORKLOADS.items():
        args = offline.make_parser().parse_args(["--workload", name, "--num-prompts", "7", "--warmup", "1"])
        samples = offline.make_samples(args)
        assert samples == offline.make_samples(args)
        assert len(samples) == 8
        assert len({tuple(sample.prompt[: workload.prefix_len]) for sample in samples}) == 1 or not workload.prefix_len
        assert len({str(sample.prompt) for sample in samples}) == 8


def test_offline_takes_the_servers_flags(capsys: pytest.CaptureFixture[str]) -> None:
    _, flags = offline.make_parser().parse_known_args(["--num-prompts", "3", "--tp", "2", "--dtype", "float32"])
    from minisgl.config.args import parse_args

    assert offline.engine_options(parse_args(flags, {})) == {"tensor_parallel_size": 2, "dtype": "float32"}
    assert minisgl_main(["bench", "offline", "--dtype", "float13"]) == 2
    assert "--dtype float13" in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert minisgl_main(["bench"]) == 2
    assert benchmark.main(["--help"]) == 0
    assert "offline" in capsys.readouterr().out
