"""`puna tokenize`: files to token shards, on all cores, the same bytes whatever the cores and interruptions.

Blocks of text are read and tokenized by workers; this process takes the results in order, decides which documents are
new and which are for validation, and writes a shard whenever enough tokens have come together.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from puna.base.console import PunaError, count, duration, progress, say, table
from puna.base.files import join, read_file
from puna.corpus.blocks import BLOCK, Input, find_inputs, plan
from puna.corpus.documents import INVALID
from puna.corpus.encode_blocks import Crew, Hashes, encode_blocks
from puna.corpus.journal import SETTINGS, check_settings, only_writer, remove_journal
from puna.corpus.tokenize_job import VALIDATION, Job, Options
from puna.data.shards import is_shards, read_manifest
from puna.text.tokenizer import Tokenizer

_FORMAT = 1  # of the blocks and the journal: a job goes on only under the rules it began with


def tokenize_corpus(
    paths: Sequence[str | Path],
    tokenizer_path: str | Path,
    out: str | Path,
    *,
    workers: int = 0,
    shard_tokens: int = 2**24,
    text_field: str = "text",
    tag: bool = False,
    tag_field: str = "",
    dedup: Hashes = "none",
    val_fraction: float = 0.0,
    strict: bool = False,
) -> dict[str, Any]:
    """Write the token shards of files, folders, globs or URLs to the folder or prefix `out`; goes on after a kill.

    `workers`: processes, 0 takes every usable core. `val_fraction`: share of the documents, by a hash of their tokens,
    that goes to `out`/validation. Returns figures and paths. Raises PunaError for anything a user can mend.
    """
    options = Options(shard_tokens, text_field, tag, tag_field, dedup, val_fraction, strict)
    options.check()
    tokenizer, out = Tokenizer.load(tokenizer_path), str(out).rstrip("/") or "/"
    inputs = find_inputs(paths, leave_out=out)
    if not inputs:
        raise PunaError(f"no files in {', '.join(map(str, paths)) or 'no PATH'}", "give files or folders with text")
    settings = _settings(options, tokenizer, inputs)
    if is_shards(out):
        return _already_whole(out, settings)
    with only_writer(out):
        job = Job(out, options, tokenizer, inputs, settings)
        crew = Crew(_workers(workers, inputs), str(tokenizer_path), job.encoder.rules, job.encoder.hashes)
        started = time.perf_counter()
        try:
            _run(job, crew)
        except KeyboardInterrupt:
            say(f"interrupted: {len(job.shards)} finished shards are kept; run the same command to go on")
            raise
        job.finish([str(path) for path in paths])
    seconds = time.perf_counter() - started
    figures = _figures(out) | {
        "seconds": round(seconds, 3),
        "mb_per_s": round(job.encoded_bytes / seconds / 1e6, 3),
        "workers": crew.workers,
        "resumed": job.resumed,
    }
    say(_summary(figures))
    return figures


def _workers(asked: int, inputs: Sequence[Input]) -> int:
    """Processes worth starting: no more than there are blocks."""
    if asked < 0:
        raise PunaError(f"--workers is {asked}", "use 0 for every usable core, or a number of processes")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked or usable, 1 + sum(item.info.size for item in inputs) // BLOCK)


def _run(job: Job, crew: Crew) -> None:
    total = sum(item.info.size for item in job.inputs)
    blocks = plan(job.inputs, crew.rules, job.position)
    results = encode_blocks(blocks, crew, job.encoder)
    with progress(total, "tokenizing", job.tally.weight) as advance, closing(results):
        for block, result in results:
            job.add(block, result)
            advance(block.weight, f"{count(job.tokens)} tokens")


def _settings(options: Options, tokenizer: Tokenizer, inputs: Sequence[Input]) -> dict[str, Any]:
    """What must be the same for a job to go on. `tokenizer.json` says more than the vocabulary: how text is split."""
    files = [f"{i.info.path}\0{i.info.size}\0{i.info.version}\0{i.domain if options.tag else ''}\n" for i in inputs]
    about = {"files": len(files), "bytes": sum(item.info.size for item in inputs), "digest": _digest("".join(files))}
    ids = {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": next(iter(tokenizer.eos_ids), None),
    }
    hashes = {"tokenizer": tokenizer.vocab_hash, "tokenizer_json": _digest(tokenizer.to_json())}
    return {"format": _FORMAT, **hashes, **ids, **asdict(options), "inputs": about}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# ---- what is said at the end ----


def _already_whole(out: str, settings: dict[str, Any]) -> dict[str, Any]:
    check_settings(out, json.loads(read_file(join(out, SETTINGS))), settings)
    remove_journal(out)
    say(f"{out} is whole already, from the same files with the same settings: nothing to do")
    return _figures(out) | {"seconds": 0.0, "mb_per_s": 0.0, "workers": 0, "resumed": False}


def _figures(out: str) -> dict[str, Any]:
    figures: dict[str, Any] = {"out": out, **read_manifest(out).figures(), "validation": None}
    if is_shards(join(out, VALIDATION)):
        held = read_manifest(join(out, VALIDATION))
        figures["validation"] = {"out": join(out, VALIDATION), "tokens": held.tokens, "documents": held.documents}
    return figures


def _summary(figures: dict[str, Any]) -> str:
    rows = [
        ("documents", f"{figures['documents']:,}"),
        ("tokens", f"{figures['tokens']:,}"),
        ("bytes per token", f"{figures['bytes_per_token']:.2f}"),
        ("shards", f"{figures['shards']:,}"),
    ]
    held = figures["validation"]
    rows += [("validation", f"{held['documents']:,} documents, {held['tokens']:,} tokens")] if held else []
    for reason, number in figures["left_out"].items():
        rows += [(f"{'mended' if reason == INVALID else 'left out'}: {reason}", f"{number:,}")] if number else []
    speed = f"{figures['mb_per_s']:.1f} MB/s of text with {figures['workers']} workers"
    rows.append(("time", f"{duration(figures['seconds'])}, {speed}"))
    out = figures["out"]
    return f"{table(rows)}\nshards     {out}\nnext       puna train RECIPE.toml --data.shards {out}"
