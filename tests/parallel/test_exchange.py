"""Context parallelism against one process: the geometry without processes, the exchanges on four ranks in one launch."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.exchange_ranks import HEADS, LAYOUTS, RANKS, TOKENS, attention_cases, model_cases
from puna.base.console import PunaError
from puna.ops.attention import PackedCausal, attention_twin
from puna.parallel.degrees import CP_METHODS
from puna.parallel.exchange import traffic_bytes
from puna.parallel.partial import attend_part, attend_part_backward, attend_part_twin, attend_part_twin_backward, merge
from puna.parallel.sharding import METHODS, Piece, Span, check_context, held_spans, pieces, shard, unshard

SCRIPT = Path(__file__).with_name("exchange_ranks.py")


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Largest difference from one process of every check, over four ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    result, logs = folder / "result.json", [folder / f"{rank}.log" for rank in range(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), folder / "store", result],
            stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * RANKS, "\n".join(log.read_text()[-2000:] for log in logs)
    return json.loads(result.read_text())


@pytest.mark.parametrize("name", [case[0] for case in attention_cases()])
def test_output_and_gradients_equal_one_process(differences, name: str) -> None:
    assert set(differences[name]) == {"out", "q", "k", "v"}
    assert max(differences[name].values()) < 1e-5, differences[name]


@pytest.mark.parametrize("name", [case[0] for case in model_cases()])
def test_a_whole_model_has_the_loss_and_gradients_of_one_process(differences, name: str) -> None:
    assert max(differences[name].values()) < 1e-5, differences[name]


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_stays_half(differences, method: str) -> None:
    assert differences[f"half-{method}"]["dtype"] == 0
    assert differences[f"half-{method}"]["out"] < 0.02


@pytest.mark.parametrize(("method", "world", "heads"), list(itertools.product(METHODS, (2, 4), HEADS)))
def test_bytes_sent_are_those_promised(differences, method: str, world: int, heads: tuple[int, int]) -> None:
    assert differences[f"traffic-{method}-cp{world}-{heads[0]}to{heads[1]}"]["bytes"] == 0


def test_what_does_not_divide_is_refused_on_every_rank(differences) -> None:
    assert differences["refusals"]["accepted"] == 0


def test_published_traffic_of_llama3_8b() -> None:
    figures = [traffic_bytes(method, 131072, 32, 8, 128, 8) / 1e9 for method in METHODS]
    assert [round(x, 2) for x in figures] == [0.59, 1.88, 2.01]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_unshard_is_the_inverse_of_shard(method: str, world: int) -> None:
    x = torch.randn(TOKENS, 3)
    parts = [shard([x, x[:, 0]], rank, world, method) for rank in range(world)]
    assert torch.equal(unshard([part[0] for part in parts], method), x)
    assert all(torch.equal(part[0][:, 0], part[1]) and len(part[1]) == TOKENS // world for part in parts)


def test_head_and_tail_chunks() -> None:
    assert shard([torch.arange(8)], 0, 2, "ring")[0].tolist() == [0, 1, 6, 7]
    assert shard([torch.arange(8)], 1, 2, "allgather")[0].tolist() == [2, 3, 4, 5]
    assert shard([torch.arange(8)], 1, 2, "ulysses")[0].tolist() == [4, 5, 6, 7]


def pairs(piece: Piece, window: int | None, queries: torch.Tensor, keys: torch.Tensor) -> list[tuple[int, int]]:
    """(query, key) positions of the sequence that a piece computes."""
    rows = queries[piece.queries].unflatten(0, (piece.documents, -1))
    columns = keys[piece.keys].unflatten(0, (piece.documents, -1))
    found = []
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        for (i, query), (j, key) in itertools.product(enumerate(row), enumerate(column)):
            distance = piece.offset + i - j
            if distance >= 0 and (window is None or distance < window):
                found.append((query, key))
        assert piece.offset == 0 or piece.offset >= len(column), "neither a diagonal nor a full rectangle"
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 7, 30])
@pytest.mark.parametrize("world", [2, 4])
def test_pieces_are_the_mask_each_pair_once(layout: str, window: int | None, world: int) -> None:
    documents, everything = PackedCausal.of(LAYOUTS[layout]), torch.arange(TOKENS)
    number = torch.repeat_interleave(torch.arange(len(LAYOUTS[layout])), torch.tensor(LAYOUTS[layout]))
    distance = everything[:, None] - everything
    mask = (distance >= 0) & (number[:, None] == number) & (distance < (window or TOKENS))
    expected = sorted(map(tuple, mask.nonzero().tolist()))
    by_ring, by_gather = [], []
    for rank in range(world):
        mine, held = held_spans(TOKENS, rank, world, "ring"), shard([everything], rank, world, "ring")[0]
        for piece in pieces(documents, mine, (Span(0, TOKENS, 0),), window):
            by_gather += pairs(piece, window, held, everything)
        for other in range(world):
            theirs = shard([everything], other, world, "ring")[0]
            for piece in pieces(documents, mine, held_spans(TOKENS, other, world, "ring"), window):
                by_ring += pairs(piece, window, held, theirs)
    assert sorted(by_ring) == sorted(by_gather) == expected


@pytest.mark.parametrize("world", [2, 4, 8])
def test_one_document_costs_every_rank_the_same(world: int) -> None:
    def cost(rank: int) -> int:
        plan = pieces(PackedCausal.of([64]), held_spans(64, rank, world, "ring"), (Span(0, 64, 0),), None)
        areas = [(p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in plan]
        return sum(area // 2 if p.offset == 0 else area for p, area in zip(plan, areas, strict=True))

    assert len({cost(rank) for rank in range(world)}) == 1


def test_what_the_mask_rules_out_is_not_computed() -> None:
    held = [held_spans(64, rank, 4, "ring") for rank in range(4)]
    aligned, long = PackedCausal.of([8] * 8), PackedCausal.of([64])
    assert all(not pieces(aligned, held[a], held[b], None) for a in range(4) for b in range(4) if a != b)
    assert all(pieces(long, held[a], held[b], None) for a in range(4) for b in range(4))
    # A window of 1 sees itself only; one of 2 reaches a single row and key over the border.
    assert not pieces(long, held[1], held[0], 1)
    assert pieces(long, held[1], held[0], 2) == (Piece(slice(0, 1), slice(7, 8), 1, 1),)


CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("documents", "queries", "keys", "offset", "window"),
    [(3, 7, 7, 0, None), (1, 5, 9, 9, None), (1, 5, 9, 12, None), (2, 7, 7, 0, 3), (1, 5, 9, 9, 8), (1, 1, 1, 0, 1)],
)
def test_a_part_equals_its_twin(
    device: str, documents: int, queries: int, keys: int, offset: int, window: int | None
) -> None:
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 3e-2)
    q, d_out = (torch.randn(documents, queries, 8, 16, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(documents, keys, 2, 16, device=device, dtype=dtype) for _ in range(2))
    out, lse = attend_part(q, k, v, offset, window)
    twin_out, twin_lse = attend_part_twin(q, k, v, offset, window)
    assert torch.allclose(out, twin_out, atol=tolerance)
    assert torch.allclose(lse, twin_lse, atol=tolerance)
    whole = lse + torch.rand_like(lse)  # as if other keys had been merged in: the part's own lse would hide a mistake
    ours = attend_part_backward(d_out, q, k, v, out, whole, offset, window)
    twins = attend_part_twin_backward(d_out, q, k, v, out, whole, offset, window)
    for a, b in zip(ours, twins, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a.float(), b.float(), atol=tolerance)


@pytest.mark.parametrize(("queries", "keys", "offset"), [(16, 16, 0), (16, 40, 40)])
def test_the_cuda_calls_fit_their_operators(monkeypatch, queries: int, keys: int, offset: int) -> None:
    """Arguments and shapes only, on the meta device: a machine without a GPU cannot check the values."""
    monkeypatch.setattr("puna.parallel.partial._fused", lambda *_: True)
    q, d_out = (torch.empty(3, queries, 8, 64, device="meta", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.empty(3, keys, 2, 64, device="meta", dtype=torch.bfloat16) for _ in range(2))
    out, lse = attend_part(q, k, v, offset, None)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    gradients = attend_part_backward(d_out, q, k, v, out, lse, offset, None)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("tile", [64, 2**26])
def test_the_twin_is_attention_however_it_is_cut(monkeypatch, tile: int) -> None:
    monkeypatch.setattr("puna.parallel.partial._TILE", tile)
    q, k, v = (torch.randn(200, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    expected = attention_twin(q, k, v, torch.zeros(200), 70)
    out, lse = attend_part_twin(q[None], k[None], v[None], 0, 70)
    assert torch.allclose(out[0], expected, atol=1e-5)
    d_out = torch.randn_like(expected)
    found = attend_part_twin_backward(d_out[None], q[None], k[None], v[None], out, lse, 0, 70)
    for a, b in zip(found, torch.autograd.grad(expected, (q, k, v), d_out), strict=True):
        assert torch.allclose(a[0], b, atol=1e-5)


def test_merged_parts_are_the_whole() -> None:
    q, k, v = torch.randn(1, 5, 4, 8) * 30, torch.randn(1, 12, 2, 8), torch.randn(1, 12, 2, 8)
    whole, whole_lse = attend_part(q, k, v, 12, None)
    out, lse = torch.zeros(5, 4, 8), torch.full((5, 4), -math.inf)
    for keys in (slice(0, 3), slice(3, 4), slice(4, 12)):
        part, part_lse = attend_part(q, k[:, keys], v[:, keys], 12 - keys.start, None)
        merge(out, lse, part[0], part_lse[0])
    assert torch.allclose(out, whole[0], atol=1e-5)
    assert torch.allclose(lse, whole_lse[0], atol=1e-4)


@pytest.mark.parametrize(
    ("method", "tokens", "heads", "world", "words"),
    [
        ("ulysses", 64, 6, 4, ["6 attention heads", "cp 4", "1, 2, 3 or 6"]),
        ("ring", 60, 8, 4, ["60 tokens", "8, the chunks of cp 4", "56 or 64"]),
        ("allgather", 4, 8, 4, ["4 tokens", "8 tokens"]),
        ("ulysses", 66, 8, 4, ["66 tokens", "64 or 68"]),
        ("rign", 64, 8, 4, ["'rign'", "ulysses, allgather, ring"]),
    ],
)
def test_errors_carry_the_numbers(method: str, tokens: int, heads: int, world: int, words: list[str]) -> None:
    with pytest.raises(PunaError) as error:
        check_context(method, tokens, heads, world)
    said = f"{error.value.message} {error.value.hint}"
    assert all(word in said for word in words), said


def test_recipes_name_the_methods_there_are() -> None:
    """`degrees` imports no torch, so it has a list of its own."""
    assert sorted(CP_METHODS) == sorted(METHODS)
