"""`LLM` from end to end: the real planner and engine against Hugging Face, however the work is scheduled."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from minisgl import LLM, SamplingParams
from minisgl.core import FinishReason
from minisgl.errors import ConfigError, RequestError, WorkerDied
from tests.fake_server.workers import broken
from tests.models import hf_greedy, random_prompt, tiny_model
from tests.tokenizers_fixture import make_byte_level

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


def with_tokenizer(path: Path) -> Path:
    if not (path / "tokenizer.json").exists():
        make_byte_level(path)
    return path


@pytest.fixture(scope="module")
def model() -> Path:
    return with_tokenizer(tiny_model("qwen3", vocab_size=512))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model)) as llm:
        yield llm


def make_prompts() -> list[list[int]]:
    """16 prompts of 1 to 60 tokens; some share a prefix with others."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 400) for _ in range(rng.randrange(1, 61))] for _ in range(16)]
    for i in range(4, 8):
        prompts[i] = prompts[3][: 10 + 8 * (i - 3)] + prompts[i][:5]
    return prompts


@pytest.fixture(scope="module")
def expected(model: Path, llm: LLM) -> list[list[int]]:
    """What transformers generates, too."""
    outputs = [output.token_ids for output in llm.generate(make_prompts(), GREEDY)]
    check(model, make_prompts(), outputs)
    return outputs


def check(path: Path, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == NUM_TOKENS
        assert output == hf_greedy(path, prompt, output)


def folder_of(rendezvous: str) -> Path:
    return Path(rendezvous.removeprefix("file://")).parent


SCHEDULES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "page size 1": {"page_size": 1},
    "page size 1, chunks of 7": {"page_size": 1, "max_prefill_length": 7},
    "page size 16, chunks of 7": {"page_size": 16, "max_prefill_length": 7},
    "page size 16, chunks of 8192": {"page_size": 16, "max_prefill_length": 8192},
    "odd page size": {"page_size": 5},
    "no cache": {"cache_type": "naive"},
    "no overlap": {"disable_overlap": True},
    "no overlap, no cache": {"disable_overlap": True, "cache_type": "naive"},
    "batch 1": {"max_running_requests": 1},
    "longest prefix match": {"schedule_policy": "lpm", "max_running_requests": 3},
    "retraction": {"num_pages": 24, "page_size": 8},
    "tensor parallel, drafts": {"tensor_parallel_size": 2, "speculate": "ngram"},
    "drafts, retraction": {"num_pages": 24, "page_size": 8, "speculate": "ngram", "speculate_tokens": 3},
    "tensor parallel, chunks of 20, retraction": {
        "tensor_parallel_size": 2,
        "max_prefill_length": 20,
        "num_pages": 24,
        "page_size": 8,
    },
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_greedy_tokens_do_not_depend_on_the_schedule(model: Path, expected: list[list[int]], schedule: str) -> None:
    num = 8 if "tensor parallel" in schedule else 16  # ranks wait for each other in each step
    is_dear = schedule == "tensor parallel, chunks of 20, retraction"  # and with two ranks another is asked again, too
    with LLM(str(model), **SCHEDULES[schedule]) as llm:
        for _ in range(1 if is_dear else 2):  # the second time, prompts and outputs are in the cache
            outputs = llm.generate(make_prompts()[:num], GREEDY)
            assert [output.token_ids for output in outputs] == expected[:num]
        assert llm.scheduler.planner.pages.num_free == llm.config.engine.num_pages


# Ranks of others, without the planner: test_tensor_parallel.py.
OF_FAMILIES = [("llama", 1), ("mistral", 1), ("qwen2", 1), ("qwen3_moe", 1), ("qwen3_moe", 2), ("qwen3_5_text", 2)]


@pytest.mark.parametrize(("family", "tp_size"), OF_FAMILIES)
def test_every_family_through_the_planner(family: str, tp_size: int) -> None:
    overrides = {"sliding_window": 16} if family == "mistral" else {}
    path = with_tokenizer(tiny_model(family, vocab_size=512, **overrides))
    prompts = make_prompts()[: 6 if tp_size == 1 else 4]
    pages = {"num_pages": 18, "page_size": 8} if family == "qwen3_5_text" else {}  # requests are retracted
    with LLM(str(path), max_prefill_length=33, tp=tp_size, **pages) as llm:
        outputs = llm.generate(prompts, GREEDY)
        assert bool(pages) == (llm.scheduler.planner.num_retracted > 0)
    check(path, prompts, [output.token_ids for output in outputs])


def talk(path: Path, **options: Any) -> tuple[list[list[int]], list[list[int]], int]:
    """Two chats of three turns with a system prompt in common: all their tokens; how many of each turn's prompt were
    not found in the cache; how often a request was retracted."""
    chats = [[*random_prompt(100, seed=1), *random_prompt(20 + i, seed=i)] for i in range(2)]
    computed = []
    with LLM(str(path), **options) as llm:
        for turn, length in enumerate((70, 80, 4)):
            outputs = llm.generate(chats, SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True))
            computed.append([len(output.prompt_token_ids) - output.cached_tokens for output in outputs])
            for chat, output in zip(chats, outputs, strict=True):
                chat += [*output.token_ids, *random_prompt(9, seed=turn)]
        return chats, computed, llm.scheduler.planner.num_retracted


def test_conversations_with_a_model_that_has_states() -> None:
    """A turn goes on from a snapshot, in small caches too; with two ranks as with one."""
    path = with_tokenizer(tiny_model("qwen3_5_text", vocab_size=512))
    expected, computed, _ = talk(path, cache_type="naive")
    assert computed == [[120, 121], [199, 200], [288, 289]]
    chats, computed, _ = talk(path, page_size=8)
    assert chats == expected
    assert all(num <= 9 + 64 + 16 for turn in computed[1:] for num in turn)  # the new tokens, and what lies between two
    for options in ({"tp": 2, "num_pages": 52}, {"max_prefill_length": 20, "num_pages": 52, "num_state_snapshots": 2}):
        chats, computed, num_retracted = talk(path, page_size=8, **options)
        assert chats == expected and num_retracted > 0
        assert sum(computed[1]) + sum(computed[2]) < 976


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(llm: LLM) -> None:
    prompts = make_prompts()
    params = [SamplingParams(temperature=1.0, top_p=0.9, max_tokens=30, seed=i, ignore_eos=True) for i in range(16)]
    together = llm.generate(prompts, params)
    for i in (0, 5, 11):
        (alone,) = llm.generate([prompts[i]], params[i])
        assert alone.token_ids == together[i].token_ids
    other = llm.generate(
        prompts[0], SamplingParams(temperature=1.0, top_p=0.9, max_tokens=30, seed=99, ignore_eos=True)
    )
    assert other[0].token_ids != together[0].token_ids


def test_seeded_sampling_survives_retraction(model: Path, llm: LLM) -> None:
    params = [SamplingParams(temperature=1.0, max_tokens=60, seed=i, ignore_eos=True) for i in range(16)]
    reference = [output.token_ids for output in llm.generate(make_prompts(), params)]
    with LLM(str(model), num_pages=20, page_size=8) as small:
        assert [output.token_ids for output in small.generate(make_prompts(), params)] == reference


def test_cached_tokens_are_reported(model: Path) -> None:
    prompt = list(range(100, 150))
    with LLM(str(model), page_size=16) as llm:
        first = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0))[0]
        second = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0))[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 48)
    assert first.token_ids == second.token_ids
    assert second.prompt_token_ids == prompt
    assert 0 < second.metrics.time_to_first_token <= second.metrics.total_time


def test_text_in_text_out_and_stop_strings(llm: LLM) -> None:
    (free,) = llm.generate("Hello world", SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    assert free.finish_reason is FinishReason.LENGTH
    assert len(free.token_ids) == 40
    stop = free.text[10:13]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=(stop,))
    (stopped,) = llm.generate("Hello world", params)
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.text == free.text[: free.text.index(stop)]


def test_streams_can_be_read_in_turn_and_left_early(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    whole = [llm.generate(text, params)[0] for text in ("Hello", "fox")]
    first, second = llm.stream("Hello", params), llm.stream("fox", params)
    pairs = list(zip(first, second, strict=True))
    for side, output in enumerate(whole):
        increments = [pair[side] for pair in pairs]
        assert "".join(increment.text for increment in increments) == output.text
        assert [increment.finish_reason for increment in increments][-1] is FinishReason.LENGTH
    for _ in llm.stream("Hello", params):
        break
    assert llm.generate("Hello", params)[0].token_ids == whole[0].token_ids
    assert llm.scheduler.planner.pages.num_free == llm.config.engine.num_pages


def test_chat_applies_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hello"}]
    (output,) = llm.chat(conversation, SamplingParams(temperature=0.0, max_tokens=3))
    text = llm.tokenizer.codec.decode(output.prompt_token_ids)
    assert "Hello" in text
    assert len(llm.chat([conversation, conversation], SamplingParams(max_tokens=2))) == 2


def test_bad_prompts_are_refused_before_anything_runs(llm: LLM) -> None:
    too_long = [5] * 600
    for prompts, words in [
        ([too_long], "512 tokens.*600 tokens"),
        (["fine", ""], "prompt 1: the prompt must not be empty"),
        ([[]], "empty"),
        ([[1, 512]], "512 is not in the vocabulary"),
        (["fine", 3], "a text or a list of token ids, not int"),
        ([[{"role": "user", "content": "Hello"}]], "a text or a list of token ids, not list"),  # which is for `chat`
    ]:
        with pytest.raises(RequestError, match=words):
            llm.generate(prompts, GREEDY)
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        llm.generate(["a"], [GREEDY, GREEDY])
    assert llm.generate([], GREEDY) == []


def test_progress_is_reported(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (3, 1, 2)]
    llm.generate(["a", "b", "c"], params, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pagesize": 1}, "did you mean page_size"),
        ({"dtype": "int8"}, "dtype"),
        ({"tp": 3}, "--tensor-parallel-size 3"),
        ({"model_path": "/does/not/exist"}, "no directory, no GGUF file"),
    ],
)
def test_wrong_options_are_one_clear_error(model: Path, options: dict[str, Any], words: str) -> None:
    if "model_path" not in options:
        options["model_path"] = str(model)
    with pytest.raises(ConfigError, match=words):
        LLM(**options)


@pytest.mark.parametrize(
    "program",
    [
        "from minisgl import LLM\nLLM({model!r}, tensor_parallel_size=2)\n",
        "from minisgl import LLM\ndef use():\n    LLM({model!r}, tp=2).generate('a')\nuse()\n",
        "import minisgl.__main__ as m\nm.main(['--model', {model!r}, '--port', '0'])\n",
        "import minisgl.__main__ as m\nm.main(['bench', 'offline', '--model', {model!r}, '--tp', '2'])\n",
    ],
)
def test_a_script_without_a_main_guard_is_told_so(model: Path, tmp_path: Path, program: str) -> None:
    """Each child would run it, and start children: one line says what is missing, and nothing is left."""
    script = tmp_path / "script.py"
    script.write_text(program.format(model=str(model)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    (line,) = [line for line in done.stderr.splitlines() if "__main__" in line and "File" not in line]
    assert 'must stand under `if __name__ == "__main__":`' in line
    assert "ConfigError" in line or line.startswith("minisgl: error: ")
    assert "bootstrapping" not in done.stderr


def test_the_end_of_a_program_ends_everything(model: Path) -> None:
    """Without `close`: no error, no child process and no socket directory are left."""
    program = (
        "import sys\nfrom minisgl import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        f"    llm = LLM({str(model)!r}, tp=2)\n"
        "    print(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids)\n"
        "    print(llm.endpoints.rendezvous)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "rror" not in done.stderr
    assert not folder_of(done.stdout.split()[-1]).exists()


@pytest.mark.parametrize("moment", ["plan", "submit", "wait"])
def test_ctrl_c_whenever_it_comes(model: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The next `generate` finds everything in order. A GPU's steps are launched by the thread that is interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without
    with LLM(str(model)) as llm:
        expected = llm.generate([5, 6, 7], GREEDY)[0].token_ids
        engine = llm.rank.engine
        owner, name = {
            "plan": (llm.scheduler.planner, "plan"),
            "submit": (engine, "submit"),
            "wait": (llm.transport, "pump"),
        }[moment]
        real = getattr(owner, name)

        def interrupted(*args: Any, **named: Any) -> Any:
            result = real(*args, **named)
            signal.raise_signal(signal.SIGINT)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            patch.setattr("minisgl.scheduler.scheduler.PUMP_SECONDS", 0.0)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([5, 6, 7], GREEDY)
        assert llm.generate([5, 6, 7], GREEDY)[0].token_ids == expected
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.timeout(200)
def test_a_rank_that_dies_is_told_though_rank_0_waits_for_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, whose collectives do not notice. What `close` ends is ended, whatever goes wrong meanwhile."""

    class Waiting:
        def wait(self, timeout: float | None = None) -> bool:
            time.sleep(timeout or 0)
            return False

    llm = LLM(str(model), tp=2)
    (worker,) = [child for child in psutil.Process().children() if child.cmdline()[:1] == ["minisgl-TP1-scheduler"]]
    engine = llm.rank.engine
    monkeypatch.setattr(engine, "submit", lambda *_: Waiting())
    worker.kill()
    with pytest.raises(WorkerDied, match="minisgl-TP1-scheduler ended unexpectedly"):
        llm.generate([5, 6, 7], GREEDY)
    monkeypatch.setattr(engine, "close", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.close()
    assert not folder_of(llm.endpoints.rendezvous).exists()


@pytest.mark.timeout(200)
def test_a_rank_that_cannot_start_is_told_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits for it inside the rendezvous, five minutes long."""
    monkeypatch.setattr("minisgl.processes.workers.scheduler_main", broken)
    with pytest.raises(ConfigError, match="minisgl-TP1-scheduler: the model is made of cheese"):
        LLM(str(model), tp=2)
