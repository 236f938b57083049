"""`puna tokenize` against the `tokenizers` library on one thread: MB/s of UTF-8 text from one .jsonl file to token ids.

    python benchmarks/tokenize_corpus.py                  # 3 rounds of 1 and 2 workers, about 5 minutes on 2 cores

Ours is the whole job: processes started, file read and parsed, shards, checksums and manifest written. The peer gets
the same texts already in memory and gives lists of ids (`encode_batch_fast`, 256 texts a call). The ratio is ours
divided by (workers x peer); the goal is 0.85. (A file tokenize.py would hide the module that `inspect` needs.)
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

from side_by_side import arguments, compare, report

MEGABYTES, VOCAB = 64, 32000


def make_corpus(folder: Path) -> None:
    """Pieces of Python's own library as documents of many lengths, and a tokenizer learned from it."""
    from puna.corpus.in_memory import STANDARD_LIBRARY, read_documents
    from puna.text.train_tokenizer import train_bpe

    texts = [document.text for document in read_documents([STANDARD_LIBRARY])]
    train_bpe(texts[::3], VOCAB).save(folder / "tokenizer")
    draw, written = random.Random(0), 0
    with open(folder / "corpus.jsonl", "w") as file:
        while written < MEGABYTES * 1_000_000:
            text = draw.choice(texts)
            begin = draw.randrange(len(text))
            text = text[begin : begin + round(draw.lognormvariate(7.5, 1.2))]
            if text.strip():
                written += len(text.encode())
                file.write(json.dumps({"text": text, "url": "https://docs.python.org/3/"}) + "\n")


def read_texts(folder: Path) -> list[str]:
    with open(folder / "corpus.jsonl") as file:
        return [json.loads(line)["text"] for line in file]


def ours(folder: Path, workers: int) -> float:
    from puna.corpus.tokenize import tokenize_corpus

    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        figures = tokenize_corpus([folder / "corpus.jsonl"], folder / "tokenizer", f"{out}/shards", workers=workers)
        return figures["text_bytes"] / (time.perf_counter() - started) / 1e6


def library(folder: Path, workers: int) -> float:
    """Speed of one thread, times the workers: what as many independent ones would do."""
    from tokenizers import Tokenizer

    engine, texts = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")), read_texts(folder)
    started, tokens = time.perf_counter(), 0
    for first in range(0, len(texts), 256):
        encodings = engine.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in encodings)
    return workers * sum(len(text.encode()) for text in texts) / (time.perf_counter() - started) / 1e6


def main() -> None:
    options = arguments()
    if options.worker:
        who, workers, folder = options.worker
        print((ours if who == "puna" else library)(Path(folder), int(workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder))
        cases = [[workers, folder] for workers in options.cases or ["1", "2"]]
        rows = compare(__file__, cases, "puna", "tokenizers", options.rounds, "MB/s")
    for row in rows:
        row["case"] = f"{row['case'].split()[0]} worker(s)"
    report("tokenize", rows, "puna", "tokenizers", "MB/s")


if __name__ == "__main__":
    main()
