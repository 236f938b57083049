"""Blocks to tokens on one core or many, in the order of the blocks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from puna.base.console import PunaError
from puna.corpus.blocks import Block
from puna.corpus.dedup import band_keys, exact_keys, minhash
from puna.corpus.documents import BINARY, EMPTY, Note, Refusal, Rules
from puna.corpus.encode import Encoded, encode_documents, frame
from puna.corpus.read_blocks import of_parts, read_block
from puna.data.shards import Shard
from puna.text.tokenizer import Tokenizer

Hashes = Literal["none", "exact", "near"]
# Blocks under way per worker: one at work, the next at hand, one done while an earlier one is not.
_AHEAD = 3


@dataclass(frozen=True)
class BlockTokens:
    """The documents of a block as tokens.

    `files`: (documents,) number of each one's file; `exact`: (documents, 1) uint64; `near`: (documents, 14) uint64 band
    keys, or (1, 112) uint32 minima of a part of a document; both (documents, 0) if not asked for.
    """

    encoded: Encoded
    files: np.ndarray
    exact: np.ndarray
    near: np.ndarray
    left_out: Counter[str]
    notes: list[Note]
    places: int


@dataclass(frozen=True)
class BlockEncoder:
    """Reads a block and tokenizes it; `hashes` says what the deduplication needs."""

    tokenizer: Tokenizer
    rules: Rules
    hashes: Hashes

    def encode(self, block: Block) -> BlockTokens:
        """The tokens of a block. Of a part of a document only the first has bos and tag, only the last eos."""
        reading = read_block(block, self.rules)
        encoded = encode_documents(reading.documents, self.tokenizer, self.rules.tag)
        numbers = {item.info.path: block.at[0] + i for i, item in enumerate(block.inputs)}
        files = np.array([numbers[document.name] for document in reading.documents], dtype=np.int64)
        first, last = not block.part or block.at[1] == 0, not block.part or block.ends_file
        encoded = self._trim(encoded, first, last) if block.part else encoded
        exact, minima = self._hash(encoded, first, last)
        near = minima if block.part or not minima.size else band_keys(minima)
        return BlockTokens(encoded, files, exact, near, reading.left_out, reading.notes, reading.places)

    def join(self, parts: Sequence[BlockTokens]) -> BlockTokens:
        """The one document whose parts these are; without any document if it is binary or empty."""
        left_out = of_parts(part.left_out for part in parts)
        if left_out.keys() & {EMPTY, BINARY}:
            return replace(_select(parts[0], np.zeros(1, dtype=bool)), left_out=left_out, notes=[])
        shards = [part.encoded.shard for part in parts]
        tokens = np.concatenate([shard.tokens for shard in shards])
        whole = Shard(tokens, np.array([0, len(tokens)]), shards[0].tags)
        encoded = Encoded(whole, np.array([sum(int(part.encoded.text_bytes[0]) for part in parts)]))
        exact, _ = self._hash(encoded, True, True, only_exact=True)
        near = np.concatenate([part.near for part in parts])
        near = band_keys(near.min(axis=0, keepdims=True)) if near.size else near[:1]
        return replace(parts[0], encoded=encoded, exact=exact, near=near, left_out=left_out, notes=[])

    def _trim(self, encoded: Encoded, first: bool, last: bool) -> Encoded:
        begin, end = frame(self.tokenizer)
        tokens = encoded.shard.tokens
        tokens = tokens[0 if first else len(begin) : len(tokens) - (0 if last else len(end))]
        return Encoded(Shard(tokens, np.array([0, len(tokens)]), encoded.shard.tags), encoded.text_bytes)

    def _hash(
        self, encoded: Encoded, first: bool, last: bool, only_exact: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Exact keys and minima of the documents' texts: without bos, tag and eos."""
        begin, end = frame(self.tokenizer)
        shard = encoded.shard
        heads = (len(begin) if first else 0) + (shard.tags if shard.tags is not None else np.int64(0))
        starts, stops = shard.starts[:-1] + heads, shard.starts[1:] - (len(end) if last else 0)
        nothing = np.empty((len(starts), 0), dtype=np.uint64)
        exact = nothing if self.hashes == "none" else exact_keys(shard.tokens, starts, stops)[:, None]
        is_near = self.hashes == "near" and not only_exact
        return exact, minhash(shard.tokens, starts, stops) if is_near else nothing


def _select(tokens: BlockTokens, keep: np.ndarray) -> BlockTokens:
    encoded = select(tokens.encoded, keep)
    return replace(tokens, encoded=encoded, files=tokens.files[keep], exact=tokens.exact[keep], near=tokens.near[keep])


def select(encoded: Encoded, keep: np.ndarray) -> Encoded:
    """Some of the documents. Shapes: keep (documents,) bool."""
    if keep.all():
        return encoded
    shard = encoded.shard
    lengths = np.diff(shard.starts)
    starts = np.concatenate(([0], lengths[keep].cumsum()))
    tags = None if shard.tags is None else shard.tags[keep]
    return Encoded(Shard(shard.tokens[np.repeat(keep, lengths)], starts, tags), encoded.text_bytes[keep])


# ---- workers ----


@dataclass(frozen=True)
class Crew:
    """How many processes, and what each needs to make an encoder of its own."""

    workers: int
    tokenizer_path: str
    rules: Rules
    hashes: Hashes


def encode_blocks(
    blocks: Iterable[Block], crew: Crew, encoder: BlockEncoder
) -> Generator[tuple[Block, BlockTokens | Refusal]]:
    """Every block with its tokens or why it is refused, in order; `encoder` does the work if one worker is asked for.

    Raises PunaError when a worker process dies.
    """
    if crew.workers > 1:
        yield from _encode_in_pool(blocks, crew)
        return
    with _one_core():
        for block in blocks:
            yield block, _encode(encoder, block)


def _encode_in_pool(blocks: Iterable[Block], crew: Crew) -> Iterator[tuple[Block, BlockTokens | Refusal]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once, not once per worker
    pool = ProcessPoolExecutor(crew.workers, context, _start_worker, (crew, dict(os.environ)))
    waiting: deque[tuple[Block, Future[BlockTokens | Refusal]]] = deque()
    try:
        for block in blocks:
            waiting.append((replace(block, data=None), pool.submit(_work, block)))
            if len(waiting) >= _AHEAD * crew.workers:
                yield _finish(*waiting.popleft())
        while waiting:
            yield _finish(*waiting.popleft())
    except (KeyboardInterrupt, PunaError, GeneratorExit):
        for process in list((pool._processes or {}).values()):  # what they are at is of no use any more
            process.terminate()
        raise
    except BrokenProcessPool as error:
        raise PunaError(
            "a worker process died, probably for want of memory",
            f"run the same command with fewer than {crew.workers} --workers: it goes on after the last finished shard",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(block: Block, future: Future[BlockTokens | Refusal]) -> tuple[Block, BlockTokens | Refusal]:
    return block, future.result()


def _encode(encoder: BlockEncoder, block: Block) -> BlockTokens | Refusal:
    try:
        return encoder.encode(block)
    except Refusal as refusal:  # only who has all blocks before this one can name the line
        return refusal


_mine: BlockEncoder | None = None  # the encoder of this worker process


def _start_worker(crew: Crew, environment: dict[str, str]) -> None:
    global _mine
    os.environ.clear()  # the server it was forked from may be older than a credential or an endpoint
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _mine = BlockEncoder(Tokenizer.load(crew.tokenizer_path), crew.rules, crew.hashes)


def _die_with_parent() -> None:
    """A killed main process cannot end its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(block: Block) -> BlockTokens | Refusal:
    assert _mine is not None
    return _encode(_mine, block)


@contextmanager
def _one_core() -> Iterator[None]:
    """One worker is one core: the library would take all."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
