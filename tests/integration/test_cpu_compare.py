"""The comparison of CPU engines: its table, its processes' protocol, and that all engines get the same weights."""

from __future__ import annotations

import multiprocessing as mp
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from benchmark.cpu import engines
from benchmark.cpu.checkpoint import prepare, read_weights, write_gguf
from benchmark.cpu.compare import Bandwidth, Load, Row, describe_agreement, make_parser, to_table
from benchmark.cpu.engines import Setup, Timing, Transformers, serve

SETUP = Setup(Path("."), "float32", None, len(os.sched_getaffinity(0)), 8, 64, 64)


def make_timing(*tokens: int, logits: list[float] | None = None) -> Timing:
    return Timing(0.5, 2.0, 100, [list(tokens)], None if logits is None else np.array(logits))


def test_the_table_compares_the_rounds_of_one_precision() -> None:
    ours = Row("int8", "minisgl", "int8", rates={"decode 1": [10.0, 30.0, 20.0]}, floor_shares=[0.9, 0.96])
    theirs = Row("int8", "llama.cpp", "Q8_0", rates={"decode 1": [10.0, 10.0, 20.0]}, agreement="3 of 3 tokens")
    other = Row("float32", "minisgl", "float32", problem="no answer in 9 s")
    assert to_table([ours, theirs, other], ["decode 1"]).splitlines()[2:] == [
        "| minisgl int8 | 20.0 (1.00) | 93% | – |",
        "| llama.cpp Q8_0 | 10.0 (1.00) | – | 3 of 3 tokens |",
        "| minisgl float32 | – | – | no answer in 9 s |",
    ]


def test_a_peer_that_failed_on_the_way_is_compared_with_while_it_ran() -> None:
    ours = Row("int8", "minisgl", "int8", rates={"decode 1": [10.0, 30.0, 50.0]})
    theirs = Row("int8", "llama.cpp", "Q8_0", rates={"decode 1": [5.0]})
    assert "| minisgl int8 | 30.0 (2.00) |" in to_table([ours, theirs], ["decode 1"])


def test_rates_and_prompts_of_loads() -> None:
    decode, prefill = Load("decode 4", 4, 16, 26), Load("prefill 64", 1, 64, 1)
    assert decode.rate(make_timing(1)) == 50.0
    assert prefill.rate(make_timing(1)) == 128.0
    prompts = decode.prompts(0, 1000)
    assert [len(prompt) for prompt in prompts] == [16] * 4
    assert prompts == decode.prompts(0, 1000)
    assert prompts != decode.prompts(1, 1000)


def test_agreement() -> None:
    expected = make_timing(1, 2, 3, 4, logits=[3.0, 4.0])
    assert describe_agreement(make_timing(1, 2, 5, 4), expected) == "2 of 4 tokens"
    ours = make_timing(1, 2, 3, 4, logits=[3.0, 4.05])
    assert describe_agreement(ours, expected) == "4 of 4 tokens, logits within 1.0e-02"


def test_options() -> None:
    args = make_parser().parse_args(["--precisions", "int8", "--batches", "2", "4"])
    assert (args.precisions, args.batches) == (["int8"], [2, 4])
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--precisions", "int3"])


def test_bandwidth_is_one_that_a_machine_can_have() -> None:
    assert 1e8 < Bandwidth(2, 2**22).measure(2) < 1e13


def test_an_engine_answers_until_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        version = "1.2"

        def __init__(self, setup: Setup) -> None:
            assert setup == SETUP

        def run(self, prompts: engines.Prompts, num_tokens: int) -> Timing:
            return make_timing(*prompts[0], num_tokens // (num_tokens - 1))

    monkeypatch.setitem(engines.ENGINES, "fake", Fake)
    ours, theirs = mp.Pipe()
    for command in (([[1, 2]], 2), ([[3]], 1)):
        ours.send(command)
    serve(theirs, "fake", SETUP)
    assert ours.recv() == (True, "1.2")
    assert ours.recv()[1].tokens == [[1, 2, 2]]
    assert ours.recv() == (False, "ZeroDivisionError: integer division or modulo by zero")


@pytest.mark.parametrize("model", ["qwen3-tiny", "qwen3.5-tiny"])
def test_minisgl_and_transformers_read_the_same_weights(tmp_path: Path, model: str) -> None:
    setup = Setup(prepare(model, tmp_path), "float32", None, SETUP.num_threads, 8, 64, 128)
    prompts = Load("decode 2", 2, 16, 8).prompts(0, 4096)
    ours, theirs = (engine(setup).run(prompts, 8) for engine in (engines.Minisgl, Transformers))
    assert ours.tokens == theirs.tokens
    assert len({*ours.tokens[0], *ours.tokens[1]}) > 4, "a model that repeats itself shows nothing"
    assert (ours.num_decoded, theirs.num_decoded) == (14, 14)
    assert ours.decode > 0


@pytest.mark.parametrize(("precision", "error"), [("F32", 0.0), ("BF16", 0.0), ("F16", 1e-3), ("Q8_0", 1e-2)])
def test_gguf_files_hold_the_weights(tmp_path: Path, precision: str, error: float) -> None:
    directory = prepare("qwen3-tiny", tmp_path)
    path = write_gguf(directory, precision, tmp_path)
    assert write_gguf(directory, precision, tmp_path) == path, "made once"
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    weights = dict(read_weights(directory))
    assert len(stored) == len(weights)
    pairs = {
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    for name, theirs in pairs.items():
        ours = torch.from_numpy(np.array(stored[name], np.float32))
        assert torch.linalg.norm(ours - weights[theirs].float()) <= error * torch.linalg.norm(ours)


def test_gguf_files_of_hybrids_have_what_llama_cpp_reads(tmp_path: Path) -> None:
    directory = prepare("qwen3.5-tiny", tmp_path)
    reader = gguf.GGUFReader(write_gguf(directory, "F32", tmp_path))
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    weights = dict(read_weights(directory))
    assert len(stored) == len(weights)
    first = "model.layers.0.linear_attn."
    assert torch.equal(stored["blk.0.ssm_a"], -weights[f"{first}A_log"].float().exp())
    assert torch.equal(stored["blk.0.ssm_dt.bias"], weights[f"{first}dt_bias"].float())
    assert torch.equal(stored["blk.0.ssm_conv1d.weight"], weights[f"{first}conv1d.weight"].float()[:, 0])
    assert torch.equal(stored["blk.0.ssm_norm.weight"], weights[f"{first}norm.weight"].float())
    assert torch.equal(stored["blk.3.attn_norm.weight"], weights["model.layers.3.input_layernorm.weight"].float() + 1)
    assert reader.fields["qwen35.rope.dimension_count"].contents() == 16
