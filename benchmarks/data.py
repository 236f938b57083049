"""The data path: how fast batches come, how soon the first one, how much memory, and what a bucket costs.

`python benchmarks/data.py [--rounds N]` writes benchmarks/results/data.json. Everything compared is measured in turns
in one run; the shards are random ids in documents of log-normal length (median 500 tokens), in a temporary folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from side_by_side import RESULTS, about

from puna.base.cache import Cache
from puna.base.console import table
from puna.base.files import write_file
from puna.base.hardware import keep_freed_memory
from puna.data.cut import BestFit, Concat
from puna.data.loader import Loader
from puna.data.mixture import Mixture
from puna.data.pack import Rules
from puna.data.reader import ShardReader
from puna.data.shards import Manifest, Shard, read_manifest, write_manifest, write_shard
from puna.data.stream import Lane, Stream

SHARD_TOKENS = 1 << 22


def make_shards(folder: Path, shards: int, tokens: int = SHARD_TOKENS, dtype: str = "uint16") -> Path:
    """Random ids; every shard is the same bytes rotated, so that making them takes no longer than writing them."""
    draw = np.random.default_rng(0)
    lengths = np.maximum(8, draw.lognormal(np.log(500), 1.0, tokens // 100 + 10).astype(np.int64))
    starts = np.concatenate(([0], lengths.cumsum()))
    starts = np.append(starts[starts < tokens], tokens)
    ids = draw.integers(0, 30_000, tokens).astype(dtype)
    infos = [write_shard(folder, f"shard-{i:06d}", Shard(np.roll(ids, i), starts), 4 * tokens) for i in range(shards)]
    write_manifest(folder, Manifest(dtype, 30_000, "0" * 64, 0, 1, False, infos))
    return folder


def open_stream(folder: str | Path, width: int, best_fit: bool = False, cache: Cache | None = None) -> Stream:
    """One source as a training run opens it."""
    reader = ShardReader(str(folder), read_manifest(folder), cache)
    cut = BestFit(width) if best_fit else Concat(width)
    lane = Lane(reader, cut, [cut.count(info) or 0 for info in reader.manifest.shards], key=1)
    return Stream({width: [lane]}, {width: Mixture([(0, [1.0])])}, Rules())


def speed(stream: Stream, rows: int, seconds: float = 1.0) -> float:
    """Tokens per second of whole batches of `rows`, after one to warm up."""
    stream.batch(0, rows)
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        number += 1
        stream.batch(number * rows, rows)
    return number * rows * stream.width / (time.perf_counter() - started)


def loading_speed(stream: Stream, rows: int, seconds: float = 1.0) -> float:
    """Tokens per second of a loader that nobody waits for: what a training process could take in at most."""
    loader = Loader(stream, rows)
    loader.step(0)
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        number += 1
        loader.step(number)
    elapsed = time.perf_counter() - started
    loader.close()
    return number * rows * stream.width / elapsed


def in_turns(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every measure once a round, in alternating order."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        for name in list(measures)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(measures[name]())
    return found


def ratio(found: dict[str, list[float]], ours: str, peer: str) -> dict:
    ratios = [a / b for a, b in zip(found[ours], found[peer], strict=True)]
    return {ours: statistics.median(found[ours]), peer: statistics.median(found[peer]),
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}  # fmt: skip


def against_the_model(root: Path, rounds: int) -> dict:
    """Tokens per second of the stream against those of the debug model's training step, same batches."""
    from puna.base.config import build
    from puna.text.train_tokenizer import train_bpe
    from puna.train.loop import Trainer
    from puna.train.recipe import Recipe

    text = root / "text"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text("\n".join(f"line {i} of file {number}" for i in range(4000)))
    train_bpe([f.read_text() for f in sorted(text.iterdir())], 1024).save(root / "tokenizer")
    data = {"text": [str(text)], "tokenizer": str(root / "tokenizer"), "seq_len": 256}
    trainer = Trainer(build(Recipe, {"out": str(root / "run"), "data": data}))
    stream = open_stream(root / "local", 256)
    rows = trainer.recipe.train.batch_size
    found = in_turns(
        {
            "stream tokens/s": lambda: loading_speed(stream, rows),
            "debug model tokens/s": lambda: rows * 256 / trainer.seconds_per_step(),
        },
        rounds,
    )
    return {"case": f"stream against the debug model's step, {rows} x 256", **ratio(found, *found)}


def bandwidth(root: Path, rounds: int) -> list[dict]:
    """Bytes of token ids per second in one process, from page cache to whole batches of 2^20 tokens."""
    rows = []
    for dtype, folder in (("uint16", root / "local"), ("uint32", make_shards(root / "wide", 8, dtype="uint32"))):
        for width, best_fit in ((2048, False), (8192, False), (2048, True)):
            stream = open_stream(folder, width, best_fit)
            tokens = [speed(stream, 2**20 // width) for _ in range(rounds)]
            size = np.dtype(dtype).itemsize
            rows.append({
                "case": f"{dtype}, {width} positions, {'best-fit' if best_fit else 'concat'}",
                "tokens/s": statistics.median(tokens), "GB/s": statistics.median(tokens) * size / 1e9,
                "low": min(tokens) * size / 1e9, "high": max(tokens) * size / 1e9,
            })  # fmt: skip
    return rows


def first_batch(root: Path, rounds: int) -> dict:
    """Seconds from an opened program to the first batch of a manifest of 10,000 shards, each time in a new process."""
    folder = make_shards(root / "many", 10_000, tokens=4096)
    seconds = [float(worker("first", str(folder))) for _ in range(rounds)]
    return {"case": "first batch of 10,000 shards", "seconds": statistics.median(seconds), "low": min(seconds),
            "high": max(seconds), "manifest MB": (folder / "manifest.json").stat().st_size / 1e6}  # fmt: skip


def memory(root: Path) -> list[dict]:
    """Peak resident memory of a process that streams a whole epoch, of a corpus and of one eight times as large."""
    rows = []
    for shards in (64, 512):
        folder = make_shards(root / f"corpus-{shards}", shards, tokens=1 << 20)
        peak, anonymous = map(float, worker("memory", str(folder)).split())
        rows.append({"case": f"an epoch of {shards << 20:,} tokens", "peak MiB": peak, "of it anonymous": anonymous})
    return rows


def bucket(root: Path, rounds: int) -> dict:
    """Tokens per second through a warm cache against the same shards on the disk."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
                   "AWS_REGION": "us-east-1"}  # fmt: skip
    urllib.request.urlopen(urllib.request.Request(f"{address}/bench", method="PUT"), timeout=30).close()
    for file in sorted((root / "local").iterdir(), key=lambda f: f.name == "manifest.json"):
        write_file(f"s3://bench/local/{file.name}", file.read_bytes())
    cache = Cache(root / "cache", 2**33)
    started = time.perf_counter()
    far = open_stream("s3://bench/local", 2048, cache=cache)
    far.batch(0, 512)
    cold = time.perf_counter() - started
    near = open_stream(root / "local", 2048)
    found = in_turns({"s3 tokens/s": lambda: speed(far, 128), "local tokens/s": lambda: speed(near, 128)}, rounds)
    server.stop()
    return {"case": "bucket through a warm cache against the disk", **ratio(found, *found), "cold seconds": cold}


def worker(what: str, folder: str) -> str:
    command = [sys.executable, __file__, "--worker", what, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip()


def run_worker(what: str, folder: str) -> None:
    if what == "first":
        started = time.perf_counter()
        open_stream(folder, 1024).batch(0, 16)
        print(time.perf_counter() - started)
        return
    stream = open_stream(folder, 2048, best_fit=True)
    (lane,) = stream.lanes[2048]
    for first in range(0, lane.order.total - 256, 256):
        stream.batch(first, 256)
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line)
    print(int(fields["VmHWM"].split()[0]) / 1024, int(fields["RssAnon"].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.worker:
        return run_worker(*chosen.worker)
    keep_freed_memory()  # this and the next as the trainer does
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_shards(root / "local", 16)
        rows = [against_the_model(root, chosen.rounds), *bandwidth(root, chosen.rounds),
                first_batch(root, chosen.rounds), *memory(root), bucket(root, chosen.rounds)]  # fmt: skip
    for row in rows:
        print(table([(k, f"{v:,.3f}" if isinstance(v, float) else str(v)) for k, v in row.items()]), end="\n\n")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data.json").write_text(json.dumps({**about("data"), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
