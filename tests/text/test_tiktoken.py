from __future__ import annotations

import base64
import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.text.tiktoken import LLAMA3_PATTERN, convert_tiktoken, llama3_specials, parse_ranks
from puna.text.tokenizer import Tokenizer

tiktoken = pytest.importorskip("tiktoken")
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dense = st.text("ab -='\n\r\t sStT1é日\u0301.", max_size=40)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="session")
def pair(tiktoken_file):
    tokens = parse_ranks(tiktoken_file.read_bytes())
    specials = {text: len(tokens) + i for i, text in enumerate(llama3_specials())}
    ranks = {token: rank for rank, token in enumerate(tokens)}
    oracle = tiktoken.Encoding("oracle", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    return Tokenizer.load(tiktoken_file), oracle


@quick
@given(text=dense | anything)
def test_ids_equal_tiktoken(pair, text):
    ours, oracle = pair
    ids = oracle.encode(text, disallowed_special=())
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text


@quick
@given(ids=st.lists(st.integers(0, 1100), max_size=20))
def test_decode_equals_tiktoken_on_any_ids(pair, ids):
    ours, oracle = pair
    assert ours.decode(ids) == oracle.decode(ids, errors="replace")


def test_ids_equal_tiktoken_on_words(pair, texts):
    ours, oracle = pair
    for text in texts[:300]:
        assert ours.encode(text) == oracle.encode(text)


def test_a_whole_word_that_no_merge_reaches(pair):
    ours, oracle = pair
    text = "qzx qzx qzxq"
    assert ours.encode(text) == oracle.encode(text)
    assert len(ours.encode("qzx qzx")) == 2


def test_special_tokens_follow_the_ranks(pair):
    ours, oracle = pair
    assert ours.specials == oracle._special_tokens
    assert len(ours.specials) == 256
    assert ours.vocab_size == oracle.n_vocab
    base = ours.bos_id
    names = {"<|end_of_text|>": 1, "<|finetune_right_pad_id|>": 4, "<|start_header_id|>": 6, "<|end_header_id|>": 7}
    names |= {"<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10, "<|reserved_special_token_245|>": 255}
    for text, offset in names.items():
        assert ours.specials[text] == base + offset
    assert ours.eos_ids == [base + 1, base + 8, base + 9]
    text = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    assert ours.encode(text, specials=True) == oracle.encode(text, allowed_special="all")
    assert ours.encode(text) == oracle.encode(text, disallowed_special=())


def test_128k_tokens_convert_in_seconds():
    generator = random.Random(0)
    unions = {generator.randbytes(generator.randrange(2, 10)) for _ in range(133_000)}
    tokens = [*(bytes([byte]) for byte in range(256)), *sorted(unions)][:128_000]
    data = b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    start = time.perf_counter()
    engine, _, _ = convert_tiktoken(data)
    assert time.perf_counter() - start < 10  # about 1 s on an idle core
    assert engine.token_to_id("<|begin_of_text|>") == 128_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:300], b"%%% 300"], "line 301 of 301"),
        (lambda lines: lines[:300] + lines[301:], "rank 300 is missing"),
        (lambda lines: lines[:200], "200 of the 256"),
        (lambda lines: [*lines, lines[300].split()[0] + b" %d" % len(lines)], "1 of .* twice"),
    ],
)
def test_broken_files_are_named_with_numbers(tiktoken_file, change, message):
    with pytest.raises(PunaError, match=message):
        parse_ranks(b"\n".join(change(tiktoken_file.read_bytes().splitlines())))
