"""What becomes of tokenized blocks: new or seen before, training or validation, and a shard when enough have come."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from puna.base.console import PunaError, count, say
from puna.base.files import join, write_file
from puna.corpus.blocks import Block, Input
from puna.corpus.dedup import KeySet, keep_new
from puna.corpus.documents import BINARY, BROKEN, EMPTY, INVALID, Note, Refusal, Rules
from puna.corpus.encode import Encoded
from puna.corpus.encode_blocks import BlockEncoder, BlockTokens, Hashes, select
from puna.corpus.journal import SETTINGS, Journal
from puna.corpus.read_blocks import placed, refused
from puna.data.shards import Manifest, Shard, ShardInfo, token_dtype, write_manifest, write_shard
from puna.text.tokenizer import Tokenizer

SOURCES, VALIDATION = "sources.jsonl", "validation"
EXACT, NEAR = "exact duplicates", "near duplicates"
REASONS = (EMPTY, BINARY, INVALID, BROKEN, EXACT, NEAR)
_NOTES = 5  # shown of what was counted


@dataclass(frozen=True)
class Options:
    """What decides the shards, beside the files and the tokenizer."""

    shard_tokens: int
    text_field: str
    tag: bool
    tag_field: str
    dedup: Hashes
    val_fraction: float
    strict: bool

    def check(self) -> None:
        """PunaError for a value out of range."""
        if not 1 <= self.shard_tokens <= 2**31:
            raise PunaError(f"--shard-tokens is {self.shard_tokens}", "use 1 to 2147483648")
        if not 0 <= self.val_fraction < 1:
            raise PunaError(f"--val-fraction is {self.val_fraction:g}", "use 0 (none) up to 0.5, such as 0.005")
        if self.dedup not in ("none", "exact", "near"):
            raise PunaError(f"--dedup is {self.dedup!r}", "use none, exact or near")
        if self.tag_field and not self.tag:
            raise PunaError(f"--tag-field {self.tag_field} without --tag", "add --tag")


@dataclass
class Tally:
    """What was counted since the last shard, or in all: documents and validation documents by file, bytes of input."""

    documents: Counter[int] = field(default_factory=Counter)
    validation: Counter[int] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    weight: int = 0

    def add(self, other: Tally) -> None:
        """Add another's counts to these."""
        self.documents += other.documents
        self.validation += other.validation
        self.left_out += other.left_out
        self.weight += other.weight

    def as_record(self) -> dict[str, Any]:
        """For a line of the journal."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @staticmethod
    def of(record: dict[str, Any]) -> Tally:
        """From a line of the journal, where numbers of files are strings."""
        documents, validation = (
            Counter({int(k): v for k, v in record[n].items()}) for n in ("documents", "validation")
        )
        return Tally(documents, validation, Counter(record["left_out"]), record["weight"])


class Pending:
    """Documents on their way into a shard."""

    def __init__(self) -> None:
        self.parts: list[Encoded] = []
        self.tokens = 0

    def add(self, encoded: Encoded) -> None:
        """Append documents."""
        if len(encoded.text_bytes):
            self.parts.append(encoded)
            self.tokens += len(encoded.shard.tokens)

    def take(self) -> Encoded | None:
        """All of them as one, and begin anew; None if there are none."""
        parts, self.parts, self.tokens = self.parts, [], 0
        if not parts:
            return None
        lengths = np.concatenate([np.diff(part.shard.starts) for part in parts])
        starts = np.concatenate(([0], lengths.cumsum()))
        tags = [part.shard.tags for part in parts if part.shard.tags is not None]
        tokens = np.concatenate([part.shard.tokens for part in parts])
        shard = Shard(tokens, starts, np.concatenate(tags) if tags else None)
        return Encoded(shard, np.concatenate([part.text_bytes for part in parts]))


class Job:
    """Takes the tokens of blocks in order and writes shards. All of its state is in the journal at every shard."""

    def __init__(
        self, out: str, options: Options, tokenizer: Tokenizer, inputs: Sequence[Input], settings: dict[str, Any]
    ):
        self.out, self.options, self.tokenizer, self.inputs, self.settings = out, options, tokenizer, inputs, settings
        rules = Rules(options.text_field, options.tag, options.tag_field, options.strict)
        hashes: Hashes = "exact" if options.val_fraction and options.dedup == "none" else options.dedup
        self.encoder = BlockEncoder(tokenizer, rules, hashes)
        self.journal = Journal(out, settings)
        self.shards: list[ShardInfo] = []
        self.position, self.tally = (0, 0), Tally()
        self.tokens = self.encoded_bytes = 0  # tokens for training in all, bytes of text in this run
        self._before, self._since, self._parts, self._notes = 0, Tally(), list[BlockTokens](), 0
        self._train, self._validation = Pending(), Pending()
        self._new_keys: dict[str, list[np.ndarray]] = {"exact": [], "near": []}
        self._restore()

    def _restore(self) -> None:
        records = self.journal.records
        self.resumed = bool(records)
        for record in records:
            self.tally.add(Tally.of(record))
            self.shards += [ShardInfo(**record["shard"])] if record["shard"] else []
        self.tokens = sum(shard.tokens for shard in self.shards)
        if records:
            self.position, self._before = tuple(records[-1]["after"]), records[-1]["before"]
            say(f"going on in {self.out} after {len(self.shards)} finished shards ({count(self.tokens)} tokens)")
        keys = list(self.journal.arrays(*self._new_keys)) if self.options.dedup != "none" else []
        self._seen = {
            kind: KeySet(np.concatenate([side[kind] for side in keys]) if keys else None) for kind in self._new_keys
        }

    def add(self, block: Block, result: BlockTokens | Refusal) -> None:
        """Take the tokens of the next block. PunaError for what is refused, with its line."""
        before = block.first if block.first >= 0 else self._before
        if isinstance(result, Refusal):
            raise refused(result.note, before)
        self._say_notes(placed(result.notes, before))
        self._before = before + result.places
        self._since.weight += block.weight
        if block.part:
            self._parts.append(result)
            if not block.ends_file:
                return
            result, self._parts = self.encoder.join(self._parts), []
        self.position = block.after
        self._sort(result)
        if self._train.tokens >= self.options.shard_tokens:
            self._cut()

    def _sort(self, result: BlockTokens) -> None:
        """Documents to training, validation or nowhere."""
        self._since.left_out += result.left_out
        self.encoded_bytes += int(result.encoded.text_bytes.sum())
        before = self._train.tokens
        keep = self._keep(result)
        held = np.zeros(len(keep), dtype=bool)
        if self.options.val_fraction:
            held = result.exact[:, 0] < np.uint64(round(self.options.val_fraction * 2**64))
        for pending, where, tally in (
            (self._train, keep & ~held, self._since.documents),
            (self._validation, keep & held, self._since.validation),
        ):
            pending.add(select(result.encoded, where))
            tally.update(result.files[where].tolist())
        self.tokens += self._train.tokens - before

    def _keep(self, result: BlockTokens) -> np.ndarray:
        keep = np.ones(len(result.files), dtype=bool)
        kinds = {"none": (), "exact": ((EXACT, "exact", result.exact),)}
        kinds["near"] = (*kinds["exact"], (NEAR, "near", result.near))
        for reason, kind, keys in kinds[self.options.dedup]:
            rows = np.flatnonzero(keep)
            new = keep_new(self._seen[kind], keys[rows])
            self._new_keys[kind].append(keys[rows[new]].ravel())
            keep[rows[~new]] = False
            self._since.left_out[reason] += int((~new).sum())
        return keep

    def _say_notes(self, notes: Sequence[Note]) -> None:
        for note in notes:
            self._notes += 1
            if self._notes <= _NOTES:
                say(note.text() + (" (more of it is counted, not shown)" if self._notes == _NOTES else ""))

    def _cut(self) -> None:
        """Everything so far becomes final: a shard, a line of the journal, and what it must remember."""
        whole, held = self._train.take(), self._validation.take()
        info = None
        if whole is not None:
            name = f"shard-{len(self.shards):06d}"
            info = write_shard(self.out, name, whole.shard, int(whole.text_bytes.sum()))
            self.shards.append(info)
        arrays = {} if held is None else _as_arrays(held)
        if self.options.dedup != "none":
            nothing = np.empty(0, dtype=np.uint64)
            arrays |= {kind: np.concatenate([nothing, *keys]) for kind, keys in self._new_keys.items()}
        self._new_keys = {kind: [] for kind in self._new_keys}
        shard = None if info is None else asdict(info)
        where = {"after": self.position, "before": self._before}
        self.journal.append({**where, "shard": shard, **self._since.as_record()}, arrays)
        self.tally.add(self._since)
        self._since = Tally()

    def finish(self, arguments: Sequence[str]) -> None:
        """The last shard, the validation shards, the lists of sources, and the manifests, the main one last."""
        if self._since != Tally():
            self._cut()
        if not self.shards:
            self.journal.close()
            raise self._nothing(arguments)
        if self.options.val_fraction:
            self._write_validation(arguments)
        lines = [json.dumps(self._about_file(number), ensure_ascii=False) + "\n" for number in range(len(self.inputs))]
        write_file(join(self.out, SOURCES), "".join(lines).encode("utf-8", "surrogateescape"))
        write_file(join(self.out, SETTINGS), (json.dumps(self.settings, indent=2) + "\n").encode())
        left_out = {reason: self.tally.left_out[reason] for reason in REASONS}
        write_manifest(self.out, self._manifest(self.shards, arguments, self.tally.documents, left_out))
        self.journal.close()

    def _write_validation(self, arguments: Sequence[str]) -> None:
        folder, shards, pending = join(self.out, VALIDATION), list[ShardInfo](), Pending()
        sides = [side for side in self.journal.arrays("tokens", "starts", "tags", "text_bytes") if side]
        for number, side in enumerate(sides):
            pending.add(_from_arrays(side))
            if pending.tokens >= self.options.shard_tokens or number + 1 == len(sides):
                whole = pending.take()
                assert whole is not None
                name = f"shard-{len(shards):06d}"
                shards.append(write_shard(folder, name, whole.shard, int(whole.text_bytes.sum())))
        if shards:
            write_manifest(folder, self._manifest(shards, arguments, self.tally.validation, {}))
        else:
            documents = sum(self.tally.documents.values())
            say(f"no document fell into validation: {self.options.val_fraction:g} of {documents} documents")

    def _manifest(
        self, shards: list[ShardInfo], arguments: Sequence[str], documents: Counter[int], left_out: dict[str, int]
    ) -> Manifest:
        sources = [{"path": path, "files": 0, "documents": 0, "bytes": 0} for path in arguments]
        for number, item in enumerate(self.inputs):
            line: dict[str, Any] = sources[item.argument]
            line["files"] += 1
            line["documents"] += documents[number]
            line["bytes"] += item.info.size
        about = self.settings
        return Manifest(
            dtype=token_dtype(about["vocab_size"]),
            vocab_size=about["vocab_size"],
            vocab_hash=self.tokenizer.vocab_hash,
            bos_id=about["bos_id"],
            eos_id=about["eos_id"],
            tagged=self.options.tag,
            shards=shards,
            sources=sources,
            left_out=left_out,
        )

    def _about_file(self, number: int) -> dict[str, Any]:
        info = self.inputs[number].info
        line = {"path": info.path, "bytes": info.size, "documents": self.tally.documents[number]}
        return line | ({"validation": self.tally.validation[number]} if self.options.val_fraction else {})

    def _nothing(self, arguments: Sequence[str]) -> PunaError:
        held = sum(self.tally.validation.values())
        if held:
            return PunaError(f"all {held} documents fell into validation", "lower --val-fraction")
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.tally.left_out.items()) or "no rows"
        return PunaError(
            f"no text in {', '.join(arguments)}: {len(self.inputs)} files, {reasons}", "give files with UTF-8 text"
        )


def _as_arrays(encoded: Encoded) -> dict[str, np.ndarray]:
    shard = encoded.shard
    tags = {} if shard.tags is None else {"tags": shard.tags}
    return {"tokens": shard.tokens, "starts": shard.starts, "text_bytes": encoded.text_bytes, **tags}


def _from_arrays(arrays: dict[str, np.ndarray]) -> Encoded:
    return Encoded(Shard(arrays["tokens"], arrays["starts"], arrays.get("tags")), arrays["text_bytes"])
