"""Tokenizers of GGUF files: the same ids and texts as the tokenizers of transformers that they were made of."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers import CohereTokenizer, GemmaTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer

from minisgl.errors import ConfigError
from minisgl.gguf.tokenizer import build_tokenizer
from minisgl.message.messages import ChatPrompt
from minisgl.tokenizer.detokenize import IncrementalDecoder
from minisgl.tokenizer.tokenize import HFTextCodec
from minisgl.utils.fields import Fields
from tests.tokenizers_fixture import CHATML

TEXTS = [
    *("", " ", "  ", "\n", "\n\n \n\t ", "a\r\nb\rc\n\n\nd\t\te", " " * 40 + "y", "\n" * 9, "x" * 40),
    *("Hello world", " Hello  world   !", "don't DON'T we'Ll you'RE it's'S", "3 33 333 3333 33333 3.14 1,000,000"),
    *(
        "\u00b2\u00b3\u00bd \u216b \u0664\u0665 \uff11\uff12",
        "你好，世界！我想在apple工作1314151天～",
        "日本語カタカナ 한국어",
        "नमस्ते हिन्दी",
    ),
    *(
        "e\u0301 A\u030a o\u031b\u0323 \u1e9b\u0323",
        "🙂🙃👩\u200d👩\u200d👧🏳️\u200d🌈🇩🇪",
        "\u00a0\u3000\u2028\x00\x07\ufeff\ufffd\U0010ffff",
    ),
    *(
        "if(a&&b){ return x[0]->y; }//??",
        "''''```` \"\"\"...!!!???$$$^^^~~~===<<<>>>|||",
        "ĠHello Ċ Ã©",
        "▁Hello ▁▁ world",
    ),
    *("camelCaseWord HTTPServer's ÀÉ", "<|end|>", "a<|end|> b <|end|>c", "<tool>x</tool> <tool >", "<s>a</s> <unk>b"),
]
SPECIAL = {"<|end|>": 3, "<|start|>": 3, "<tool>": 4, "</tool>": 4}  # tokens and their types in GGUF files
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = pre.ByteLevel(add_prefix_space=False)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
)
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


def split(*expressions: str) -> list[Any]:
    return [pre.Split(Regex(expression), "isolated") for expression in expressions]


def cased(tail: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{UPPER}*{LOWER}+{tail}|{lead}{UPPER}+{LOWER}*{tail}"


BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)
# As the models' own tokenizer.json have them. ignore_merges makes no difference with the vocabulary of these tests.
OTHERS = {
    "smollm": [pre.Digits(individual_digits=True), WORDS],
    "starcoder": [pre.Digits(individual_digits=True), WORDS],
    "falcon": [pre.Punctuation("contiguous"), WORDS, pre.Digits(individual_digits=False), *split("[0-9][0-9][0-9]")],
    "llama-bpe": [*split(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"), BYTES],
    "seed-coder": [
        *split(
            rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        BYTES,
    ],
    "tekken": [*split(cased("") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"), BYTES],
    "gpt-4o": [
        *split(cased(f"{CONTRACTIONS}?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        BYTES,
    ],
    "deepseek-v3": [
        *split(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", rf"{DEEPSEEK}|\s*[\r\n]+|\s+(?!\S)|\s+"),
        BYTES,
    ],
    "deepseek-coder": [*split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN), pre.Digits(individual_digits=True), BYTES],
}
OTHERS |= dict.fromkeys(("lfm2", "glm4", "dbrx"), OTHERS["llama-bpe"])
CLASSES: dict[str, Any] = {
    "gpt-2": GPT2Tokenizer,
    "exaone4": GPT2Tokenizer,
    "qwen2": Qwen2Tokenizer,
    "olmo": GPTNeoXTokenizer,
}
CLASSES |= {"command-r": CohereTokenizer}


@cache
def byte_level() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary whose merges go over all borders of words: where a text is split shows in its ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=[*SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return tokenizer.get_vocab(), merges  # type: ignore[return-value]


def metadata(tokens: list[str], kinds: dict[str, int], **others: Any) -> dict[str, Any]:
    """As converters write them; the vocabulary is padded."""
    types = [kinds.get(token, 1) for token in tokens] + [5, 5]
    keys = {"tokens": [*tokens, "[PAD1]", "[PAD2]"], "token_type": types, **others}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@cache
def pair(name: str) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer of a kind of models, and what is made of its metadata."""
    vocab, merges = byte_level()
    if name in CLASSES:
        own = CLASSES[name](vocab=vocab, merges=merges).backend_tokenizer
    else:
        own = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        own.pre_tokenizer = pre.Sequence(OTHERS[name])
        own.decoder = GPT2Tokenizer(vocab=vocab, merges=merges).backend_tokenizer.decoder
    own.add_tokens([AddedToken(token, special=kind == 3, normalized=False) for token, kind in SPECIAL.items()])
    texts = [" ".join(merge) for merge in merges]
    tokens = sorted(vocab, key=vocab.__getitem__)
    made = metadata(tokens, SPECIAL, model="gpt2", pre=name, merges=texts, add_bos_token=False)
    return own, build_tokenizer(Fields(made, "x.gguf")).backend_tokenizer


def check(name: str, text: str) -> None:
    own, made = pair(name)
    ids = own.encode(text, add_special_tokens=False).ids
    assert made.encode(text, add_special_tokens=False).ids == ids
    assert made.decode(ids, skip_special_tokens=False) == own.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", [*CLASSES, *OTHERS])
def test_ids_and_texts(name: str) -> None:
    for text in TEXTS:
        check(name, text)


@given(st.sampled_from([*CLASSES, *OTHERS]), st.text(max_size=40))
def test_any_text(name: str, text: str) -> None:
    check(name, text)


@cache
def sentencepiece() -> tuple[Any, dict[str, Any]]:
    """SentencePiece's own tokenizer, trained on the spot, and the metadata that a converter makes of it."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text.strip()] * 4),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    own = SentencePieceProcessor(model_proto=model.getvalue())
    size = range(own.vocab_size())
    tokens = [own.IdToPiece(index) for index in size]
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    scores = [own.GetScore(index) for index in size] + [-1000.0, -1000.0]
    return own, metadata(tokens, kinds, model="llama", pre="default", scores=scores)


PLAIN = [text for text in TEXTS if "<" not in text and "\u2581" not in text and "\x00" not in text]


def check_sentencepiece(text: str) -> None:
    own, made = sentencepiece()
    ids = own.encode(text)
    tokenizer = build_tokenizer(Fields(made, "x.gguf"))
    assert tokenizer.encode(text) == [1, *ids]
    assert tokenizer.decode(ids) == own.decode(ids)


@pytest.mark.parametrize("text", PLAIN)
def test_sentencepiece(text: str) -> None:
    check_sentencepiece(text)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\u2581\x00"), max_size=30))
def test_any_text_of_sentencepiece(text: str) -> None:
    check_sentencepiece(text)


def test_control_tokens_of_sentencepiece_and_no_prefix() -> None:
    _, made = sentencepiece()
    assert build_tokenizer(Fields(made, "x")).encode("a</s>")[-1] == 2
    tokenizer = build_tokenizer(Fields(made | {"tokenizer.ggml.add_space_prefix": False}, "x"))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("xyz"))[1] == "x"
    assert tokenizer.decode(tokenizer.encode(" xyz"), skip_special_tokens=True) == " xyz"


@cache
def pieces() -> tuple[Any, dict[str, Any]]:
    """Gemma's own tokenizer of some merges, and the metadata that a converter makes of it."""
    bytes_ = {f"<0x{byte:02X}>": 6 for byte in range(256)}
    special = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 2, "<mask>": 3, "<|end|>": 3, "<tool>": 4}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator((text for text in TEXTS[:20] for _ in range(4)), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    own, vocab = GemmaTokenizer(vocab=tokenizer.get_vocab(), merges=merges), tokenizer.get_vocab()
    own.add_tokens(
        [AddedToken(token, special=special[token] == 3, normalized=False) for token in ("<|end|>", "<tool>")]
    )
    ids = {f"{name}_token_id": i for i, name in enumerate(("padding", "eos", "bos", "unknown"))}
    flags = {"add_bos_token": False, "add_space_prefix": False, "merges": [" ".join(pair) for pair in merges]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    return own, metadata(tokens, bytes_ | special, model="gemma4", **ids, **flags)


def check_pieces(text: str) -> None:
    own, made = pieces()
    tokenizer, ids = build_tokenizer(Fields(made, "x.gguf")), own.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == [2, *ids]  # BOS, whatever the file says, as early ones are wrong
    assert tokenizer.decode(ids) == own.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_with_merges_of_their_own(text: str) -> None:
    check_pieces(text)


@given(st.text(max_size=30))
def test_any_text_of_pieces_with_merges(text: str) -> None:
    check_pieces(text)


def small(**others: Any) -> dict[str, Any]:
    vocab, merges = byte_level()
    texts = [" ".join(merge) for merge in merges]
    tokens = sorted(vocab, key=vocab.__getitem__)
    return metadata(tokens, SPECIAL, **{"model": "gpt2", "pre": "qwen2", "merges": texts, **others})


@pytest.mark.parametrize(
    ("flags", "begins", "ends"),
    [
        ({}, False, False),
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"pre": "llama-bpe"}, True, False),
        ({"pre": "llama-bpe", "add_bos_token": False}, False, False),
    ],
)
def test_what_stands_around_a_text(flags: dict[str, Any], begins: bool, ends: bool) -> None:
    tokenizer = build_tokenizer(Fields(small(bos_token_id=0, eos_token_id=1, **flags), "x"))
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello") == [0] * begins + plain + [1] * ends
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|end|>", "<|start|>")


def test_special_tokens_and_users_own() -> None:
    tokenizer = build_tokenizer(Fields(small(eos_token_id=0), "x"))
    vocab, _ = byte_level()
    special = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert special == {token: kind == 3 for token, kind in SPECIAL.items()}
    assert tokenizer.encode("<tool>")[0] == vocab["<tool>"]
    assert tokenizer.decode(tokenizer.encode("a<tool>b<|end|>"), skip_special_tokens=True) == "a<tool>b"
    assert len(tokenizer) == len(vocab)  # without what pads the vocabulary


def test_chat_templates() -> None:
    named = {"tokenizer.chat_template": CHATML, "tokenizer.chat_templates": ["tool_use"]}
    one = build_tokenizer(Fields(small() | named, "x"))
    assert one.chat_template == CHATML
    two = build_tokenizer(Fields(small() | named | {"tokenizer.chat_template.tool_use": "tools"}, "x"))
    messages = [{"role": "user", "content": "hi"}]
    assert two.apply_chat_template(messages, tokenize=False) == one.apply_chat_template(messages, tokenize=False)
    assert two.apply_chat_template(messages, tools=[{"type": "function"}], tokenize=False) == "tools"
    assert build_tokenizer(Fields(small(), "x")).chat_template is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model must be gpt2, which is byte-level BPE, llama or gemma4, not 'bert'"),
        ({"model": None}, "tokenizer.ggml.model must be gpt2, which is byte-level BPE, llama or gemma4, not None"),
        ({"pre": None}, "tokenizer.ggml.pre must be one of gpt-2, "),
        ({"pre": "default"}, "tokenizer.ggml.pre must be one of gpt-2, "),
        ({"pre": "quux"}, "tokenizer.ggml.pre must be one of gpt-2, "),
        ({"merges": None}, "tokenizer.ggml.merges must be a list"),
        ({"merges": ["a nosuchtoken"]}, "tokenizer.ggml.merges must be of the tokens ("),
        ({"merges": [1]}, "tokenizer.ggml.merges must be a list"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "tokenizer.ggml.tokens must be a list without a token twice"),
        ({"tokens": []}, "tokenizer.ggml.tokens must be a list"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type must be a list of "),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id must be a whole number, 0 to "),
        ({"bos_token_id": "a"}, "tokenizer.ggml.bos_token_id must be a whole number, 0 to "),
    ],
)
def test_what_cannot_be_a_tokenizer(changes: dict[str, Any], told: str) -> None:
    bad = small() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(Fields(bad, "some.gguf"))
    assert str(caught.value).startswith("some.gguf: ") and told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_behind_a_gap_become_text(tmp_path: Path) -> None:
    """Unused tokens may stand among the others."""
    made = small()
    made["tokenizer.ggml.tokens"].append("<behind>")
    made["tokenizer.ggml.token_type"].append(4)
    build_tokenizer(Fields(made, "x")).save_pretrained(tmp_path)
    codec = HFTextCodec(str(tmp_path))
    last = len(made["tokenizer.ggml.tokens"]) - 1
    assert codec.encode("<behind>", special=False) == [last]
    assert codec.decode([last - 1, last]) == "<behind>" and codec.vocab_size == last + 1


def test_a_file_chats_and_streams(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    made = small(pre="smollm", eos_token_id=0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(made["tokenizer.ggml.tokens"])
    writer.add_token_types(made["tokenizer.ggml.token_type"])
    writer.add_token_merges(made["tokenizer.ggml.merges"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHATML.replace("<|im_start|>", "<|start|>").replace("<|im_end|>", "<|end|>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    codec = HFTextCodec(str(path))
    own, _ = pair("smollm")
    text = codec.render_chat(ChatPrompt([{"role": "user", "content": "größer 12 🙂<|end|>"}]))
    ids = codec.encode(text, special=False)
    assert ids.count(0) == 1 and ids[-1] != 0  # what a client writes is no control token
    for known in TEXTS:
        assert codec.encode(known, special=True) == own.encode(known).ids
        decoder = IncrementalDecoder(codec, skip_special=False)
        pieces = [decoder.push([token]) for token in codec.encode(known, special=True)]
        assert "".join(pieces) + decoder.flush() == codec.decode(codec.encode(known, special=True), skip_special=False)
