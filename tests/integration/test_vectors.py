"""Vectors and scores against sentence-transformers, however the work is scheduled and whatever computes it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minisgl import LLM, SamplingParams
from minisgl.config.pooling import read_pooling
from minisgl.errors import ConfigError, RequestError
from minisgl.message.messages import ChatPrompt, TextPrompt
from minisgl.scheduler.integrity import check_integrity
from tests.gguf_files import write_gguf
from tests.models import randomize, tiny_model
from tests.tokenizers_fixture import CHATML, add_labels, make_byte_level

TEXTS = ["Hello world", "größer 你好世界 🙂" * 9, "a", "The quick brown fox jumps over the lazy dog. " * 4]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = {"query": "Find what answers: ", "document": ""}
ENGINES: dict[str, dict[str, Any]] = {
    "whole steps in C++": {},
    "layer by layer": {"attention_backend": "sdpa"},
    "steps of few tokens": {"max_prefill_length": 7, "page_size": 1},
    "no overlap, no cache": {"disable_overlap": True, "cache_type": "naive", "max_prefill_length": 33},
}
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)


def with_tokenizer(source: Path, target: Path, *, ending: bool = False, template: str | None = None) -> Path:
    """A copy of a model. ending: each text ends with a special token, as Qwen3-Embedding's do."""
    shutil.copytree(source, target)
    make_byte_level(target, template=template)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "<|im_end|>"}))
    if ending:
        file = target / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        piece = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
        special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
        tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": piece, "pair": piece}
        tokenizer["post_processor"]["special_tokens"] = special
        file.write_text(json.dumps(tokenizer))
    return target


def saved(source: Path, target: Path, mode: str, *, normalize: bool = True) -> Any:
    """sentence-transformers' own directory of the model, and what it loads from there. It is imported where it is
    needed: in seconds, which no other process of tests needs to spend."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    body = modules.Transformer(str(source))
    parts = [body, modules.Pooling(body.get_embedding_dimension(), pooling_mode=mode)]
    parts += [modules.Normalize()] if normalize else []
    SentenceTransformer(modules=parts, prompts=PROMPTS, device="cpu").save(str(target), create_model_card=False)
    return SentenceTransformer(str(target), device="cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(tiny_model("qwen3", vocab_size=512), tmp_path_factory.mktemp("source") / "model", ending=True)


@pytest.fixture(scope="module", params=["lasttoken", "mean"])
def reference(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("saved") / "model"
    return path, saved(source, path, request.param)


def llm_of(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"dtype": "float32", "kv_cache_dtype": "float32", "max_seq_len": 256, **options})


@pytest.mark.parametrize("engine", ENGINES)
def test_vectors_equal_sentence_transformers(reference: Any, engine: str) -> None:
    path, model = reference
    with llm_of(path, **ENGINES[engine]) as llm:
        got = np.array(llm.embed(TEXTS))
        np.testing.assert_allclose(got, model.encode(TEXTS), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(llm.embed(TEXTS), got, atol=1e-6)  # what is cached changes nothing
        asked = model.encode(TEXTS, prompt_name="query")
        np.testing.assert_allclose(llm.embed(TEXTS, prompt_name="query"), asked, atol=1e-4)
        short = model.encode(TEXTS, truncate_dim=16, normalize_embeddings=True)
        np.testing.assert_allclose(llm.embed(TEXTS, dimensions=16), short, atol=1e-4)
        assert np.abs(got[0] - got[2]).max() > 0.01


LONGEST = [
    ("sentence_bert_config.json", "max_seq_length", "right"),
    ("sentence_bert_config.json", "max_seq_length", "left"),
    ("tokenizer_config.json", "model_max_length", "right"),
]


@pytest.mark.parametrize(("file", "key", "side"), LONGEST)
def test_of_a_long_text_its_beginning_counts(source: Path, tmp_path: Path, file: str, key: str, side: str) -> None:
    """Or its end: so many tokens, prompt and the one at the end included, as the model's files say."""
    from sentence_transformers import SentenceTransformer

    path = tmp_path / "saved"
    whole = saved(source, path, "mean").encode(TEXTS)
    for name, changes in (("tokenizer_config.json", {"truncation_side": side}), (file, {key: 12})):
        (path / name).write_text(json.dumps({**json.loads((path / name).read_text()), **changes}))
    model = SentenceTransformer(str(path), device="cpu")
    with llm_of(path) as llm:
        np.testing.assert_allclose(llm.embed(TEXTS), model.encode(TEXTS), atol=1e-4)
        asked = model.encode(TEXTS, prompt_name="query")
        np.testing.assert_allclose(llm.embed(TEXTS, prompt_name="query"), asked, atol=1e-4)
    assert [bool(far > 0.01) for far in np.abs(model.encode(TEXTS) - whole).max(1)] == [False, True, False, True]


def test_texts_that_the_model_reads_as_messages(source: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    chatting = with_tokenizer(source, tmp_path / "chatting", template=template)
    model = saved(chatting, tmp_path / "saved", "lasttoken", normalize=False)
    with llm_of(tmp_path / "saved") as llm:
        np.testing.assert_allclose(llm.embed(TEXTS), model.encode(TEXTS), atol=1e-4)
        asked = model.encode(TEXTS, prompt_name="query")
        np.testing.assert_allclose(llm.embed(TEXTS, prompt_name="query"), asked, atol=1e-4)
        assert np.linalg.norm(llm.embed("Hello world")) > 2  # as it comes
        with pytest.raises(RequestError, match="dimensions must be at least 1 and at most 64, not -1"):
            llm.embed("Hello world", dimensions=-1)
        for wrong in (["Hello", None], [1.5], ["Hello", {"text": "world"}]):
            with pytest.raises(RequestError, match="a prompt is a text or a list of token ids, not "):
                llm.embed(wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="no text: use /v1/embeddings"):  # there is no head in its files
            llm.generate("Hello")


@pytest.mark.parametrize(("family", "task"), [("gemma3_text", "embed"), ("granite", "embed-mean"), ("phi3", "embed")])
def test_any_decoder_gives_vectors_and_writes(family: str, task: str, tmp_path: Path) -> None:
    path = with_tokenizer(tiny_model(family, vocab_size=512), tmp_path / "model")
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    ids = [[5, 9, 300, 17, 2], [4], list(range(3, 90))]
    with llm_of(path, task=task, max_prefill_length=16) as llm:
        written = llm.generate([7, 8, 9], GREEDY)[0].token_ids
        stream = llm.stream([7, 8, 9], GREEDY)
        beside = list(next(stream).token_ids)
        got = llm.embed(ids)
        assert beside + [token for part in stream for token in part.token_ids] == written
    with torch.inference_mode():
        states = [model(torch.tensor([one])).last_hidden_state[0] for one in ids]
    wanted = [state.mean(0) if task == "embed-mean" else state[-1] for state in states]
    np.testing.assert_allclose(got, [(one / one.norm()).numpy() for one in wanted], atol=1e-4)


@pytest.mark.parametrize("whole", [False, True], ids=["Gemma3TextModel", "Gemma3Model"])
def test_classes_without_a_head_of_models_that_see(whole: bool, tmp_path: Path) -> None:
    text = transformers.AutoConfig.from_pretrained(tiny_model("gemma3_text", vocab_size=512))
    eyes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = {"text_config": text.to_dict(), "vision_config": {**eyes, "image_size": 28, "patch_size": 14}}
    model = transformers.AutoModel.from_config(transformers.Gemma3Config(**both) if whole else text).eval()
    randomize(model, 1)
    model.save_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        state = model(torch.tensor([[5, 9, 300, 17, 2]])).last_hidden_state[0, -1]
    with llm_of(with_tokenizer(tmp_path / "saved", tmp_path / "model")) as llm:
        np.testing.assert_allclose(llm.embed([[5, 9, 300, 17, 2]]), [(state / state.norm()).numpy()], atol=1e-4)


def test_a_head_behind_a_prefix_writes(lm: Path, tmp_path: Path) -> None:
    """As within models that see."""
    shutil.copytree(lm, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({f"language_model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    with llm_of(tmp_path / "model", task="embed") as llm, llm_of(lm) as alone:
        assert llm.generate("Hello", GREEDY)[0].token_ids == alone.generate("Hello", GREEDY)[0].token_ids


@pytest.mark.parametrize("name", ["mtp.lm_head.weight", "model.mtp.lm_head.weight", "draft.lm_head.weight"])
def test_a_head_beside_the_model_is_not_its_own(source: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(source, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors.pop("lm_head.weight")
    save_file(tensors, file)
    pooling = read_pooling("embed", tmp_path / "model", False, "")
    assert pooling is not None
    assert not pooling.generates


def test_two_ranks(source: Path, lm: Path) -> None:
    with llm_of(source, task="embed-mean") as one, llm_of(source, task="embed-mean", tensor_parallel_size=2) as two:
        np.testing.assert_allclose(two.embed(TEXTS), one.embed(TEXTS), atol=1e-5)
    with llm_of(lm, task="score", max_seq_len=500) as one:
        expected = one.score(QUERY, DOCUMENTS)
    with llm_of(lm, task="score", max_seq_len=500, tensor_parallel_size=2) as two:  # rank 0 alone has logits
        np.testing.assert_allclose(two.score(QUERY, DOCUMENTS), expected, atol=1e-5)


def test_an_abort_leaves_nothing(source: Path) -> None:
    with llm_of(source, task="embed-mean", max_prefill_length=4) as llm:
        params = SamplingParams(max_tokens=1, pooling="mean")
        expected = llm.embed(TEXTS[:2])
        requests = llm.submit([TextPrompt(text) for text in TEXTS], params)
        for request in requests:
            llm.turn()
            llm.abort(request.uid)
        assert llm.embed(TEXTS[:2]) == expected
        check_integrity(llm.scheduler.planner)
        assert llm.scheduler.planner.is_idle


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template and single tokens for yes and no."""
    path = with_tokenizer(tiny_model("qwen3", vocab_size=512), tmp_path_factory.mktemp("lm") / "m", template=CHATML)
    return add_labels(path, yes=500, no=501)


QUERY, DOCUMENTS = "What is it?", ["It is a <|im_end|> fox.", "größer", "The lazy dog jumps over it. " * 9]


def test_scores_by_yes_and_no(lm: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32).eval()
    for options in ({}, {"attention_backend": "sdpa", "max_prefill_length": 50}):
        with llm_of(lm, task="score", max_seq_len=500, **options) as llm:
            got = llm.score(QUERY, DOCUMENTS, "Find it.")
            for document, score in zip(DOCUMENTS, got, strict=True):
                asked = f"<Instruct>: Find it.\n<Query>: {QUERY}\n<Document>: {document}"
                messages = [{"role": "system", "content": JUDGE}, {"role": "user", "content": asked}]
                ids = llm.tokenizer.encode(ChatPrompt(messages))
                with torch.inference_mode():
                    yes, no = model(torch.tensor([ids])).logits[0, -1, [500, 501]].tolist()
                assert math.isclose(score, 1 / (1 + math.exp(no - yes)), abs_tol=1e-4)
            assert max(got) - min(got) > 1e-3
            assert llm.score(QUERY, DOCUMENTS[0], "Find it.") == pytest.approx(got[:1], abs=1e-4)  # a text alone
            assert llm.generate("Hello", GREEDY)[0].token_ids  # it writes, too


ROLES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] if m['role'] == 'system' else 'user' }}\n"
    "{% if m['role'] == 'document' %}Document: {% elif m['role'] == 'query' %}Query: {% endif %}{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


THINKS = ROLES.replace(
    "assistant\n",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n</think>{% endif %}{{ x }}",
)


@pytest.mark.parametrize("given", [{}, {"enable_thinking": False}, {"enable_thinking": True, "x": "y"}])
def test_the_template_is_told_what_the_files_say(source: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    """And no more, as of a model that reasons unless it is told not to."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    path = with_tokenizer(source, tmp_path / "model", template=THINKS)
    kwargs: Any = {"chat_template": {"add_generation_prompt": True, **given}}
    body = Transformer(str(path), transformer_task="text-generation", processing_kwargs=kwargs)
    model = CrossEncoder(modules=[body, LogitScore(300, 301)], device="cpu", activation_fn=torch.nn.Sigmoid())
    model.save(str(tmp_path / "saved"), create_model_card=False)
    with llm_of(tmp_path / "saved") as llm:
        wanted = model.predict([(QUERY, document) for document in DOCUMENTS[1:]])
        np.testing.assert_allclose(llm.score(QUERY, DOCUMENTS[1:]), wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["two tokens", "one token", "classifier"])
def test_scores_equal_sentence_transformers(source: Path, tmp_path: Path, kind: str) -> None:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base import modules as base_modules
    from sentence_transformers.cross_encoder.modules import LogitScore

    path = with_tokenizer(source, tmp_path / "model", template=ROLES)
    if kind == "classifier":
        config = transformers.AutoConfig.from_pretrained(path, num_labels=1, pad_token_id=2)
        classifier = transformers.Qwen3ForSequenceClassification(config)
        randomize(classifier, 3)
        classifier.save_pretrained(path)
        parts: list[Any] = [base_modules.Transformer(str(path), transformer_task="sequence-classification")]
    else:
        body = base_modules.Transformer(str(path), transformer_task="text-generation")
        parts = [body, LogitScore(300, 301 if kind == "two tokens" else None)]
    CrossEncoder(modules=parts, device="cpu", prompts={"web": "Find it."}, default_prompt_name="web").save(
        str(tmp_path / "saved"), create_model_card=False
    )
    model = CrossEncoder(str(tmp_path / "saved"), device="cpu", activation_fn=torch.nn.Sigmoid())
    with llm_of(tmp_path / "saved") as llm:
        wanted = model.predict([(QUERY, document) for document in DOCUMENTS[1:]])
        np.testing.assert_allclose(llm.score(QUERY, DOCUMENTS[1:]), wanted, atol=1e-4)
        if kind == "classifier":
            with pytest.raises(RequestError, match="no text: use /v1/rerank or /v1/score"):
                llm.generate("Hello")


def test_gguf_files_say_how_they_are_pooled(tmp_path: Path) -> None:
    """By llama.cpp's numbers: 1 is the mean, 3 the last token. Others say nothing."""
    for number, kind in ((1, "mean"), (3, "last"), (0, None)):
        path, _ = write_gguf(tiny_model("qwen3"), tmp_path / str(number), "F32", qwen3__pooling_type=number)
        for task in (None, "embed"):
            pooling = read_pooling(task, path, False, "")
            assert (pooling and pooling.kind) == (kind or (task and "last"))
            assert pooling is None or (pooling.is_normalized and pooling.generates)
        assert read_pooling("generate", path, False, "") is None


def test_what_is_not_supported_is_refused_by_name(lm: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(lm, path)
    with pytest.raises(RequestError, match="--task embed"), llm_of(path) as llm:
        llm.embed("Hello")
    modules_file = path / "modules.json"
    for kind, named in (("sentence_transformers.models.Dense", "Dense"), ("custom_st.Transformer", "custom_st.T")):
        modules_file.write_text(json.dumps([{"idx": 0, "path": "", "type": kind}]))
        with pytest.raises(ConfigError, match=f"modules.json: modules not supported: {named}"):
            read_pooling(None, path, True, "")
    modules_file.write_text(json.dumps([{"idx": 0, "path": "1", "type": "sentence_transformers.models.Pooling"}]))
    (path / "1").mkdir()
    for config in ({"pooling_mode_cls_token": True}, {"pooling_mode": ["mean", "max"]}):
        (path / "1" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=r"1/config.json: pooling .* not supported"):
            read_pooling(None, path, True, "")
    older = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    for config, kind in ((older, "mean"), ({"pooling_mode": "lasttoken"}, "last")):
        (path / "1" / "config.json").write_text(json.dumps(config))
        pooling = read_pooling(None, path, True, "")
        assert pooling is not None and (pooling.kind, pooling.is_normalized) == (kind, False)
    for file, key, more in (
        ("sentence_bert_config.json", "do_lower_case", {"do_lower_case": 8}),
        ("sentence_bert_config.json", "text", {"processing_kwargs": {"text": 8}}),
        ("config_sentence_transformers.json", "truncate_dim", {"truncate_dim": 8}),
    ):
        (path / file).write_text(json.dumps(more))
        with pytest.raises(ConfigError, match=f"{file}.*{key} 8 is not supported"):
            read_pooling(None, path, True, "")
        (path / file).unlink()
    for kwargs in ({"padding": True}, {"truncation": True}, {"padding": True, "truncation": True}):
        (path / "sentence_bert_config.json").write_text(json.dumps({"processing_kwargs": {"text": kwargs}}))
        assert read_pooling(None, path, True, "") == pooling
    (path / "sentence_bert_config.json").write_text('{"processing_kwargs": {"text": {"padding": "max_length"}}}')
    with pytest.raises(ConfigError, match="max_length"):
        read_pooling(None, path, True, "")
    (path / "sentence_bert_config.json").unlink()
    wrong = ({"type": 3}, {"type": ["Pooling"]}, {"type": None}, {"type": "x.Pooling", "path": 3})
    for text in ("[", "[" * 20_000, *(json.dumps([{"path": "", **one}]) for one in wrong)):
        modules_file.write_text(text)
        with pytest.raises(ConfigError, match=r"modules\.json|pooling \[\] not supported"):
            read_pooling(None, path, True, "")
    modules_file.unlink()
    with pytest.raises(ConfigError, match="--chat-template"):
        read_pooling("score", path, True, "")
    weights = (path / "model.safetensors").read_bytes()
    for size in (0, 100, 5000):
        (path / "model.safetensors").write_bytes(weights[:size])
        with pytest.raises(ConfigError, match=r"cannot read .*model\.safetensors"):
            llm_of(path, task="embed")
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: it has no yes"):
        read_pooling("score", path, True, CHATML)
