"""Pages: who holds which, what is found again, what a window gives back, and that none is ever lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.kv_cache import NULL_PAGE, KVCache
from puna.engine.request import SamplingParams
from puna.engine.sequence import Request, Sequence

SIZE = 4


def sequence(tokens: list[int], prompt: int | None = None, request: Request | None = None, **asked) -> Sequence:
    request = request or Request(0, tokens, SamplingParams(), **asked)
    return Sequence(0, request, 0, list(tokens), prompt or len(tokens))


def compute(cache: KVCache, seq: Sequence, tokens: int | None = None) -> None:
    """As if a step had computed everything up to `tokens`."""
    tokens = len(seq.token_ids) if tokens is None else tokens
    assert cache.reserve(seq, tokens)
    seq.num_computed_tokens = tokens
    cache.commit(seq)


def cached(cache: KVCache, tokens: list[int], **asked) -> list[int]:
    """Run a sequence to its end; returns the pages it had."""
    seq = sequence(tokens, **asked)
    cache.match(seq)
    compute(cache, seq)
    pages = list(seq.pages)
    cache.release(seq)
    cache.check_integrity([])
    return pages


def test_pages_are_given_all_or_none_and_never_the_scratch_page() -> None:
    cache = KVCache(5, SIZE)
    a, b = sequence([1] * 9), sequence([2] * 9)
    assert cache.reserve(a, 9)
    assert len(a.pages) == 3
    assert NULL_PAGE not in a.pages
    assert not cache.reserve(b, 5)
    assert b.pages == []
    assert cache.num_free_pages == 1
    assert cache.usage == 0.75
    assert cache.reserve(a, 10)  # still in its last page
    assert len(a.pages) == 3
    cache.check_integrity([a, b])
    cache.release(a)
    assert cache.reserve(b, 16)
    assert sorted(b.pages) == [1, 2, 3, 4]


def test_a_beginning_is_found_by_page_and_never_the_last_token() -> None:
    cache = KVCache(20, SIZE)
    pages = cached(cache, list(range(12)))
    for tokens, found in [(list(range(12)), 8), (list(range(13)), 12), ([*range(6), 99], 4), ([9, *range(12)], 0)]:
        seq = sequence(tokens)
        assert cache.match(seq) == found == seq.num_computed_tokens == seq.num_cached_tokens
        assert seq.pages == pages[: found // SIZE]
        cache.release(seq)
    assert (cache.num_queried_tokens, cache.num_hit_tokens) == (12 + 12 + 13 + 7 + 13, 24)


def test_equal_pages_after_other_pages_are_another_beginning() -> None:
    cache = KVCache(20, SIZE)
    cached(cache, [1, 1, 1, 1, 5, 5, 5, 5, 0])
    seq = sequence([2, 2, 2, 2, 5, 5, 5, 5, 0])
    assert cache.match(seq) == 0


class Colliding(int):
    """A token id whose hash is that of every other."""

    def __hash__(self) -> int:
        return 7


def test_a_hash_is_never_trusted() -> None:
    cache = KVCache(40, SIZE)
    texts = [[Colliding(t) for t in row] for row in ([1, 2, 3, 4, 5], [4, 3, 2, 1, 5], [1, 2, 3, 5, 5])]
    pages = [cached(cache, text) for text in texts]
    for text, own in zip(texts, pages, strict=True):
        seq = sequence(text)
        assert cache.match(seq) == SIZE
        assert seq.pages == own[:1]


def test_adapters_and_salts_share_nothing() -> None:
    cache = KVCache(40, SIZE)
    tokens = list(range(9))
    cached(cache, tokens)
    cached(cache, tokens, adapter_digest=b"a")
    cached(cache, tokens, adapter_digest=b"a", cache_salt="user")
    secret = list(range(50, 59))
    cached(cache, secret, cache_salt="user")
    assert cache.match(sequence(secret)) == 0
    for asked in ({"adapter_digest": b"b"}, {"cache_salt": "user"}, {"adapter_digest": b"b", "cache_salt": "user"}):
        assert cache.match(sequence(tokens, **asked)) == 0
    running, kept = sequence(tokens, adapter_digest=b"a"), sequence(tokens)
    assert cache.match(running) == 8
    cache.drop_adapter(b"a")
    cache.check_integrity([running])
    assert cache.match(sequence(tokens, adapter_digest=b"a")) == 0
    assert cache.match(sequence(tokens, adapter_digest=b"a", cache_salt="user")) == 0
    compute(cache, running)  # it goes on, but shares nothing any more
    cache.release(running)
    cache.check_integrity([])
    assert cache.match(sequence(tokens, adapter_digest=b"a")) == 0
    assert cache.match(kept) == 8
    cache.release(kept)
    cache.reset_prefix_cache()
    cache.check_integrity([])
    assert cache.match(sequence(tokens)) == 0
    assert cache.num_free_pages == 39


def test_whoever_must_compute_every_token_finds_nothing_but_leaves_its_pages() -> None:
    cache = KVCache(20, SIZE)
    first = sequence(list(range(9)))
    first.use_prefix_cache = False
    for _ in range(2):
        assert cache.match(first) == 0
        compute(cache, first)
        cache.release(first)
    assert cache.match(sequence(list(range(9)))) == 8
    assert KVCache(20, SIZE, prefix_caching=False).match(sequence(list(range(9)))) == 0


def test_the_longest_unused_is_forgotten_first_and_ends_before_beginnings() -> None:
    cache = KVCache(7, SIZE)
    old, new = list(range(9)), list(range(100, 109))
    cached(cache, old)
    cached(cache, new)  # 4 idle pages, 2 free
    greedy = sequence([7] * 12)
    assert cache.reserve(greedy, 12)
    cache.check_integrity([greedy])
    again = sequence(old)
    assert cache.match(again) == 4  # the end of the old one went
    cache.release(again)
    again = sequence(new)
    assert cache.match(again) == 8
    cache.release(again)
    assert cache.reserve(greedy, 24)
    cache.check_integrity([greedy])
    assert cache.match(sequence(new)) == 0


def test_the_same_page_computed_twice_is_kept_once() -> None:
    cache = KVCache(20, SIZE)
    a, b = sequence(list(range(10))), sequence(list(range(10)))
    for seq in (a, b):
        cache.reserve(seq, 10)
    compute(cache, a)
    own = b.pages[2]
    compute(cache, b)
    assert b.pages == [*a.pages[:2], own]
    assert cache.num_free_pages == 19 - 4
    cache.check_integrity([a, b])
    cache.release(a)
    cache.check_integrity([b])


def test_drafts_are_not_shared_and_their_pages_come_back() -> None:
    cache = KVCache(20, SIZE)
    seq = sequence([1, 2, 3, 4, 5, 6])
    seq.drafts = [7, 8, 9, 10]
    assert cache.reserve(seq, 10)
    seq.num_computed_tokens = 6
    seq.token_ids.append(70)
    cache.commit(seq)
    cache.trim(seq)
    assert len(seq.pages) == 2
    cache.check_integrity([seq])
    assert cache.match(sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])) == 4


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_answers_to_one_prompt_share_its_full_pages(prefix_caching) -> None:
    cache = KVCache(20, SIZE, prefix_caching=prefix_caching)
    request = Request(0, list(range(10)), SamplingParams(n=3))
    leader, *others = (sequence(list(range(10)), request=request) for _ in range(3))
    compute(cache, leader)
    leader.token_ids += [50, 51, 52]
    compute(cache, leader)
    others[0].use_prefix_cache = False  # its prompt's log-probabilities are wanted
    assert cache.admit(others[0], leader, 64, 0) == 0
    assert others[0].num_computed_tokens == 0
    for other in others:
        assert cache.fork(leader, other) == 8 == other.num_computed_tokens
        other.token_ids.append(60)
        compute(cache, other)
        assert other.pages[:2] == leader.pages[:2]
        assert other.pages[2] != leader.pages[2]
    cache.check_integrity([leader, *others])
    cache.release(leader)
    cache.check_integrity(others)
    for other in others:
        cache.release(other)
    cache.check_integrity([])
    assert cache.num_free_pages == 19


def test_a_window_gives_back_what_nobody_sees_any_more() -> None:
    cache = KVCache(8, SIZE, window=6)
    seq = sequence([])
    held = []
    for token in range(100):  # more tokens than the cache has room for
        seq.token_ids.append(token)
        assert cache.reserve(seq, token + 1)
        visible = range(max(0, token - 5), token + 1)  # a window of 6: itself and the 5 before it
        assert all(seq.pages[position // SIZE] != NULL_PAGE for position in visible)
        held.append(len(set(seq.pages) - {NULL_PAGE}))
        compute(cache, seq)
    assert max(held) == cache.pages_for(100, 1) == 3
    cache.check_integrity([seq])
    cache.release(seq)
    cache.check_integrity([])


def test_behind_a_window_pages_may_be_missing_but_nowhere_else() -> None:
    cache = KVCache(8, SIZE, window=6)
    tokens = list(range(40))
    first = sequence(tokens)
    for end in range(8, 48, 8):
        compute(cache, first, end)
    cache.release(first)
    cache.check_integrity([])  # 7 pages: the first of its 10 are gone
    seq, short = sequence([*tokens, 1]), sequence([*tokens[:8], 1])
    assert cache.match(seq) == 40
    assert seq.pages[:8] == [NULL_PAGE] * 8
    assert NULL_PAGE not in seq.pages[8:]
    cache.check_integrity([seq])
    compute(cache, seq)
    cache.check_integrity([seq])
    cache.release(seq)
    greedy = sequence([7] * 5)
    cache.reserve(greedy, 5)
    assert cache.match(short) == 0  # its pages are gone
    assert short.pages == []
    cache.check_integrity([greedy, short])


def test_no_sibling_where_the_window_has_moved_on() -> None:
    cache = KVCache(20, SIZE, window=5, prefix_caching=False)
    request = Request(0, list(range(10)), SamplingParams(n=3))
    leader, near, far = (sequence(list(range(10)), request=request) for _ in range(3))
    compute(cache, leader)
    assert cache.fork(leader, near) == 8
    assert near.pages == [NULL_PAGE, leader.pages[1]]
    leader.token_ids += range(50, 60)
    compute(cache, leader)
    assert cache.fork(leader, far) == 0
    cache.check_integrity([leader, near, far])


def test_the_check_sees_damage() -> None:
    def damaged() -> tuple[KVCache, Sequence]:
        cache = KVCache(9, SIZE)
        cached(cache, list(range(9)))
        seq = sequence(list(range(50, 59)))
        compute(cache, seq)
        cache.check_integrity([seq])
        return cache, seq

    cache, seq = damaged()
    with pytest.raises(AssertionError, match="lost"):
        cache.check_integrity([])
    seq.pages.append(seq.pages[0])
    with pytest.raises(AssertionError, match="holders counted"):
        cache.check_integrity([seq])
    cache, seq = damaged()
    cache._free.append(seq.pages[0])
    with pytest.raises(AssertionError, match="two states"):
        cache.check_integrity([seq])
    cache, seq = damaged()
    cache._node_of[seq.pages[0]] = None
    with pytest.raises(AssertionError, match="in the tree"):
        cache.check_integrity([seq])
    cache, seq = damaged()
    page, _ = cache._idle.popitem()
    cache._free.append(page)
    with pytest.raises(AssertionError, match="free page in the tree"):
        cache.check_integrity([seq])


PLANS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(1, 9)), min_size=1, max_size=60)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(plan=PLANS, window=st.sampled_from([None, 1, 3, 6, 13]), size=st.sampled_from([1, 2, 4]))
def test_any_order_of_operations_keeps_every_page_in_one_place(plan, window, size) -> None:
    """Operations on sequences of two letters, so that beginnings coincide; every page's content is checked, too."""
    cache = KVCache(9, size, window)
    live: list[Sequence] = []
    rows: dict[int, list[int]] = {page: [-1] * size for page in range(9)}

    def grow(seq: Sequence, count: int, letter: int) -> None:
        seq.token_ids += [letter % 2] * count
        if not cache.reserve(seq, len(seq.token_ids)):
            return
        for position in range(seq.num_computed_tokens, len(seq.token_ids)):
            page = seq.pages[position // size]
            assert cache._holders[page] == 1, "a shared page is written"
            rows[page][position % size] = seq.token_ids[position]
        seq.num_computed_tokens = len(seq.token_ids)
        cache.commit(seq)

    for what, which, count in plan:
        if what == 0 or not live:
            seq = sequence([which % 2] * count)
            cache.match(seq)
            live.append(seq)
        elif what in (1, 2, 3):
            grow(live[which % len(live)], count, what)
        elif what == 4:
            cache.release(live.pop(which % len(live)))
        elif count == 1:
            cache.reset_prefix_cache()
        cache.check_integrity(live)
        for seq in live:
            first = 0 if window is None else max(0, seq.num_computed_tokens - window + 1)
            seen = range(first, seq.num_computed_tokens)
            assert [rows[seq.pages[p // size]][p % size] for p in seen] == [seq.token_ids[p] for p in seen]
    for seq in live:
        cache.release(seq)
    cache.check_integrity([])
    assert cache.num_free_pages == 8
