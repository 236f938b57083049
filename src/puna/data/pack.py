"""A batch: pieces of documents laid end to end on one token axis, with who may see whom and what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.data.cut import FillInTheMiddle, Pieces
from puna.data.fim import chosen, rearrange
from puna.data.permute import keyed
from puna.data.shards import Shard
from puna.ops.attention import PackedCausal
from puna.ops.basic import IGNORE
from puna.ops.native import batch as native


@dataclass(frozen=True)
class Batch:
    """What a training step eats. Shapes: all (T,) int64; positions restart in every document and sample.

    `attend` keeps documents apart; `valid` counts the targets that are scored; `padding` the positions without a token.
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    attend: PackedCausal
    valid: int
    padding: int = 0

    def to(self, device: torch.device) -> Batch:
        tokens, positions, targets = (
            x.to(device, non_blocking=True) for x in (self.tokens_T, self.positions_T, self.targets_T)
        )
        return Batch(tokens, positions, targets, self.attend, self.valid, self.padding)

    def unscored(self) -> Batch:
        """The same without a target."""
        return replace(self, targets_T=torch.full_like(self.targets_T, IGNORE), valid=0)


@dataclass(frozen=True)
class Part:
    """Pieces of one shard for a batch. `place` (pieces,): the position in the batch where each one begins.

    `key`: what rearranged pieces are cut by; it differs from epoch to epoch.
    """

    shard: Shard
    pieces: Pieces
    place: np.ndarray
    key: int = 0


@dataclass(frozen=True)
class Rules:
    """What holds for every batch of a stream.

    `cross`: attention and targets go on across documents within a sample, as GPT-2 was trained. `mask_tags`: tokens
    that name a document's source are read but not scored (`bos`: whether one stands before them). `pad_id` fills
    positions without a token.
    """

    cross: bool = False
    mask_tags: bool = False
    bos: bool = False
    pad_id: int = 0
    middle: FillInTheMiddle | None = None


def pack(parts: Sequence[Part], samples: Sequence[int], width: int, rules: Rules) -> list[Batch]:
    """Batches of `samples` times `width` positions each, made in one go: small ones cost most per shard they touch.

    A document's last token has no target: what follows is a stranger's. A piece that ends inside its document has one,
    the token after it, so every token but a document's first is scored once.
    """
    ends = np.cumsum([0, *samples]) * width
    place, size = _in_order(parts)
    out = _arrays(int(ends[-1]), rules.pad_id, whole=int(size.sum()) == ends[-1])
    unscored = _fill(parts, out, native.available())
    if rules.middle is not None:
        for part in parts:
            for number in np.flatnonzero(part.pieces.middle).tolist():
                _fill_middle(part, number, out, rules, rules.middle)
    runs = _cross(out, place, size, sum(samples), width) if rules.cross else _runs(place, size, int(ends[-1]))
    for part in parts if rules.mask_tags else ():
        _mask_tags(part, out.targets, rules)
    used = np.concatenate(([0], size.cumsum()))[np.searchsorted(place, ends)]  # positions that hold a token
    padding = np.diff(ends) - np.diff(used)
    if rules.cross or rules.mask_tags or rules.middle is not None:
        unscored = np.flatnonzero(out.targets == IGNORE)
        used = ends
    valid = np.diff(used) - np.diff(np.searchsorted(unscored, ends))
    cuts = np.searchsorted(runs, ends)
    return [
        _cut(out, slice(*ends[i : i + 2].tolist()), runs[cuts[i] : cuts[i + 1] + 1], int(valid[i]), int(padding[i]))
        for i in range(len(samples))
    ]


def _cut(out: _Arrays, here: slice, runs: np.ndarray, valid: int, padding: int) -> Batch:
    """One batch out of the arrays; `runs` are the edges of its runs."""
    return Batch(
        tokens_T=torch.from_numpy(out.tokens[here]),
        positions_T=torch.from_numpy(out.positions[here]),
        targets_T=torch.from_numpy(out.targets[here]),
        attend=PackedCausal.of(np.diff(runs)),
        valid=valid,
        padding=padding,
    )


class _Arrays(NamedTuple):
    """The three arrays of a batch, each (T,) int64."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray


def _arrays(total: int, pad_id: int, whole: bool) -> _Arrays:
    """Uninitialised where every position will be written, else padding: no target, position 0."""
    if whole:
        return _Arrays(*(np.empty(total, np.int64) for _ in range(3)))
    return _Arrays(np.full(total, pad_id, np.int64), np.full(total, IGNORE, np.int64), np.zeros(total, np.int64))


def _fill(parts: Sequence[Part], out: _Arrays, fast: bool) -> np.ndarray:
    """All pieces but the rearranged ones: tokens, targets one place earlier, positions from 0.

    Returns the places where a document ends, ascending: the tokens without a target.
    """
    plain = [_plain(part) for part in parts]
    if fast:
        bases = [part.shard.tokens.ctypes.data for part in parts]
        width = parts[0].shard.tokens.itemsize
        source = np.concatenate([base + p.offset * width for base, p in zip(bases, plain, strict=True)])
        place, length, ends = (np.concatenate([p[i] for p in plain]) for i in (1, 2, 3))
        native.fill(out, source, place, length, ends, width, IGNORE)
    else:
        for part, pieces in zip(parts, plain, strict=True):
            _fill_twin(part.shard.tokens, pieces, out)
    return np.sort(np.concatenate([(p.place + p.length - 1)[p.ends] for p in plain]))


class _Plain(NamedTuple):
    """Pieces that stand as they are in their shard; `ends`: no token of the document follows."""

    offset: np.ndarray
    place: np.ndarray
    length: np.ndarray
    ends: np.ndarray


def _plain(part: Part) -> _Plain:
    pieces, starts = part.pieces, part.shard.starts
    offset, length, place = pieces.offset, pieces.length, part.place
    if pieces.middle.any():
        stays = ~pieces.middle
        offset, length, place = offset[stays], length[stays], place[stays]
    end = offset + length
    return _Plain(offset, place, length, starts[np.searchsorted(starts, end)] == end)


def _fill_twin(source: np.ndarray, pieces: _Plain, out: _Arrays) -> None:
    """The native kernel's work in numpy: one gather over all pieces of a shard."""
    offset, place, length, ends = pieces
    within = np.arange(length.sum()) - np.repeat(length.cumsum() - length, length)
    start, at = np.repeat(offset, length) + within, np.repeat(place, length) + within
    out.tokens[at] = source[start]
    out.targets[at] = source[np.minimum(start + 1, len(source) - 1)]
    out.targets[(place + length - 1)[ends]] = IGNORE
    out.positions[at] = within


def _fill_middle(part: Part, number: int, out: _Arrays, rules: Rules, middle: FillInTheMiddle) -> None:
    """One rearranged piece: scored within itself, its end has no target."""
    offset, length, at = (int(x[number]) for x in (part.pieces.offset, part.pieces.length, part.place))
    document = int(np.searchsorted(part.shard.starts, offset, side="right")) - 1
    begins, ends = (int(edge) for edge in part.shard.starts[document : document + 2])
    tag = 0 if part.shard.tags is None else int(part.shard.tags[document])
    head = max(0, begins + int(rules.bos) + tag - offset)
    key = keyed(part.key, document, offset)
    spm = bool(chosen(np.array([document]), middle.spm_rate, key)[0])
    piece = part.shard.tokens[offset : offset + length]
    told = rearrange(piece, key, spm, middle.tokens, min(head, length), keep_last=offset + length == ends)
    end = at + len(told)
    out.tokens[at:end] = told
    out.targets[at : end - 1] = told[1:]
    out.targets[end - 1] = IGNORE
    out.positions[at:end] = np.arange(len(told))


def _in_order(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """(place, size) of all pieces of a batch in the order they lie in it."""
    place = np.concatenate([part.place for part in parts])
    size = np.concatenate([part.pieces.size for part in parts])
    order = np.argsort(place)
    return place[order], size[order]


def _runs(place: np.ndarray, size: np.ndarray, total: int) -> np.ndarray:
    """Edges of the runs that see only themselves: a piece, or the padding between two. (runs + 1,), from 0 to total."""
    if size.sum() == total:
        return np.append(place, total)
    return np.unique(np.concatenate((place, place + size, [0, total])))


def _cross(out: _Arrays, place: np.ndarray, size: np.ndarray, samples: int, width: int) -> np.ndarray:
    """Make all pieces of a sample one run, and the end of a document predict the beginning of the next.

    Returns the edges of the runs; a sample's padding stays one of its own.
    """
    begin = np.arange(samples) * width
    used = np.bincount(place // width, weights=size, minlength=samples).astype(np.int64)
    within = np.arange(width)
    out.positions[:] = np.where(within < used[:, None], within, 0).reshape(-1)
    begins = place[place % width > 0]  # of the pieces that do not begin a sample
    out.targets[begins - 1] = out.tokens[begins]
    return _runs(begin, used, samples * width)


def _mask_tags(part: Part, targets: np.ndarray, rules: Rules) -> None:
    """No target for the tokens of a tag, wherever a piece begins. A tag stands after its document's bos, if it has one.

    Of a rearranged piece the tag stays in front, so the same places are meant.
    """
    if part.shard.tags is None:
        return
    starts, offset = part.shard.starts, part.pieces.offset
    document = np.searchsorted(starts, offset, side="right") - 1
    last = starts[document] + int(rules.bos) + part.shard.tags[document].astype(np.int64) - 1
    count = np.clip(last - offset, 0, part.pieces.length)
    for at, masked in zip(part.place[count > 0].tolist(), count[count > 0].tolist(), strict=True):
        targets[at : at + masked] = IGNORE
