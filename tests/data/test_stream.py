"""The promises of the stream, each on the token ids of whole epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from puna.base.console import PunaError
from puna.data.cut import BestFit, Bucket, Concat, FillInTheMiddle
from puna.data.decompose import bucket_counts
from puna.data.fim import FimTokens
from puna.data.mixture import Mixture
from puna.data.pack import Rules
from puna.data.permute import keyed
from puna.data.reader import ShardReader
from puna.data.stream import Curriculum, Held, Lane, Stream, share
from puna.ops.basic import IGNORE
from shard_folders import make_source, open_folder

T = 32
PAD = 2**31


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("sources")
    for number in range(3):
        make_source(root / str(number), seed=number, shards=4 + number, first=number * 1_000_000)
    return [root / str(number) for number in range(3)]


def lane(reader: ShardReader, cut, key: int) -> Lane:
    counts = [cut.count_starts(reader.starts(i), i) for i in range(len(reader.manifest.shards))]
    return Lane(reader, cut, counts, key, group=2)


def fixed(folders: list[Path], weights: list[float], seed: int = 1, best_fit: bool = False) -> Stream:
    """A new stream over newly opened folders, as another process or a resumed run would have it."""
    cut = BestFit(T) if best_fit else Concat(T)
    lanes = [lane(open_folder(folder), cut, keyed(seed, i)) for i, folder in enumerate(folders)]
    return Stream({T: lanes}, {T: Mixture([(0, weights)])}, Rules(pad_id=PAD))


def decomposed(folder: Path, steps: int, rows: int, curriculum: str = "mixture") -> Stream:
    reader = open_folder(folder)
    counts = [bucket_counts(info.bits, T, 4) for info in reader.manifest.shards]
    tokens = {k: sum(c[k] for c in counts) << k for k in counts[0]}
    lanes = {1 << k: [lane(reader, Bucket(1 << k, 4, T), 9)] for k in tokens}
    mixtures = {width: Mixture([(0, [1.0])]) for width in lanes}
    return Stream(lanes, mixtures, Rules(pad_id=PAD), Curriculum(curriculum, steps, rows, tokens, 3), width=T)


def ids(stream: Stream, first: int, count: int) -> list[int]:
    return stream.batch(first, count).tokens_T.tolist()


@pytest.mark.parametrize("kind", ["concat", "best_fit", "decompose"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_sees_the_same_global_batches(folders, kind, world) -> None:
    def make() -> Stream:
        if kind == "decompose":
            return decomposed(folders[2], steps=40, rows=8)
        return fixed(folders, [0.5, 0.3, 0.2], best_fit=kind == "best_fit")

    one, ranks = make(), [make() for _ in range(world)]
    for step in range(40):
        parts = [ids(rank, *share(step * 8, 8, r, world)) for r, rank in enumerate(ranks)]
        assert ids(one, step * 8, 8) == [i for part in parts for i in part]


@pytest.mark.parametrize("best_fit", [False, True])
def test_a_run_that_changes_its_ranks_loses_and_repeats_nothing(folders, best_fit) -> None:
    """One epoch: 1 rank, killed; 4 ranks, killed; 2 ranks to the end. Every sample of the epoch exactly once."""
    total = fixed(folders[:1], [1.0], best_fit=best_fit).lanes[T][0].order.total
    steps = total // 4
    seen: list[int] = []
    for world, begin, end in ((1, 0, steps // 3), (4, steps // 3, steps // 2), (2, steps // 2, steps)):
        ranks = [fixed(folders[:1], [1.0], best_fit=best_fit) for _ in range(world)]  # nothing but the step survives
        for step in range(begin, end):
            for rank, stream in enumerate(ranks):
                seen += ids(stream, *share(step * 4, 4, rank, world))
    if rest := total - steps * 4:
        seen += ids(fixed(folders[:1], [1.0], best_fit=best_fit), steps * 4, rest)
    tokens = [i for i in seen if i != PAD]
    assert len(tokens) == len(set(tokens))
    reader = open_folder(folders[0])
    held = sum(info.tokens for info in reader.manifest.shards)
    assert len(tokens) == (held if best_fit else T * total)


def test_resuming_is_no_replay(folders, monkeypatch) -> None:
    """The batch of a far step opens no more shards and permutes no more samples than the first."""
    near, far = (fixed(folders, [0.5, 0.3, 0.2]) for _ in range(2))
    near.batch(0, 8)
    asked: list[int] = []
    real = Lane._open
    monkeypatch.setattr(Lane, "_open", lambda self, number: asked.append(number) or real(self, number))
    fresh = fixed(folders, [0.5, 0.3, 0.2])
    batch = fresh.batch(8 * 10**9, 8)
    assert len(asked) <= 8
    assert batch.tokens_T.equal(far.batch(8 * 10**9, 8).tokens_T)


def test_sources_come_by_weight_and_epochs_are_counted(folders) -> None:
    stream = fixed(folders, [0.5, 0.3, 0.2])
    totals = [part.order.total for part in stream.lanes[T]]
    rows = 10 * max(totals)
    sources = np.array([ids(stream, i, 1)[0] // 1_000_000 for i in range(rows)])
    assert [(sources == s).sum() for s in range(3)] == [rows * w // 10 for w in (5, 3, 2)]
    assert stream.epochs(rows) == pytest.approx([rows * w / n for w, n in zip((0.5, 0.3, 0.2), totals, strict=True)])


def test_best_fit_scores_every_token_but_the_first_of_each_document(folders) -> None:
    stream = fixed(folders[:1], [1.0], best_fit=True)
    reader = stream.lanes[T][0].reader
    batch = stream.batch(0, stream.lanes[T][0].order.total)
    firsts = {int(reader.shard(n).tokens[s]) for n in range(4) for s in reader.starts(n)[:-1]}
    every = {int(t) for n in range(4) for t in reader.shard(n).tokens}
    assert sorted(t for t in batch.targets_T.tolist() if t != IGNORE) == sorted(every - firsts)
    assert batch.padding == batch.tokens_T.numel() - len(every)


def test_decomposed_steps_are_constant_and_from_one_document(folders) -> None:
    reader = open_folder(folders[2])
    counts = [bucket_counts(info.bits, T, 4) for info in reader.manifest.shards]
    kept = sum(number << k for c in counts for k, number in c.items())
    tokens = sum(info.tokens for info in reader.manifest.shards)
    tails = sum(int((np.diff(reader.starts(n)) % 4).sum()) for n in range(len(counts)))
    assert kept == tokens - tails
    stream = decomposed(folders[2], steps=60, rows=2)
    widths = []
    for step in range(60):
        batch = stream.batch(step * 2, 2)
        assert batch.padding == 0
        assert batch.tokens_T.numel() == 2 * T
        (_, many, length), *others = batch.attend.runs
        assert not others
        widths.append(length)
        for sequence in batch.tokens_T.view(many, length).tolist():
            assert sequence == list(range(sequence[0], sequence[0] + length))
            owner = [np.searchsorted(_starts(reader), i, side="right") for i in (sequence[0], sequence[-1])]
            assert owner[0] == owner[1]
    assert {4, 8, 16, 32} == set(widths)


def _starts(reader: ShardReader) -> np.ndarray:
    """First token id of every document (ids count through the folder)."""
    return np.concatenate([reader.shard(n).tokens[reader.starts(n)[:-1]] for n in range(len(reader.manifest.shards))])


def test_decomposed_sequences_come_once_an_epoch(folders) -> None:
    """Steps beyond one epoch of the corpus: within the first pass of a bucket no sequence comes twice."""
    stream = decomposed(folders[2], steps=200, rows=1, curriculum="short_to_long")
    seen: dict[int, list[int]] = {}
    for step in range(200):
        batch = stream.batch(step, 1)
        width = batch.attend.runs[0][2]
        seen.setdefault(width, []).extend(batch.tokens_T.view(-1, width)[:, 0].tolist())
    for width, first_ids in seen.items():
        total = stream.lanes[width][0].order.total
        assert len(set(first_ids[:total])) == min(total, len(first_ids))
    used = sum(len(v) * w for w, v in seen.items())
    assert used == 200 * T
    held = sum(stream.lanes[w][0].order.total * w for w in stream.lanes)
    assert stream.epochs(200) == pytest.approx([used / held])


def test_what_comes_next_is_known(folders) -> None:
    stream = fixed(folders, [0.5, 0.3, 0.2])
    soon = set()
    for step in range(3):
        soon |= {(lane, number) for lane, number in stream.upcoming(step * 8)}
    opened = {(part, n) for part in stream.lanes[T] for _, n in [(0, n) for n in range(10)] if (part, n) in soon}
    used = set()
    for part in stream.lanes[T]:
        real = part.open
        part.open = lambda number, part=part, real=real: used.add((part, number)) or real(number)
    stream.batch(0, 24)
    assert used <= opened


def test_a_batch_that_ranks_cannot_share() -> None:
    with pytest.raises(PunaError, match="8 rows cannot be shared by 3 ranks"):
        share(0, 8, 0, 3)


def test_held_out_windows_are_spread_and_never_repeat(folders) -> None:
    held = Held(open_folder(folders[0]), T, Rules())
    total = held.lane.order.total
    few = [batch.tokens_T.view(-1, T)[:, 0].tolist() for batch in held.batches(2, limit=4)]
    assert [len(part) for part in few] == [2, 2]
    assert few == [batch.tokens_T.view(-1, T)[:, 0].tolist() for batch in held.batches(2, limit=4)]
    every = [i for batch in held.batches(5, limit=10**9) for i in batch.tokens_T.tolist()]
    assert len(every) == len(set(every)) == total * T
    assert few[0][0] == 0
    assert few[1][1] > held.reader.manifest.tokens * 0.6


@pytest.mark.parametrize("kind", ["concat", "best_fit", "decompose"])
def test_many_batches_at_once_are_the_same_as_one_by_one(folders, kind) -> None:
    stream = decomposed(folders[2], 40, 6) if kind == "decompose" else fixed(folders, [2, 1, 1], 1, kind == "best_fit")
    ranges = [(0, 4), (4, 2), (6, 6), (90, 1), (12, 3)]
    for whole, (first, count) in zip(stream.batches(ranges), ranges, strict=True):
        alone = stream.batch(first, count)
        assert whole.attend == alone.attend
        assert (whole.valid, whole.padding) == (alone.valid, alone.padding)
        assert whole.valid == int((whole.targets_T != IGNORE).sum())
        assert whole.padding == int((whole.tokens_T == PAD).sum())
        for name in ("tokens_T", "positions_T", "targets_T"):
            assert getattr(whole, name).equal(getattr(alone, name))


def test_middles_are_cut_elsewhere_in_the_next_epoch(folders) -> None:
    middle = FillInTheMiddle(FimTokens(9_000_001, 9_000_002, 9_000_003), spm_rate=0.5)
    made = lane(open_folder(folders[0]), BestFit(T, fim_rate=1.0, key=1), 5)
    stream = Stream({T: [made]}, {T: Mixture([(0, [1.0])])}, Rules(pad_id=PAD, middle=middle))
    total = made.order.total
    first, again, second = (
        {tuple(row) for row in stream.batch(start, total).tokens_T.view(total, T).tolist()} for start in (0, 0, total)
    )
    assert first == again
    assert len(first & second) < 0.2 * total
    for rows in (first, second):
        assert sorted(i for row in rows for i in row if i < 9_000_000) == sorted(
            int(i) for n in range(4) for i in made.reader.shard(n).tokens
        )
