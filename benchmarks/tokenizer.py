"""Encoding speed: puna's Tokenizer beside the bare `tokenizers` library, in interleaved rounds of one process.

    python benchmarks/tokenizer.py TEXT [--tokenizer PATH] [--rounds 7]

Without --tokenizer a byte-level BPE of 4096 tokens is trained on the first 300 kB of the text. Prints a table (million
characters per second, median over rounds), the ratio with its spread, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer as Engine

from puna.base.console import say, table
from puna.text.tokenizer import Tokenizer
from puna.text.train_tokenizer import train_bpe

DOCUMENT = 2000  # characters per text


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], raw: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Times of both, alternating which goes first, after one warm-up round."""
    ours(), raw()
    ours_times, raw_times = [], []
    for number in range(rounds):
        if number % 2:
            ours_times.append(seconds(ours))
            raw_times.append(seconds(raw))
        else:
            raw_times.append(seconds(raw))
            ours_times.append(seconds(ours))
    return ours_times, raw_times


def row(name: str, characters: int, times: tuple[list[float], list[float]]) -> dict[str, float | str]:
    """Speeds and the ratio ours / raw of one comparison."""
    ours, raw = times
    ratios = sorted(r / o for o, r in zip(ours, raw, strict=True))
    return {
        "what": name,
        "ours_mchars_s": round(characters / statistics.median(ours) / 1e6, 2),
        "raw_mchars_s": round(characters / statistics.median(raw) / 1e6, 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8", errors="replace")
    texts = [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else train_bpe([text[:300_000]], 4096)
    raw = Engine.from_str(tokenizer.to_json())
    raw.encode_special_tokens = True
    assert tokenizer.encode_batch(texts) == [e.ids for e in raw.encode_batch(texts, add_special_tokens=False)]

    def raw_one_by_one() -> object:
        return [raw.encode(t, add_special_tokens=False).ids for t in texts]

    def raw_batch() -> object:
        return [e.ids for e in raw.encode_batch_fast(texts, add_special_tokens=False)]

    def raw_decode() -> object:
        return [raw.decode(ids, skip_special_tokens=False) for ids in all_ids]

    all_ids = tokenizer.encode_batch(texts)
    pairs = {
        "encode": (lambda: [tokenizer.encode(t) for t in texts], raw_one_by_one),
        "encode_batch": (lambda: tokenizer.encode_batch(texts), raw_batch),
        "decode": (lambda: [tokenizer.decode(ids) for ids in all_ids], raw_decode),
    }
    rows = [row(name, len(text), compare(*pair, options.rounds)) for name, pair in pairs.items()]
    header = ["what", "ours M/s", "raw M/s", "ratio", "min", "max"]
    say(table([[str(value) for value in r.values()] for r in rows], header))
    print(json.dumps({"characters": len(text), "vocab_size": tokenizer.vocab_size, "rows": rows}))


if __name__ == "__main__":
    main()
