"""What one client's grammars take of the others' time: their share of each step, and no more."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import pytest

from minisgl import LLM, SamplingParams
from minisgl.core import FinishReason, Grammar
from minisgl.scheduler.grammar import Grammars
from tests.faults.conftest import Server
from tests.tokenizers_fixture import make_words

VOCAB = 60_000
DEAR = Grammar("regex", "(?i)([a-z]+ ){5000}")  # a millisecond each: with flags no mask is known from another place
CHEAP = Grammar("json", json.dumps({"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1000}))


@pytest.fixture(scope="module")
def words_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is small beside its vocabulary: masks take far longer than steps."""
    path = tmp_path_factory.mktemp("models") / "words"
    path.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    return make_words(path, VOCAB)


@pytest.fixture(scope="module")
def llm(words_path: Path) -> Iterator[LLM]:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_running_requests": 64, "num_pages": 32768}
    with LLM(str(words_path), dummy_weight=True, page_size=1, **options) as llm:
        yield llm


def params(seed: int, tokens: int, grammar: Grammar | None = None) -> SamplingParams:
    return SamplingParams(tokens, 1.0, seed=seed, ignore_eos=True, grammar=grammar)


def ends(llm: LLM, grammar: Grammar | None) -> tuple[float, float]:
    """Seconds until the last of 16 plain streams has ended, and until half of 16 others have, beside them."""
    prompts = [[10 + i, 20, 30] for i in range(32)]
    each = [params(i, 24, grammar) for i in range(16)] + [params(i, 24) for i in range(16)]
    outputs = llm.generate(prompts, each, progress=False)
    assert all(len(output.token_ids) == 24 for output in outputs), "one of them did not get its tokens"
    seconds = [output.metrics.total_time for output in outputs]
    return max(seconds[16:]), median(seconds[:16])


def test_dear_masks_slow_nobody_else(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the steps they would take three quarters of the time, and all streams would end with the same step. Other
    work on the machine disturbs how long that takes; the time that the engine's thread is at masks is its own."""
    at_masks: list[float] = []
    compute = Grammars.compute

    def watched(*args: Any) -> Any:
        start = time.thread_time()
        words = compute(*args)
        at_masks.append(time.thread_time() - start)
        return words

    ends(llm, DEAR)
    monkeypatch.setattr(Grammars, "compute", watched)
    beside, alone = [ends(llm, DEAR) for _ in range(5)], [ends(llm, None) for _ in range(5)]
    taken = sum(dear for _, dear in beside)
    print(f"at masks: {sum(at_masks):.2f} of {taken:.2f} s; beside {beside}, alone {alone}")
    assert sum(at_masks) < 0.2 * taken, "the engine was at masks"
    assert all(dear > 1.5 * plain for plain, dear in beside), "the plain ones have waited for the dear ones"
    assert min(plain for plain, _ in beside) < 2 * max(plain for plain, _ in alone)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_waiting_changes_no_token(words_path: Path, monkeypatch: pytest.MonkeyPatch, tp_size: int) -> None:
    """All masks within the steps, or none of them; with and without overlap, and drafts; on one rank or two."""
    prompts = [[10 + i, 20, 30] for i in range(9)]
    each = [params(i, 12, (DEAR, CHEAP, None)[i % 3]) for i in range(9)]
    outputs = []
    setups = (1e6, True, "ngram"), (0.0, True, "off"), (0.0, False, "ngram")
    for share, overlap, speculate in setups[: 4 - tp_size]:
        monkeypatch.setattr("minisgl.scheduler.grammar.CPU_SHARES", (share, min(share, 0.4)))
        monkeypatch.setattr("minisgl.scheduler.late._SHARE", share)
        options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_pages": 4096, "tp": tp_size}
        options |= {"disable_overlap": not overlap, "speculate": speculate}
        with LLM(str(words_path), dummy_weight=True, **options) as llm:
            outputs.append([output.token_ids for output in llm.generate(prompts, each, progress=False)])
    assert all(ids == outputs[0] for ids in outputs[1:])
    assert all(len(ids) == 12 for ids in outputs[0])


def test_a_grammar_that_is_slow_again_and_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("grammar", "late"):
        monkeypatch.setattr(f"minisgl.scheduler.{module}.FREE_SECONDS", 0.0)
    monkeypatch.setattr("minisgl.scheduler.grammar.MOST_SECONDS", 0.01)
    slow, plain = llm.generate(["a", "b"], [params(1, 200, DEAR), params(2, 30)], progress=False)
    assert slow.finish_reason is FinishReason.ERROR
    assert slow.error is not None and "it is too slow" in slow.error
    assert len(plain.token_ids) == 30


def test_a_compiler_that_dies_is_a_503_and_forgotten(start: Callable[..., Server], tiny_path: Path) -> None:
    server = start(["-m", "minisgl", "--model", str(tiny_path), "--port", "0", "--max-seq-len", "256"])
    answers: list[httpx.Response] = []
    with httpx.Client(base_url=server.url, timeout=60) as http:

        def ask(pattern: str) -> None:
            answers.append(http.post("/v1/completions", json={"prompt": "a", "guided_regex": pattern}))

        ask("a{1}")
        (compiler,) = (
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "minisgl.grammar.store" in " ".join(child.cmdline())
        )
        compiler.send_signal(signal.SIGSTOP)
        thread = threading.Thread(target=ask, args=("a{2}",))
        thread.start()
        time.sleep(1)
        compiler.send_signal(signal.SIGKILL)
        thread.join()
        ask("a{2}")
    assert [answer.status_code for answer in answers] == [200, 503, 200]
    assert int(answers[1].headers["retry-after"]) > 0
    assert answers[1].json()["error"]["param"] == "guided_regex"
