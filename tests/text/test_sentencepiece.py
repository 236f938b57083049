from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.text.sentencepiece import convert_sentencepiece, parse_model, read_fields
from puna.text.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece")
quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BPE_KINDS = ["llama", "llama_symbols", "gemma"]
ALL_KINDS = [*BPE_KINDS, "t5", "unigram_bytes"]
dense = st.text("ab -='\n\t sS1é日\u0301.<>/▁X[]", max_size=30)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
CASES = [
    *("", "a", " ", "   ", " a", "a ", "  two  words  ", "I'm you're DON'T", "12345 3.14", "😀 👨\u200d👩\u200d👧 ok"),
    *(
        "naïve café",
        "e\u0301 a\u0308\u0301",
        "日本語 テスト",
        "\n",
        "\n\n",
        "a\nb\n",
        "\t\tx",
        "ｆｕｌｌ ﬁ ①",
        "\u2116\u0368 x",
    ),
    *("e\u0302\u0301", "<s> </s> <unk> <0x41> x", "<s>", "</s>", "<0x0A>", "aaaaaaaaaaa", "--------", "\u200b a"),
    *("가각 \u1100\u1161", "ก็ สวัสดี", "\u3000x\u3000", "a\u0300\u0301\u0302", "नमस्ते", "x<sep>y <sep> z", "<sep>"),
    *(" <sep> [X]", "[X][X]", "<cls>", "～ ~", "\ufb03\r\nx"),
]


@pytest.fixture(scope="session")
def pairs(sentencepiece_models):
    """kind -> (ours, the sentencepiece library's)."""
    return {
        kind: (Tokenizer.load(path), spm.SentencePieceProcessor(model_file=str(path)))
        for kind, path in sentencepiece_models.items()
    }


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_ids_equal_sentencepiece(pairs, kind, texts):
    ours, oracle = pairs[kind]
    for text in [*CASES, *texts[:300], "\n".join(texts[:20])]:
        assert ours.encode(text) == oracle.encode(text), repr(text)


@pytest.mark.parametrize("kind", BPE_KINDS)
@quick
@given(text=dense | anything)
def test_bpe_ids_equal_sentencepiece_on_any_text(pairs, kind, text):
    ours, oracle = pairs[kind]
    assert ours.encode(text) == oracle.encode(text)


@pytest.mark.parametrize("kind", ["t5", "unigram_bytes"])
@quick
@given(words=st.lists(st.text("thelamwind<s>/0x41 .,\n日é😀", max_size=8), max_size=6))
def test_unigram_ids_equal_sentencepiece(pairs, kind, words):
    """Two cuts of equal score may differ (float32 there, float64 here): then compare what they are worth."""
    ours, oracle = pairs[kind]
    text = " ".join(words)
    expected, got = oracle.encode(text), ours.encode(text)
    if expected != got:
        worth = [sum(oracle.get_score(i) for i in ids) for ids in (expected, got)]
        assert worth[0] == pytest.approx(worth[1], abs=1e-4), (expected, got)
        assert oracle.decode(expected) == oracle.decode(got)


@pytest.mark.parametrize("kind", BPE_KINDS)
@quick
@given(text=anything)
def test_decode_equals_sentencepiece(pairs, kind, text):
    ours, oracle = pairs[kind]
    ids = oracle.encode(text)
    assert ours.decode(ids) == oracle.decode(ids)


@quick
@given(values=st.lists(st.integers(0, 255), max_size=12))
def test_decode_of_invalid_bytes_equals_sentencepiece(pairs, values):
    ours, oracle = pairs["llama"]
    ids = [oracle.piece_to_id("▁the"), *(oracle.piece_to_id(f"<0x{value:02X}>") for value in values)]
    assert ours.decode(ids) == oracle.decode(ids)


def test_special_ids(pairs):
    for ours, oracle in pairs.values():
        assert ours.bos_id == oracle.bos_id()
        assert ours.eos_ids == [oracle.eos_id()]
        assert ours.vocab_size == oracle.vocab_size()
    assert pairs["t5"][0].pad_id == 3
    assert pairs["llama"][0].pad_id is None
    assert pairs["llama_symbols"][0].specials["<cls>"] == pairs["llama_symbols"][1].piece_to_id("<cls>")


def test_parsed_model_says_what_the_trainer_was_told(sentencepiece_models):
    llama, t5 = (parse_model(sentencepiece_models[kind].read_bytes()) for kind in ("llama", "t5"))
    assert (llama.model_type, llama.byte_fallback, llama.charsmap) == (2, True, b"")
    assert (llama.add_dummy_prefix, llama.remove_extra_whitespaces) == (True, False)
    assert (t5.model_type, t5.byte_fallback, t5.remove_extra_whitespaces) == (1, False, True)
    assert t5.ids == {"unk_token": 0, "bos_token": 1, "eos_token": 2, "pad_token": 3}
    assert len(t5.charsmap) > 100_000


def test_every_cut_of_the_file_is_an_error(sentencepiece_models):
    data = sentencepiece_models["llama"].read_bytes()
    trainer = data.index(b"corpus.txt")
    for length in [*range(0, 40), *range(trainer, trainer + 40), len(data) // 2]:
        with pytest.raises(ValueError):
            convert_sentencepiece(data[:length])


def test_unknown_characters_of_a_special_spelling_are_one_unknown(texts, tmp_path):
    lines = [text.translate({ord(c): None for c in "<>/"}) for text in texts[:500]]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "m"), vocab_size=110, minloglevel=2
    )
    ours, oracle = Tokenizer.load(tmp_path / "m.model"), spm.SentencePieceProcessor(str(tmp_path / "m.model"))
    for text in ("<s> </s> <unk>", "</s>", "a</s>b"):
        assert ours.encode(text) == oracle.encode(text)


def test_wire_reader():
    assert list(read_fields(b"\x08\x96\x01\x12\x02hi\x1d\0\0\0\0")) == [(1, 150), (2, b"hi"), (3, b"\0\0\0\0")]
    for broken in (b"\x08", b"\x08\xff", b"\x12\x05hi", b"\x0b", b"\x08" + b"\xff" * 11):
        with pytest.raises(ValueError):
            list(read_fields(broken))


def test_unsupported_kinds_are_refused(tmp_path, texts):
    (tmp_path / "corpus.txt").write_text("\n".join(texts[:200]), encoding="utf-8")
    for options in ({"model_type": "char"}, {"model_type": "bpe", "treat_whitespace_as_suffix": True}):
        spm.SentencePieceTrainer.train(
            input=str(tmp_path / "corpus.txt"),
            model_prefix=str(tmp_path / "m"),
            vocab_size=150,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        with pytest.raises(PunaError, match=r"support|spaces after"):
            Tokenizer.load(tmp_path / "m.model")
