"""Generate and tokenize the corpus on all cores: `python tools/demo_model/prepare.py --model DIR --out DIR`.

Each worker writes `tokens_NNN.npy` (rows of packed documents; the top bit of an id is set where the loss counts
fully) and `numbers_NNN.npy` (which document of its row a token belongs to).
"""

import argparse
import itertools
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
from corpus import mix
from model_files import CONTEXT, END_OF_TEXT, IM_END, IM_START
from tokenizers import Tokenizer

LOSS_BIT = 1 << 15
_BATCH = 2000
_OPEN_ROWS = 8


def loss_mask(ids: np.ndarray, start: int, end: int, assistant: int) -> np.ndarray:
    """True on what the assistant says and its end marker; everywhere in a text without messages."""
    mask = np.zeros(len(ids), dtype=bool)
    starts = np.flatnonzero(ids == start)
    if not len(starts):
        return ~mask
    ends = np.flatnonzero(ids == end)
    for first, last in zip(starts, ends, strict=True):
        if ids[first + 1] == assistant:
            mask[first + 3 : last + 1] = True
    return mask


def pack(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Whole documents side by side in rows of CONTEXT + 1 tokens.

    Returns:
        tokens uint16 and document numbers uint8, both [num_rows, CONTEXT + 1]; number 0 is padding.
    """
    width = CONTEXT + 1
    open_rows: list[list[int]] = []
    open_used: list[int] = []
    closed: list[list[int]] = []
    for i, document in enumerate(documents):
        fits = [r for r, used in enumerate(open_used) if used + len(document) <= width and len(open_rows[r]) < 255]
        if fits:
            row = max(fits, key=open_used.__getitem__)
            open_rows[row].append(i)
            open_used[row] += len(document)
            continue
        if len(open_rows) == _OPEN_ROWS:
            fullest = max(range(_OPEN_ROWS), key=open_used.__getitem__)
            closed.append(open_rows.pop(fullest))
            open_used.pop(fullest)
        open_rows.append([i])
        open_used.append(len(document))
    rows = closed + open_rows
    tokens = np.zeros((len(rows), width), dtype=np.uint16)
    numbers = np.zeros((len(rows), width), dtype=np.uint8)
    for row, members in enumerate(rows):
        at = 0
        for number, i in enumerate(members, start=1):
            size = len(documents[i])
            tokens[row, at : at + size] = documents[i]
            numbers[row, at : at + size] = number
            at += size
    return tokens, numbers


def write_shard(index: int, model_dir: Path, out_dir: Path, seed: int, num_documents: int) -> int:
    """Write one shard; returns its number of tokens."""
    # The tokenizer's own threads would fight with the other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    start, end, text_end = map(tokenizer.get_vocab().__getitem__, (IM_START, IM_END, END_OF_TEXT))
    (assistant,) = tokenizer.encode("assistant").ids
    pieces: list[np.ndarray] = []
    documents = mix.documents(seed * 1000 + index, num_documents)
    while batch := list(itertools.islice(documents, _BATCH)):
        for encoding in tokenizer.encode_batch_fast(batch):
            ids = np.array(encoding.ids, dtype=np.uint16)
            # The newline after the last message would never be generated.
            if ids[-1] not in (end, text_end):
                ids = ids[:-1]
            if len(ids) <= CONTEXT + 1:
                mask = loss_mask(ids, start, end, assistant)
                pieces.append(ids | np.where(mask, LOSS_BIT, 0).astype(np.uint16))
    tokens, numbers = pack(pieces)
    np.save(out_dir / f"tokens_{index:03}.npy", tokens)
    np.save(out_dir / f"numbers_{index:03}.npy", numbers)
    return int((numbers > 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=2_600_000)
    parser.add_argument(
        "--shards", type=int, default=64, help="part of the recipe: another number gives another corpus"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    work = partial(
        write_shard, model_dir=args.model, out_dir=args.out, seed=args.seed, num_documents=args.documents // args.shards
    )
    with multiprocessing.Pool(args.workers) as pool:
        total = sum(pool.imap_unordered(work, range(args.shards)))
    print(f"{args.documents} documents, {total / 1e6:.1f} M tokens")


if __name__ == "__main__":
    main()
