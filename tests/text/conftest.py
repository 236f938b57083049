"""Small tokenizers, trained once per session from a few lines of text of our own."""

from __future__ import annotations

import base64
import random

import pytest

from puna.text.tiktoken import parse_ranks
from puna.text.train_tokenizer import train_bpe

SENTENCE = """
the llama walks over the high grass and the wind walks with it; I'm sure you're not, they'll say, it's 12345 or 3.14 of
them. A train has run through rain; running runs ran. Über naïve cafés, été, señor. 日本語 の テスト です。 東京 と 大阪
привет мир, как дела? 😀 🎉 don't can't won't == -- --- def f(x): return x + 1 # comment <b> & </b>
"""
WORDS = SENTENCE.split()


def corpus(lines: int = 1500, seed: int = 0) -> list[str]:
    """Random sentences over WORDS, the same on every run."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randrange(3, 14))) for _ in range(lines)]


@pytest.fixture(scope="session")
def texts():
    return corpus()


@pytest.fixture(scope="session")
def bpe(texts):
    return train_bpe(texts, 500)


@pytest.fixture(scope="session")
def sentencepiece_models(tmp_path_factory, texts):
    """name -> path of a trained sentencepiece model."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    llama = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    llama |= {"remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True}
    kinds = {
        "llama": llama,
        "llama_symbols": {**llama, "user_defined_symbols": ["<sep>", "[X]"], "control_symbols": ["<cls>"]},
        "gemma": {**llama, "add_dummy_prefix": False, "user_defined_symbols": ["▁▁", "▁▁▁", "\n"]},
        "t5": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "pad_id": 3},
        "unigram_bytes": {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": ["<sep>"]},
    }
    for name, options in kinds.items():
        spm.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"),
            model_prefix=str(folder / name),
            vocab_size=600 if "byte_fallback" in options else 330,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **options,
        )
    return {name: folder / f"{name}.model" for name in kinds}


@pytest.fixture(scope="session")
def tiktoken_file(tmp_path_factory, bpe):
    """A tiktoken file: the 256 bytes in order, then unions of two earlier tokens."""
    generator = random.Random(0)
    tokens = [bytes([byte]) for byte in range(256)]
    for text in [*corpus(200, seed=1), "aaaaaaaa ---- \n\n\n"]:
        data = text.encode()
        start = generator.randrange(len(data))
        while len(piece := data[start : start + 2]) == 2 and piece in tokens:
            start += 1
        tokens += [piece] if piece not in tokens else []
    tokens += [b"qzx", b" qzx"]  # no two of their parts are a token: only a whole word can become them
    while len(tokens) < 900:
        union = generator.choice(tokens[97:]) + generator.choice(tokens[97:])
        if len(union) <= 8 and union not in tokens:
            tokens.append(union)
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    assert parse_ranks(path.read_bytes()) == tokens
    return path
