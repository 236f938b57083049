"""`puna shards import` and `export`: token files of Megatron-LM and nanoGPT to shards and back (formats: `foreign`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from puna.base import objects
from puna.base.console import PunaError, count, say, status
from puna.base.files import is_remote, stat
from puna.base.storage import disk_error, sync_folder, write_atomic
from puna.corpus.foreign import CHUNK, document_starts, index_bytes, open_ids, read_index
from puna.corpus.text_bytes import TextBytes
from puna.corpus.verify import read_shards
from puna.data.shards import Manifest, Shard, ShardInfo, read_manifest, token_dtype, write_manifest, write_shard
from puna.text.tokenizer import Tokenizer

Format = Literal["auto", "megatron", "nanogpt"]
IdType = Literal["auto", "uint16", "uint32"]
SHARD_TOKENS = 2**24


# ---- import ----


def import_tokens(
    path: str | Path,
    tokenizer: Tokenizer,
    out: str | Path,
    form: Format = "auto",
    dtype: IdType = "auto",
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """`import_megatron` where an .idx lies beside the .bin, else `import_nanogpt`; or as `form` says."""
    if form == "megatron" or (form == "auto" and stat(f"{_prefix(path)}.idx") is not None):
        return import_megatron(path, tokenizer, out, shard_tokens)
    return import_nanogpt(path, tokenizer, out, dtype, shard_tokens)


def import_megatron(
    path: str | Path, tokenizer: Tokenizer, out: str | Path, shard_tokens: int = SHARD_TOKENS
) -> dict[str, Any]:
    """Write the shards of a Megatron-LM indexed dataset to `out`; a document is its sequences joined.

    `path`: the prefix, or either file. The whole input is checked before anything is written; memory is one shard and
    30 bytes per document. Returns figures. Raises PunaError for files that are cut or do not fit together, ids outside
    the vocabulary, and an `out` that is not empty.
    """
    prefix = _prefix(path)
    _check_target(out, shard_tokens)
    dtype, starts = read_index(f"{prefix}.idx", f"{prefix}.bin")
    ids = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
    source = {"path": f"{prefix}.bin", "format": "megatron", "dtype": dtype, "bytes": ids.nbytes}
    with status(f"importing {count(len(ids))} tokens from {prefix}.bin"):
        _check_ids(ids, tokenizer, f"{prefix}.bin")
        figures = _write_shards(ids, starts, tokenizer, out, shard_tokens, source)
    return _done(figures)


def import_nanogpt(
    path: str | Path,
    tokenizer: Tokenizer,
    out: str | Path,
    dtype: IdType = "auto",
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write the shards of a nanoGPT or llm.c (modded-nanogpt) token file to `out`.

    `dtype` of the ids where no header says it: auto takes uint16 for vocabularies up to 65,536 tokens. The file knows
    no documents: `document_starts` finds them by the tokenizer's eos. Returns figures, raises PunaError as
    `import_megatron` does.
    """
    path = _local(path)
    _check_target(out, shard_tokens)
    ids, kind = open_ids(path, token_dtype(tokenizer.vocab_size) if dtype == "auto" else dtype)
    source = {"path": path, "format": kind, "dtype": ids.dtype.name, "bytes": ids.nbytes}
    with status(f"importing {count(len(ids))} tokens from {path}"):
        _check_ids(ids, tokenizer, path)
        starts, rule = document_starts(ids, tokenizer, shard_tokens)
        figures = _write_shards(ids, starts, tokenizer, out, shard_tokens, {**source, "documents_by": rule})
    say(f"documents  {rule}")
    return _done(figures)


def _done(figures: dict[str, Any]) -> dict[str, Any]:
    empty = figures["left_out"].get("empty", 0)
    say(
        f"imported   {count(figures['tokens'])} tokens in {figures['documents']:,} documents to {figures['out']} "
        f"({figures['shards']} shards{f', {empty} empty documents left out' if empty else ''})\n"
        f"next       puna train RECIPE.toml --data.shards {figures['out']}"
    )
    return figures


def _local(path: str | Path) -> str:
    if is_remote(path):
        raise PunaError(
            f"{path} is not on this machine", "such files are read and written here: copy it to or from here"
        )
    return str(path)


def _prefix(path: str | Path) -> str:
    return _local(path).removesuffix(".bin").removesuffix(".idx")


def _check_target(out: str | Path, shard_tokens: int) -> None:
    if shard_tokens < 1:
        raise PunaError(f"--shard-tokens is {shard_tokens}", f"use at least 1; {SHARD_TOKENS} is usual")
    if is_remote(out):
        found = next((info.path for info in objects.list_objects(str(out))), "")
    elif Path(out).is_dir():
        found = next((str(path) for path in Path(out).iterdir()), "")
    else:
        found = str(out) if Path(out).exists() else ""
    if found:
        raise PunaError(
            f"{out} is not empty: {found} is there",
            "choose another --out, or delete it (shards without a manifest.json are an import that was interrupted)",
        )


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer, path: str) -> None:
    """Refuse ids outside the vocabulary, before anything is written."""
    for first in range(0, len(ids), CHUNK):
        chunk = ids[first : first + CHUNK]
        if int(chunk.max()) >= tokenizer.vocab_size or int(chunk.min()) < 0:
            at = int(np.flatnonzero((chunk >= tokenizer.vocab_size) | (chunk < 0))[0])
            raise PunaError(
                f"{path}: token {first + at} has id {chunk[at]}, the tokenizer has {tokenizer.vocab_size} tokens",
                f"use the tokenizer the file was made with; are its ids {ids.dtype.name}?",
            )


def _write_shards(
    ids: np.ndarray,
    starts: np.ndarray,
    tokenizer: Tokenizer,
    out: str | Path,
    shard_tokens: int,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Shards, then the manifest. A shard ends with the document that fills it; empty documents are left out."""
    is_filled = np.diff(starts) > 0
    left_out = {} if is_filled.all() else {"empty": int((~is_filled).sum())}
    starts = np.concatenate((starts[:1], starts[1:][is_filled]))
    dtype, measure = token_dtype(tokenizer.vocab_size), TextBytes(tokenizer)
    infos: list[ShardInfo] = []
    first, documents = 0, len(starts) - 1
    while first < documents:
        last = min(int(np.searchsorted(starts, starts[first] + shard_tokens)), documents)
        shard = Shard(
            np.asarray(ids[starts[first] : starts[last]]).astype(dtype), starts[first : last + 1] - starts[first]
        )
        infos.append(write_shard(out, f"shard-{len(infos):06d}", shard, measure(shard)))
        first = last
    manifest = Manifest(
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        vocab_hash=tokenizer.vocab_hash,
        bos_id=tokenizer.bos_id,
        eos_id=next(iter(tokenizer.eos_ids), None),
        tagged=False,
        shards=infos,
        sources=[{**source, "documents": documents}],
        left_out=left_out,
    )
    write_manifest(out, manifest)
    return {"out": str(out), **manifest.figures()}


# ---- export ----


def export_megatron(folder: str | Path, prefix: str | Path) -> dict[str, Any]:
    """Write PREFIX.bin and then PREFIX.idx from shards: one sequence per document, as Megatron-LM's own tools do.

    uint16 ids stay uint16 (type code 8), uint32 become int32 (4). Every shard is checked against the manifest; neither
    file appears before it is whole, and neither may exist. Tags stay in the documents. Returns figures and paths.
    """
    prefix, manifest = _prefix(prefix), read_manifest(folder)
    bin_path, index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    dtype = "uint16" if manifest.dtype == "uint16" else "int32"
    lengths: list[np.ndarray] = []
    _refuse_existing(bin_path, index_path)
    with status(f"exporting {count(manifest.tokens)} tokens to {bin_path}"):
        with _whole_file(bin_path) as file:
            for shard in read_shards(folder, manifest):
                file.write(_bytes(shard.tokens.astype(dtype)))
                lengths.append(np.diff(shard.starts))
            index = index_bytes(dtype, np.concatenate(lengths))
        write_atomic(index_path, index)
    return _exported(manifest, dtype, {"bin": str(bin_path), "idx": str(index_path)})


def export_nanogpt(folder: str | Path, path: str | Path) -> dict[str, Any]:
    """Write all ids of shards to one file, as nanoGPT reads them; uint32 ids stay uint32, which it does not read.

    The format has no documents: only eos (or bos) shows where one ends, and `unmarked_documents` counts those without.
    Every shard is checked against the manifest; the file does not appear before it is whole, and may not exist.
    """
    target, manifest, marks = Path(_local(path)), read_manifest(folder), np.zeros(4, dtype=np.int64)
    _refuse_existing(target)
    with status(f"exporting {count(manifest.tokens)} tokens to {target}"), _whole_file(target) as file:
        for shard in read_shards(folder, manifest):
            file.write(_bytes(shard.tokens))
            marks += _count_marks(shard, manifest)
    unmarked = manifest.documents - _marked(marks, manifest)
    if manifest.dtype != "uint16":
        say(f"{target} holds {manifest.dtype} ids, nanoGPT's own reader takes uint16: change its np.memmap")
    if unmarked:
        why = "the tokenizer has no eos" if manifest.eos_id is None else "they do not end with eos"
        say(f"the ends of {unmarked} of {manifest.documents} documents cannot be seen in {target}: {why}")
    return _exported(manifest, manifest.dtype, {"bin": str(target)}) | {"unmarked_documents": unmarked}


def _exported(manifest: Manifest, dtype: str, paths: dict[str, str]) -> dict[str, Any]:
    say(f"exported   {count(manifest.tokens)} tokens in {manifest.documents:,} documents: {', '.join(paths.values())}")
    return {"tokens": manifest.tokens, "documents": manifest.documents, "dtype": dtype, "paths": paths}


def _bytes(ids: np.ndarray) -> memoryview:
    return np.ascontiguousarray(ids).data


def _count_marks(shard: Shard, manifest: Manifest) -> list[int]:
    """Documents that end with eos, begin with eos, begin with bos; and every eos there is."""
    first, last = shard.tokens[shard.starts[:-1]], shard.tokens[shard.starts[1:] - 1]
    pairs = (
        (last, manifest.eos_id),
        (first, manifest.eos_id),
        (first, manifest.bos_id),
        (shard.tokens, manifest.eos_id),
    )
    return [0 if mark is None else int((ids == mark).sum()) for ids, mark in pairs]


def _marked(marks: np.ndarray, manifest: Manifest) -> int:
    """How many documents `document_starts` would find again."""
    end_eos, begin_eos, begin_bos, all_eos = marks.tolist()
    if manifest.bos_id in (None, manifest.eos_id):
        return max(end_eos, begin_eos)
    return end_eos if all_eos else begin_bos


def _refuse_existing(*paths: Path) -> None:
    """No overwriting: an old .idx beside a new .bin would be taken for its index."""
    for path in paths:
        if path.exists():
            raise PunaError(f"{path} exists already", "delete it, or choose another --out")


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that appears at `path` once the block is done and the disk has it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise disk_error(error, path) from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
