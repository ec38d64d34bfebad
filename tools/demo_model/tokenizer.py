"""Train the byte-level BPE tokenizer on a sample of the corpus: `python tools/demo_model/tokenizer.py --out DIR`."""

import argparse
from pathlib import Path

from corpus import facts, mix, translate
from model_files import MARKUP_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE, write_small_files
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Copying is what a small model does all day, so a word should be cut alike wherever it stands: digits and Chinese
# characters stand alone, and a capitalised word never takes the space before it (`"Ana"` and `is Ana` share tokens).
SPLIT = (
    r"\p{N}|[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]"
    r"|'(?:s|t|re|ve|m|ll|d)\b| ?\p{Ll}+|\p{Lu}+\p{Ll}*|\p{L}+"
    r"| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?=\S)|\s+"
)


def build() -> Tokenizer:
    """An untrained tokenizer with the rules of splitting and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(num_documents: int, seed: int) -> Tokenizer:
    """A tokenizer whose ids 0.. are the special and markup tokens in the order of `model_files`."""
    tokenizer = build()
    added = [AddedToken(token, special=True) for token in SPECIAL_TOKENS]
    added += [AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    # The facts once more on their own: their rare words should not drown in arithmetic.
    answers = [fact.answer for fact in facts.load_facts()] + [chinese for _, chinese in translate.PAIRS]
    sample = answers * 20
    # What the model says has no character in pieces, which sampling could tear apart.
    sample += sorted({char for answer in answers for char in answer if not char.isascii()}) * 1000
    markup = SPECIAL_TOKENS + MARKUP_TOKENS
    for document in mix.documents(seed, num_documents):
        for token in markup:
            document = document.replace(token, "\n")
        sample.append(document)
    tokenizer.train_from_iterator(sample, trainer)
    # The trainer makes all of its special tokens "special"; the markup must not be.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    write_small_files(args.out)
    train(args.documents, args.seed).save(str(args.out / "tokenizer.json"))


if __name__ == "__main__":
    main()
