"""Small tokenizers on disk: byte-level BPE with ChatML, and sentencepiece-style with byte fallback."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = ["The quick brown fox jumps over the lazy dog. Hello world, how are you?", "größer 你好世界 🙂🙃 naïve café"] * 8


def make_byte_level(directory: Path, *, bos: bool = False, template: str | None = CHATML) -> Path:
    """A byte-level BPE tokenizer; with `bos`, a post-processor that puts one before plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        template = "<|endoftext|>" + template if template else template
    return _save(tokenizer, directory, template, eos="<|im_end|>")


def add_labels(directory: Path, **ids: int) -> Path:
    """Tokens of a byte-level tokenizer that no text has, with these ids."""
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] |= ids
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return directory


def make_sentencepiece(directory: Path) -> Path:
    """A Llama-2-like tokenizer: spaces as U+2581, bytes as <0xXX>, one leading space dropped when decoding."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for character in "▁abcdefghijklmnopqrstuvwxyzHWT.,?!äö":
        vocab.setdefault(character, len(vocab))
    merges = [("▁", "H"), ("▁", "w"), ("▁w", "o"), ("l", "l"), ("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(tokenizer, directory, None, eos="</s>")


def _save(tokenizer: Tokenizer, directory: Path, template: str | None, *, eos: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "clean_up_tokenization_spaces": False}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


SYLLABLES = [a + b + c for a in ("", *"bdfghklmnprstvw", "ch", "st") for b in "aeiou" for c in ("", *"nrstl")]


def make_words(directory: Path, vocab_size: int) -> Path:
    """All bytes, and made-up words, as many as real tokenizers have: what makes a mask of text dear."""
    rng = random.Random(0)
    vocab = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[token] = len(vocab)
    while len(vocab) < vocab_size:
        word = "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3, 3, 4))))
        vocab.setdefault(rng.choice(("", "Ġ")) + word, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in list(vocab)[:3]])
    return _save(tokenizer, directory, CHATML, eos="<|im_end|>")
