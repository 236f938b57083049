"""Shard folders whose token ids say where they come from, so that a test can tell every one of them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from puna.base.cache import Cache
from puna.base.files import write_file
from puna.data.cut import BestFit
from puna.data.mixture import Mixture
from puna.data.pack import Rules
from puna.data.reader import ShardReader
from puna.data.shards import Manifest, Shard, read_manifest, write_manifest, write_shard
from puna.data.stream import Lane, Stream


def shard(lengths: list[int], first: int, tags: list[int] | None = None) -> Shard:
    """Documents of these lengths with the ids first, first + 1, ..."""
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = np.arange(first, first + starts[-1], dtype=np.uint32)
    return Shard(tokens, starts, None if tags is None else np.array(tags, dtype=np.uint16))


def write_folder(folder: Path, shards: list[Shard], vocab_hash: str = "v" * 64, vocab_size: int = 10**9) -> Path:
    """A whole shard folder."""
    infos = [write_shard(folder, f"shard-{i:06d}", s, 4 * len(s.tokens)) for i, s in enumerate(shards)]
    tagged = shards[0].tags is not None
    dtype = shards[0].tokens.dtype.name
    write_manifest(folder, Manifest(dtype, vocab_size, vocab_hash, 0, 1, tagged, infos))
    return folder


def open_folder(folder: Path) -> ShardReader:
    """A reader that asks for no tokenizer."""
    return ShardReader(str(folder), read_manifest(folder))


def make_source(
    folder: Path, seed: int, shards: int = 5, documents: int = 40, mean: int = 30, first: int = 0
) -> ShardReader:
    """A folder of documents with log-normal lengths; every token id in it is unique."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(shards):
        lengths = np.maximum(2, draw.lognormal(np.log(mean), 0.8, documents).astype(int)).tolist()
        made.append(shard(lengths, first))
        first += sum(lengths)
    return open_folder(write_folder(folder, made))


def upload(folder: Path, url: str) -> str:
    """Copy a folder and what is below it into a bucket, its manifest last."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda f: (f.name == "manifest.json", -len(f.parts))):
        write_file(f"{url}/{file.relative_to(folder)}", file.read_bytes())
    return url


def open_remote(url: str, cache: Path, capacity: int = 2**30) -> ShardReader:
    """A reader of a bucket through a cache; asks for no tokenizer."""
    return ShardReader(url, read_manifest(url), Cache(cache, capacity))


def best_fit_stream(reader: ShardReader, width: int = 32) -> Stream:
    """One source, packed best-fit, two or three shards to a group."""
    cut = BestFit(width)
    counts = [cut.count_starts(reader.starts(i), i) for i in range(len(reader.manifest.shards))]
    return Stream({width: [Lane(reader, cut, counts, key=1, group=3)]}, {width: Mixture([(0, [1.0])])}, Rules())
