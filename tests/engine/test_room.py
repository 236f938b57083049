from __future__ import annotations

import pytest
import torch

import puna
from puna.base.console import PunaError
from puna.engine.options import EngineOptions
from puna.engine.room import plan_room

GIB = 2**30


def test_the_cache_takes_no_more_than_could_be_used() -> None:
    room = plan_room(EngineOptions(max_num_seqs=2, page_size=16), 100, 1024, 64 * GIB)
    assert (room.num_pages, room.max_model_len) == (
        2 * 7 + 1,
        100,
    )  # 7 pages of 16 for 100 tokens, and the scratch page


def test_half_of_what_is_free_unless_told_otherwise() -> None:
    room = plan_room(EngineOptions(max_num_seqs=256, page_size=16), 4096, 2**16, 8 * GIB)
    assert room.num_pages == 4 * GIB // (16 * 2**16)
    told = plan_room(EngineOptions(max_num_seqs=256, page_size=16, kv_memory=1.0), 4096, 2**16, 8 * GIB)
    assert told.num_pages == GIB // (16 * 2**16)


def test_without_a_wish_the_longest_sequence_gives_way() -> None:
    room = plan_room(EngineOptions(page_size=16), 1 << 20, 2**16, GIB)
    assert room.max_model_len == (room.num_pages - 1) * 16 < 1 << 20


@pytest.mark.parametrize(
    "options", [{"max_model_len": 9000}, {"kv_memory": 0.5}, {"max_model_len": 9000, "kv_memory": 0.5}]
)
def test_a_wish_that_does_not_fit_is_refused_with_the_numbers(options) -> None:
    with pytest.raises(PunaError, match=r"512.00 MiB, which is 8176 tokens .* of max_model_len \d+ needs"):
        plan_room(EngineOptions(page_size=16, **options), 10_000, 2**16, GIB)


def test_memory_that_holds_no_page_is_refused() -> None:
    with pytest.raises(PunaError, match="0 tokens"):
        plan_room(EngineOptions(), 100, 2**20, 2**20)


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(PunaError, match="max_model_len 513 is above the model's context of 512"):
        puna.LLM("preset:debug", max_model_len=513)


@pytest.mark.parametrize(
    ("kv", "dtype"), [("none", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_the_caches_numbers_are_as_asked(kv, dtype) -> None:
    assert puna.LLM("preset:debug", kv=kv).engine.pages.keys.dtype is dtype


@pytest.mark.parametrize("wrong", [{"kv": "int8"}, {"page_size": 0}, {"activations": "int4"}, {"max_model_len": -1},
                                   {"max_num_seqs": 99, "max_num_batched_tokens": 98}, {"no_such": 1}])  # fmt: skip
def test_options_that_make_no_engine(wrong) -> None:
    with pytest.raises(PunaError):
        puna.LLM("preset:debug", **wrong)
