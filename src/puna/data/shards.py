"""Token shards: what `puna tokenize` writes and training reads, in a folder or a bucket.

    SHARDS/
      shard-000000.bin       token ids, uint16 or uint32, little endian (nanoGPT's .bin)
      shard-000000.docs      int64 offsets of the documents, one more than there are; then uint16 tag lengths, if tagged
      ...
      manifest.json          dtype, vocabulary, counts, sha256 of every file, sources - written last

A folder without a manifest is not whole, and a shard that is not what the manifest says is never read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from puna.base.console import PunaError
from puna.base.files import is_remote, join, read_file, stat, write_file
from puna.data.bestfit import count_bins
from puna.data.decompose import length_bits
from puna.text.tokenizer import Tokenizer

MANIFEST = "manifest.json"
FORMAT, VERSION = "puna-shards", 1
# Sequence lengths whose best-fit row count stands in the manifest: a corpus of any size then opens without a look at
# its documents. Other lengths are counted when they are asked for.
COUNTED_LENGTHS = tuple(2**k for k in range(8, 18))

if sys.byteorder != "little":  # tokens are mapped, not parsed
    raise ImportError("puna's shards need a little-endian machine")


@dataclass(frozen=True)
class ShardInfo:
    """One shard, as the manifest knows it. `bits[k]`: documents whose length has bit k; `bins[T]`: best-fit rows."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str
    documents_sha256: str
    bits: list[int]
    bins: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. `sources` and `left_out` report where it came from and what was not taken."""

    dtype: str
    vocab_size: int
    vocab_hash: str
    bos_id: int | None
    eos_id: int | None
    tagged: bool
    shards: list[ShardInfo]
    sources: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Token ids in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text the tokens stand for."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token id."""
        return 2 if self.dtype == "uint16" else 4

    def figures(self) -> dict[str, Any]:
        """What a verb that wrote this reports of it."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "bytes_per_token": round(self.text_bytes / self.tokens, 4),
            "shards": len(self.shards),
            "left_out": self.left_out,
            "sources": self.sources,
        }

    def fingerprint(self) -> str:
        """Hex sha256 of what decides every token id and document boundary: what a resumed run must find unchanged."""
        parts = [self.dtype, self.vocab_hash, *(s.sha256 + s.documents_sha256 for s in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """An open shard. `tokens`: (tokens,) uint16 or uint32; `starts`: (documents + 1,) int64; `tags`: (documents,).

    Document d is tokens[starts[d] : starts[d + 1]]; the first `tags[d]` tokens after its bos name where it came from.
    """

    tokens: np.ndarray
    starts: np.ndarray
    tags: np.ndarray | None = None


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def describe_shard(name: str, shard: Shard, text_bytes: int) -> ShardInfo:
    """The manifest's line about a shard."""
    return ShardInfo(
        name=name,
        tokens=len(shard.tokens),
        documents=len(shard.starts) - 1,
        text_bytes=text_bytes,
        sha256=hashlib.sha256(_token_bytes(shard)).hexdigest(),
        documents_sha256=hashlib.sha256(_document_bytes(shard)).hexdigest(),
        bits=length_bits(shard.starts),
        bins={str(length): count_bins(shard.starts, length) for length in COUNTED_LENGTHS},
    )


def write_shard(folder: str | Path, name: str, shard: Shard, text_bytes: int) -> ShardInfo:
    """Write both files of a shard, each whole or not at all, and return its line for the manifest."""
    write_file(join(folder, f"{name}.bin"), _token_bytes(shard))
    write_file(join(folder, f"{name}.docs"), _document_bytes(shard))
    return describe_shard(name, shard, text_bytes)


def _token_bytes(shard: Shard) -> memoryview:
    return np.ascontiguousarray(shard.tokens).data.cast("B")


def _document_bytes(shard: Shard) -> bytes:
    tags = b"" if shard.tags is None else shard.tags.astype(np.uint16).tobytes()
    return shard.starts.astype(np.int64).tobytes() + tags


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """The last write: from here on the folder is whole."""
    counts = {"tokens": manifest.tokens, "documents": manifest.documents, "text_bytes": manifest.text_bytes}
    payload = {"format": FORMAT, "version": VERSION, **counts, **dataclasses.asdict(manifest)}
    shards = ",\n".join("    " + json.dumps(shard) for shard in payload.pop("shards"))
    head = json.dumps(payload, indent=2, ensure_ascii=False).removesuffix("\n}")
    write_file(join(folder, MANIFEST), f'{head},\n  "shards": [\n{shards}\n  ]\n}}\n'.encode())


def is_shards(folder: str | Path) -> bool:
    """Does a manifest of shards lie there?"""
    return stat(join(folder, MANIFEST)) is not None


def read_manifest(folder: str | Path) -> Manifest:
    """Parse a folder's manifest. PunaError when there is none, when it is no manifest of shards, or a newer one."""
    path = join(folder, MANIFEST)
    if stat(path) is None:
        raise _no_manifest(folder)
    try:
        payload = json.loads(read_file(path))
        if payload["format"] != FORMAT:
            raise KeyError("format")
        if payload["version"] > VERSION:
            raise PunaError(f"{path} has version {payload['version']}, this puna reads {VERSION}", "update puna")
        shards = [ShardInfo(**shard) for shard in payload["shards"]]
        known = {f.name for f in dataclasses.fields(Manifest)} - {"shards"}
        manifest = Manifest(shards=shards, **{key: payload[key] for key in known})
    except (ValueError, KeyError, TypeError) as error:
        raise PunaError(f"{path} is not a manifest of token shards: {error!r}", _RESTORE) from error
    _check(manifest, payload, path)
    return manifest


_RESTORE = "restore the folder from its source, or run `puna tokenize` again"


def _no_manifest(folder: str | Path) -> PunaError:
    if not is_remote(folder) and not Path(folder).exists():
        return PunaError(f"{folder} does not exist", "give a folder that `puna tokenize` wrote")
    if not is_remote(folder) and list(Path(folder).glob("shard-*.bin")):
        return PunaError(
            f"{folder} holds shards but no {MANIFEST}: it was never finished",
            "run the same `puna tokenize` command again; it goes on where it stopped",
        )
    return PunaError(f"{folder} holds no {MANIFEST}", "give a folder that `puna tokenize` wrote")


def _check(manifest: Manifest, payload: dict[str, Any], path: str) -> None:
    """The totals that were written must be those of the shards listed: a manifest cut or edited is refused."""
    for key in ("tokens", "documents", "text_bytes"):
        if payload.get(key) != getattr(manifest, key):
            raise PunaError(f"{path} says {payload.get(key)} {key}, its shards have {getattr(manifest, key)}", _RESTORE)
    if not manifest.shards or manifest.dtype not in ("uint16", "uint32"):
        raise PunaError(f"{path} lists {len(manifest.shards)} shards of {manifest.dtype}", _RESTORE)


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Refuse shards that were made with another vocabulary: their ids would mean other text."""
    if manifest.vocab_hash != tokenizer.vocab_hash:
        raise PunaError(
            f"{folder} was tokenized with another tokenizer: {manifest.vocab_size} tokens, hash "
            f"{manifest.vocab_hash[:12]}; this one has {tokenizer.vocab_size}, hash {tokenizer.vocab_hash[:12]}",
            "use the tokenizer the shards were made with, or run `puna tokenize` again",
        )
