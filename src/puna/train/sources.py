"""From the recipe's [data] section to the training stream and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.base.cache import Cache, default_cache_root
from puna.base.console import PunaError, count, say, size, status
from puna.base.files import is_remote, join
from puna.corpus.documents import Document
from puna.corpus.encode import encode_documents
from puna.corpus.in_memory import hold_out, read_documents, total_bytes
from puna.data.counts import count_samples
from puna.data.curriculum import CYCLES
from puna.data.cut import BestFit, Bucket, Concat, Cut, FillInTheMiddle
from puna.data.decompose import bucket_counts
from puna.data.fim import find_fim_tokens
from puna.data.mixture import Mixture, check_weights, parse_schedule
from puna.data.order import GROUP
from puna.data.pack import Rules
from puna.data.permute import keyed
from puna.data.reader import ShardReader
from puna.data.shards import is_shards
from puna.data.stream import Curriculum, Held, Lane, Stream, too_short
from puna.text.tokenizer import Tokenizer
from puna.train.recipe import DataSection, Recipe

PACKINGS = ("concat", "best_fit", "decompose")


@dataclass(frozen=True)
class Sources:
    """What a run reads: one stream over `readers`, and the held-out part of each that has one, by name."""

    readers: list[ShardReader]
    stream: Stream
    held: dict[str, Held]
    recipe: Recipe

    @property
    def names(self) -> list[str]:
        return _names(self.readers)

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source was gone through after `step` steps."""
        return dict(zip(self.names, self.stream.epochs(step * self.recipe.train.batch_size), strict=True))

    def card(self) -> list[tuple[str, str]]:
        """Lines for the start card: one per source, with the epochs that the run will make of it."""
        epochs = self.epochs(self.recipe.train.steps)
        rows = []
        for number, (name, reader) in enumerate(zip(self.names, self.readers, strict=True)):
            manifest = reader.manifest
            text = (
                f"{count(manifest.tokens)} tokens in {manifest.documents} documents and {len(manifest.shards)} shards"
            )
            rows.append(("data" if number == 0 else "", f"{name}: {text}, {epochs[name]:.2f} epochs"))
        held = ", ".join(f"{name} {count(part.reader.manifest.tokens)} tokens" for name, part in self.held.items())
        return [*rows, ("held out", held or "nothing")]

    def identity(self, step: int) -> dict[str, Any]:
        """What decides the tokens of every step before `step`: a resumed run must find it unchanged."""
        data, train = self.recipe.data, self.recipe.train
        fingerprints = [reader.manifest.fingerprint() for reader in self.readers]
        packing = {"packing": data.packing, "cross_documents": data.cross_documents, "mask_tags": data.mask_tags}
        if data.fim_rate:
            packing |= {"fim_rate": data.fim_rate, "fim_spm_rate": data.fim_spm_rate}
        if data.packing == "decompose":  # the curriculum spans the whole run
            packing |= {"shortest": data.shortest, "curriculum": data.curriculum, "steps": train.steps}
        return {
            "data": hashlib.sha256(" ".join(fingerprints).encode()).hexdigest(),
            "weights": list(data.weights),
            "schedule": [entry for entry, (first, _) in _phases(data) if first < step],
            "seed": self.recipe.seed,
            "seq_len": data.seq_len,
            "batch_size": train.batch_size,
            **packing,
        }


def open_sources(recipe: Recipe, tokenizer: Tokenizer) -> Sources:
    """Open everything the recipe names. Raises PunaError for what is missing, damaged or does not fit together."""
    data = recipe.data
    cache = Cache(cache_root(data), int(data.cache_gib * 2**30))
    readers, held_readers = _open_shards(data, tokenizer, cache) if data.shards else _open_text(data, tokenizer)
    rules = Rules(
        cross=data.cross_documents,
        mask_tags=data.mask_tags and any(reader.manifest.tagged for reader in readers),
        bos=tokenizer.bos_id is not None,
        pad_id=next((i for i in (tokenizer.pad_id, *tokenizer.eos_ids[:1]) if i is not None), 0),
        middle=FillInTheMiddle(find_fim_tokens(tokenizer.added), data.fim_spm_rate) if data.fim_rate else None,
    )
    stream = (_decomposed if data.packing == "decompose" else _fixed)(recipe, readers, rules)
    held = {name: Held(reader, data.seq_len, rules) for name, reader in held_readers.items()}
    return Sources(readers, stream, held, recipe)


def cache_root(data: DataSection) -> Path:
    """The folder shared by all runs of this machine."""
    return Path(data.cache_dir) if data.cache_dir else default_cache_root()


def _open_text(data: DataSection, tokenizer: Tokenizer) -> tuple[list[ShardReader], dict[str, ShardReader]]:
    """Text tokenized into memory: one source, whole files of it held out."""
    parts = hold_out(read_documents(data.text), data.val_fraction)
    with status(f"tokenizing {size(sum(map(total_bytes, parts)))} of text"):
        names = ("text", "held-out files")
        train, held = (_in_memory(part, tokenizer, name) for part, name in zip(parts, names, strict=True))
    return [train], {"text": held}


def _in_memory(documents: Sequence[Document], tokenizer: Tokenizer, name: str) -> ShardReader:
    encoded = encode_documents(documents, tokenizer)
    return ShardReader.in_memory(encoded.shard, int(encoded.text_bytes.sum()), tokenizer, name)


def _open_shards(
    data: DataSection, tokenizer: Tokenizer, cache: Cache
) -> tuple[list[ShardReader], dict[str, ShardReader]]:
    """Shard folders, each with its held-out part where `puna tokenize --val-fraction` made one."""

    def open_one(folder: str) -> ShardReader:
        return ShardReader.open(folder, tokenizer, cache if is_remote(folder) else None)

    readers, held = [open_one(folder) for folder in data.shards], {}
    _say_if_small(cache, [reader for reader in readers if is_remote(reader.folder)])
    for name, reader in zip(_names(readers), readers, strict=True):
        validation = join(reader.folder, "validation")
        if not is_shards(validation):
            continue
        found = open_one(validation)
        if max(shard.tokens for shard in found.manifest.shards) < data.seq_len:
            say(f"{validation} is left out: its {found.manifest.tokens} tokens hold no sequence of {data.seq_len}")
            continue
        held[name] = found
    if not held:
        say("nothing is held out, so there is no validation (puna tokenize --val-fraction 0.005 holds documents out)")
    return readers, held


def _say_if_small(cache: Cache, remote: Sequence[ShardReader]) -> None:
    """A cache that cannot hold what is read at once works, but fetches the same shards again and again."""
    near = sum(2 * GROUP * max(info.tokens for info in r.manifest.shards) * r.manifest.token_bytes for r in remote)
    if cache.capacity < near:
        say(f"data.cache_gib is {size(cache.capacity)}; {size(near)} are read at once, so shards will be fetched again")


def _names(readers: Sequence[ShardReader]) -> list[str]:
    """One for each source: the last part of its folder, with its place where two would be called the same."""
    names = [reader.name for reader in readers]
    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names)]


def _fixed(recipe: Recipe, readers: Sequence[ShardReader], rules: Rules) -> Stream:
    """One lane per source, samples of `seq_len` positions."""
    data = recipe.data
    lanes: list[Lane | None] = []
    for number, reader in enumerate(readers):
        key = keyed(recipe.seed, number)
        cut: Cut = Concat(data.seq_len) if data.packing == "concat" else BestFit(data.seq_len, data.fim_rate, key)
        lane = Lane(reader, cut, count_samples(reader, cut, cache_root(data)), key)
        if not lane.order.total:
            raise too_short(reader, data.seq_len)
        lanes.append(lane)
    weights = data.weights or [float(lane.order.total) for lane in lanes if lane]
    phases = [(first * recipe.train.batch_size, phase) for _, (first, phase) in _phases(data)]
    return Stream({data.seq_len: lanes}, {data.seq_len: Mixture([(0, weights), *phases])}, rules)


def _decomposed(recipe: Recipe, readers: Sequence[ShardReader], rules: Rules) -> Stream:
    """One lane per source and length.

    A source's share of a length is its weight times the share this length has in it; so over the run every source gets
    its weight in tokens, whatever the lengths of its documents, and keeps its own mix of lengths.
    """
    data = recipe.data
    totals = [_bucket_tokens(reader, data) for reader in readers]
    for reader, tokens in zip(readers, totals, strict=True):
        if not any(tokens.values()):
            raise too_short(reader, data.shortest)
    weights = data.weights or [float(sum(tokens.values())) for tokens in totals]
    lanes: dict[int, list[Lane | None]] = {}
    mixtures: dict[int, Mixture] = {}
    mass: dict[int, int] = {}
    for k in totals[0]:
        parts = [w * tokens[k] / sum(tokens.values()) for w, tokens in zip(weights, totals, strict=True)]
        if not any(parts):
            continue
        cut = Bucket(1 << k, data.shortest, data.seq_len)
        lanes[1 << k] = [
            Lane(reader, cut, count_samples(reader, cut, cache_root(data)), keyed(recipe.seed, number))
            if part
            else None
            for number, (reader, part) in enumerate(zip(readers, parts, strict=True))
        ]
        mixtures[1 << k] = Mixture([(0, parts)])
        mass[k] = round(sum(parts) / sum(weights) * 2**40)
    curriculum = Curriculum(data.curriculum, recipe.train.steps, recipe.train.batch_size, mass, recipe.seed)
    return Stream(lanes, mixtures, rules, curriculum, width=data.seq_len)


def _bucket_tokens(reader: ShardReader, data: DataSection) -> dict[int, int]:
    """Tokens of a source in the sequences of each length 2^k."""
    shards = [bucket_counts(info.bits, data.seq_len, data.shortest) for info in reader.manifest.shards]
    return {k: sum(counts[k] for counts in shards) << k for k in shards[0]}


def _phases(data: DataSection) -> list[tuple[str, tuple[int, tuple[float, ...]]]]:
    """(as written, (first step, weights)) of every entry of the schedule."""
    return list(zip(data.schedule, parse_schedule(data.schedule, len(data.shards)), strict=True))


def check_data(data: DataSection, task_tokenizer: str) -> None:
    """Refuse a [data] section that cannot work before anything is read."""
    if bool(data.text) == bool(data.shards):
        raise PunaError(
            "the recipe names no text" if not data.text else "the recipe names both text and shards",
            'set either [data] text = ["path", ...] or shards = ["folder", ...]',
        )
    if not task_tokenizer:
        raise PunaError(
            "the recipe names no tokenizer", "make one with `puna tokenizer train`, then set data.tokenizer"
        )
    if data.seq_len < 1:
        raise PunaError(f"data.seq_len is {data.seq_len}", "use --data.seq_len 1 or more")
    if not 0 < data.val_fraction < 1:
        raise PunaError(f"data.val_fraction is {data.val_fraction:g}", "use a share between 0 and 1, such as 0.05")
    for key in ("fim_rate", "fim_spm_rate"):
        if not 0 <= getattr(data, key) <= 1:
            raise PunaError(f"data.{key} is {getattr(data, key):g}", "use a share between 0 and 1")
    if data.cache_gib <= 0:
        raise PunaError(f"data.cache_gib is {data.cache_gib:g}", "use a size in GiB above 0")
    _check_packing(data)
    if data.weights:
        check_weights(data.weights, len(data.shards), "data.weights")
    parse_schedule(data.schedule, len(data.shards))


def _check_packing(data: DataSection) -> None:
    if data.packing not in PACKINGS:
        raise PunaError(f"data.packing is {data.packing!r}", f"use {', '.join(PACKINGS)}")
    if data.fim_rate and data.packing != "best_fit":
        raise PunaError(
            f"data.fim_rate is {data.fim_rate:g} and data.packing {data.packing}, which leaves no room for the markers",
            "use --data.packing best_fit",
        )
    if data.packing == "decompose" and (data.cross_documents or data.schedule):
        both = "cross_documents" if data.cross_documents else "schedule"
        raise PunaError(
            f"data.packing is decompose and data.{both} is set: the one rules out the other",
            f"leave out data.{both}, or use packing concat or best_fit",
        )
    if data.curriculum not in CYCLES:
        raise PunaError(f"there is no curriculum {data.curriculum!r}", f"use {' or '.join(CYCLES)}")
    if data.packing == "decompose":
        bucket_counts([], data.seq_len, data.shortest)
