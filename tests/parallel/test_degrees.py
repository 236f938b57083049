"""Degrees: what is left over is filled in, and every mistake has a message with the numbers and a hint that works."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.parallel.degrees import Degrees, check_passes, microbatches, resolve, split_layers, stages_per_rank
from puna.train.recipe import ParallelSection

SPEC = Spec(hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=8)


def section(**changes) -> ParallelSection:
    return replace(ParallelSection(), **changes)


def refused(
    match: str, hint: str, world: int = 4, seq_len: int = 64, batch: int = 16, spec: Spec = SPEC, **changes
) -> None:
    with pytest.raises(PunaError, match=match) as error:
        parallel = section(**changes)
        degrees = resolve(parallel, world, spec, seq_len, batch)
        microbatches(parallel, degrees, batch, 0)
    assert hint in error.value.hint


def test_what_is_left_over_shards() -> None:
    degrees = resolve(section(tp=2, dp_replicate=2), 16, SPEC, 64, 16)
    assert degrees == Degrees(dp_replicate=2, dp_shard=4, tp=2)
    assert (degrees.world, degrees.data, degrees.shards) == (16, 8, 4)
    assert resolve(section(), 1, SPEC, 64, 16) == Degrees()
    assert str(degrees) == "dp_replicate 2 x dp_shard 4 x tp 2"
    assert Degrees(dp_shard=2, cp=4).shards == 8


def test_world_that_does_not_match() -> None:
    refused("makes 8 ranks, there are 4", "--parallel.dp_shard 2", dp_shard=4, tp=2)
    refused("makes 6 ranks, there are 4", "use 6 ranks", dp_shard=2, pp=3)
    refused("needs a multiple of 3 ranks, there are 4", "use 3 ranks", pp=3)
    refused("needs a multiple of 8 ranks, there are 4", "use 8 ranks", tp=8)
    refused("parallel.tp is 0", "--parallel.tp 1", tp=0)
    assert resolve(section(dp_shard=2, tp=2), 4, SPEC, 64, 16).world == 4  # the first hint, followed


def test_heads_and_lengths() -> None:
    refused("num_attention_heads 8 is not divisible by tp 3", "1, 2, 4, 8", world=3, tp=3)
    six = SPEC.replace(num_attention_heads=12, num_key_value_heads=6)
    refused("num_key_value_heads 6 neither", "--parallel.tp 1, 2, 3, 6, 12", tp=4, spec=six)
    refused("data.seq_len 62 / cp 1 is not divisible by tp 4", "--data.seq_len 60", seq_len=62, tp=4)
    refused(
        "data.seq_len 60 is not divisible by 8, the chunks of cp 4 by allgather", "--data.seq_len 56", seq_len=60, cp=4
    )
    refused(
        "data.seq_len 62 is not divisible by 4, the chunks of cp 4 by ulysses",
        "--data.seq_len 60",
        seq_len=62,
        cp=4,
        cp_method="ulysses",
    )
    refused("ulysses deals out heads, and 4", "allgather", world=16, tp=2, cp=8, cp_method="ulysses")
    refused("cp_method 'zigzag'", "allgather", cp_method="zigzag")
    assert resolve(section(tp=8), 8, SPEC, 64, 16).tp == 8  # 4 kv heads on 8 ranks: replicated
    assert resolve(section(tp=4, sequence_parallel=False), 4, SPEC, 62, 16).tp == 4


def test_batches() -> None:
    refused("train.batch_size 10 is not divisible by 4 data-parallel ranks", "--train.batch_size 12", batch=10)
    refused("4 sequences are not divisible by pp_microbatches 3", "--parallel.pp_microbatches 4", batch=8, pp=2, pp_microbatches=3)  # fmt: skip
    with pytest.raises(PunaError, match="micro_batch_size 3 does not divide a rank's 4"):
        microbatches(section(), Degrees(dp_shard=4), 16, 3)


def test_pipelines() -> None:
    refused("4 layers are fewer than 8 pipeline stages", "--parallel.pp 4", world=8, pp=8)
    refused("4 layers are fewer than 8 pipeline stages", "--parallel.pp 2", pp=4, pp_schedule="interleaved")
    refused("zbv with zero 3 trains on wrong gradients", "--parallel.zero 2", pp=2, pp_schedule="zbv")
    refused("dualpipev with zero 3", "--parallel.zero 2", pp=2, pp_schedule="dualpipev")
    refused("pp_schedule 'gpip'", "gpipe", pp=2, pp_schedule="gpip")
    refused("parallel.zero is 4", "1 (optimizer)", zero=4)
    assert resolve(section(pp=2, pp_schedule="zbv", zero=2), 4, SPEC, 64, 16).pp == 2
    assert (
        resolve(section(pp=2, pp_schedule="zbv"), 2, SPEC, 64, 16).pp == 2
    )  # nothing is sharded: zero does not matter


def test_tied_weights_stay_on_one_stage() -> None:
    tied = SPEC.replace(tie_word_embeddings=True)
    refused("pp 2 puts embedding and head on two stages", "--parallel.pp 1", pp=2, spec=tied)
    assert resolve(section(tp=2), 4, tied, 64, 16).tp == 2


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
@pytest.mark.parametrize(
    ("mode", "compiled", "message", "hint"),
    [
        ("full", False, "full: a block is recomputed once for each", "--train.activation_checkpointing none"),
        ("selective", False, "selective: torch goes back only once", "--train.activation_checkpointing none"),
        ("none", True, "compile: torch cannot split", "--train.compile false"),
    ],
)
def test_split_backward_wants_plain_blocks(schedule: str, mode: str, compiled: bool, message: str, hint: str) -> None:
    two = Degrees(pp=2)
    with pytest.raises(PunaError, match=f"{schedule} with .*{message}") as error:
        check_passes(section(pp_schedule=schedule), two, "bfloat16", mode, compiled)
    assert hint in error.value.hint
    check_passes(section(pp_schedule=schedule), two, "bfloat16", "none", False)  # each hint, followed
    check_passes(section(pp_schedule="interleaved"), two, "bfloat16", mode, compiled)
    check_passes(section(pp_schedule=schedule), Degrees(tp=2), "bfloat16", mode, compiled)  # no pipeline: no schedule


def test_passes_that_do_not_go_with_ranks() -> None:
    with pytest.raises(PunaError, match="float16 needs loss scaling, which is not built for 2 ranks"):
        check_passes(section(), Degrees(dp_shard=2), "float16", "none", False)
    check_passes(section(), Degrees(), "float16", "none", False)
    for changes, compiled in (({}, True), ({"sequence_parallel": False}, False)):
        with pytest.raises(PunaError, match="async_tp with"):
            check_passes(section(async_tp=True, **changes), Degrees(tp=2), "float32", "none", compiled)
    check_passes(section(async_tp=True), Degrees(tp=2), "float32", "none", False)


def test_microbatches() -> None:
    assert microbatches(section(), Degrees(dp_shard=4), 16, 0) == 1
    assert microbatches(section(), Degrees(dp_shard=4), 16, 1) == 4
    assert microbatches(section(pp=4), Degrees(pp=4, dp_shard=2), 32, 0) == 8  # 2 x pp
    assert microbatches(section(pp=4), Degrees(pp=4, dp_shard=2), 24, 0) == 12  # the next that divides
    assert microbatches(section(pp=4), Degrees(pp=4), 6, 0) == 6
    assert microbatches(section(pp=4), Degrees(pp=4), 32, 2) == 16
    assert microbatches(section(pp=4, pp_microbatches=4), Degrees(pp=4), 32, 2) == 4


def test_stages() -> None:
    assert [stages_per_rank(section(pp_schedule=name)) for name in ("1f1b", "zbv")] == [1, 2]
    assert split_layers(8, 4) == [2, 2, 2, 2]
    assert split_layers(126, 8) == [15, 16, 16, 16, 16, 16, 16, 15]
    assert split_layers(7, 2) == [4, 3]
    assert sum(split_layers(61, 16)) == 61


def test_no_torch_is_imported() -> None:
    code = "import sys, puna.serve.plan, puna.parallel.picture; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
