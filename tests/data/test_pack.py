from __future__ import annotations

import numpy as np
import pytest

from puna.data.cut import BestFit, Bucket, Concat, FillInTheMiddle
from puna.data.fim import FimTokens
from puna.data.pack import Batch, Part, Rules, pack
from puna.data.shards import Shard
from puna.ops.basic import IGNORE
from puna.ops.native import batch as native
from shard_folders import shard

X = IGNORE
PLAIN = Rules()


def packed(made: Shard, cut, samples: list[int], rules: Rules = PLAIN) -> Batch:
    """Samples of one shard, side by side."""
    pieces = cut.plan(made, 0).pieces(np.array(samples))
    first = np.searchsorted(pieces.sample, np.arange(len(samples)))
    within = pieces.size.cumsum() - pieces.size
    place = pieces.sample * cut.width + within - within[first][pieces.sample]
    return pack([Part(made, pieces, place, key=5)], [len(samples)], cut.width, rules)[0]


def test_concatenated_documents_are_apart() -> None:
    batch = packed(shard([6, 1, 8, 5], 0), Concat(6), [2, 0])
    assert batch.tokens_T.tolist() == [12, 13, 14, 15, 16, 17, 0, 1, 2, 3, 4, 5]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert batch.targets_T.tolist() == [13, 14, X, 16, 17, 18, 1, 2, 3, 4, 5, X]
    assert batch.attend.runs == ((0, 2, 3), (6, 1, 6))
    assert (batch.valid, batch.padding) == (10, 0)


def test_crossing_documents_are_one() -> None:
    batch = packed(shard([6, 1, 8, 5], 0), Concat(6), [1, 2], Rules(cross=True))
    assert batch.tokens_T.tolist() == list(range(6, 18))
    assert batch.positions_T.tolist() == [*range(6), *range(6)]
    assert batch.targets_T.tolist() == list(range(7, 19))
    assert batch.attend.runs == ((0, 2, 6),)


def test_best_fit_pads_and_scores_every_token_once() -> None:
    made = shard([19, 5, 3, 2], 0)
    batch = packed(made, BestFit(8), [0, 1, 2, 3], Rules(pad_id=99))
    assert batch.tokens_T.view(4, 8)[0].tolist() == [*range(8)]
    assert batch.padding == 3
    assert batch.tokens_T.tolist().count(99) == 3
    assert sorted(t for t in batch.tokens_T.tolist() if t != 99) == list(range(29))
    assert sorted(t for t in batch.targets_T.tolist() if t != X) == sorted(set(range(29)) - {0, 19, 24, 27})
    padded = batch.tokens_T == 99
    assert (batch.targets_T[padded] == X).all()
    assert batch.valid == 29 - 4


def test_crossing_stops_at_padding() -> None:
    batch = packed(shard([3, 2, 4], 10), BestFit(8), [0, 1], Rules(cross=True, pad_id=0))
    for row, targets in zip(batch.tokens_T.view(2, 8).tolist(), batch.targets_T.view(2, 8).tolist(), strict=True):
        used = [t for t in row if t]
        assert targets[: len(used) - 1] == used[1:]
        assert targets[len(used) - 1 :] == [X] * (9 - len(used))
    assert sum(n * length for _, n, length in batch.attend.runs) == 16


def test_sequences_of_one_length() -> None:
    batch = packed(shard([23, 6], 0), Bucket(4, 2, 8), [0, 1])
    assert batch.tokens_T.tolist() == [16, 17, 18, 19, 23, 24, 25, 26]
    assert batch.targets_T.tolist() == [17, 18, 19, 20, 24, 25, 26, 27]
    assert batch.attend.runs == ((0, 2, 4),)


@pytest.mark.skipif(not native.available(), reason="native kernels are not built here")
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_native_kernel_equals_numpy(monkeypatch, dtype) -> None:
    """Also at the very end of a shard, with padding and for pieces of one token."""
    made = shard([700, 30, 5, 900, 2, 411, 1], 60_000)
    made = Shard(made.tokens.astype(dtype), made.starts)
    for cut in (Concat(256), BestFit(256), Bucket(128, 16, 256)):
        samples = list(range(cut.count_starts(made.starts, 0)))
        fast = packed(made, cut, samples)
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            twin = packed(made, cut, samples)
        for name in ("tokens_T", "targets_T", "positions_T"):
            assert getattr(fast, name).equal(getattr(twin, name)), (cut, name)
        assert fast.valid == twin.valid


def test_tags_are_read_but_not_scored() -> None:
    """Two tag tokens behind the bos of the first document, none in the second, three in the third, cut in the middle."""
    made = shard([6, 4, 10], 0, tags=[2, 0, 3])
    scored = packed(made, Concat(10), [0, 1], Rules(bos=True))
    masked = packed(made, Concat(10), [0, 1], Rules(bos=True, mask_tags=True))
    assert masked.tokens_T.equal(scored.tokens_T)
    assert set(scored.targets_T.tolist()) - set(masked.targets_T.tolist()) == {1, 2, 11, 12, 13}
    halves = packed(made, Concat(2), list(range(10)), Rules(bos=True, mask_tags=True))
    assert set(halves.targets_T.tolist()) == set(masked.targets_T.tolist())
    without_bos = packed(made, Concat(10), [0, 1], Rules(mask_tags=True))
    assert set(scored.targets_T.tolist()) - set(without_bos.targets_T.tolist()) == {1, 11, 12}


def test_fill_in_the_middle_loses_nothing() -> None:
    fim = FillInTheMiddle(FimTokens(10_001, 10_002, 10_003), spm_rate=0.5)
    made = shard([40, 12, 300, 7, 55], 1)
    cut = BestFit(64, fim_rate=0.7, key=3)
    count = cut.count_starts(made.starts, 0)
    batch = packed(made, cut, list(range(count)), Rules(middle=fim, bos=True, pad_id=0))
    ids = batch.tokens_T.tolist()
    assert sorted(i for i in ids if 0 < i <= 414) == list(range(1, 415))
    marks = [ids.count(i) for i in (10_001, 10_002, 10_003)]
    assert marks[0] == marks[1] == marks[2] > 0
    position, target = batch.positions_T.tolist(), batch.targets_T.tolist()
    for place in range(len(ids) - 1):  # whatever the order, a target is the next token of the same run
        if target[place] != X and position[place + 1] > 0:
            assert target[place] == ids[place + 1]
    for begin in (1, 41, 53, 353, 360):
        assert position[ids.index(begin)] == 0  # bos stays in front
    for last in (40, 52, 352, 359, 414):
        assert (position[ids.index(last) + 1 :] or [0])[0] == 0  # and eos last


def test_fill_in_the_middle_tells_both_orders() -> None:
    fim = FillInTheMiddle(FimTokens(10_001, 10_002, 10_003), spm_rate=0.5)
    made = shard([20] * 60, 1)
    batch = packed(made, BestFit(23, 1.0, 1), list(range(60)), Rules(middle=fim, bos=True))
    spm = [row[1:3] == [10_001, 10_003] for row in batch.tokens_T.view(60, 23).tolist()]
    assert 15 < sum(spm) < 45
