"""weights/gguf/tokenizer.py: tokenizers into GGUF metadata and back with the same ids, which are llama.cpp's as well."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.text.tiktoken import LLAMA3_PATTERN, byte_alphabet, byte_level_engine
from puna.text.tokenizer import Settings, Tokenizer
from puna.text.train_tokenizer import CHATML, train_bpe
from puna.weights.gguf.file import GgufFile
from puna.weights.gguf.model import save_gguf
from puna.weights.gguf.tokenizer import tokenizer_metadata, tokenizer_of
from puna.weights.gguf.vocabulary import QWEN2_PATTERN

WORDS = [
    "the",
    "llama",
    "walks",
    "over",
    "the",
    "high",
    "grass",
    "and",
    "I'm",
    "sure",
    "you're",
    "not,",
    "they'LL",
    "say",
    "it's",
    "12345",
    "or",
    "3.14",
    "of",
    "them;",
    "Über",
    "naïve",
    "cafés,",
    "été,",
    "señor.",
    "日本語",
    "の",
    "テスト",
    "です。",
    "東京",
    "привет",
    "мир,",
    "как",
    "дела?",
    "😀",
    "🎉",
    "don't",
    "won't",
    "==",
    "--",
    "---",
    "def",
    "f(x):",
    "return",
    "x+1\n\tif",
    "a:\n\t\tprint(",
    "'b'",
    ")\n\n\n#",
    "<b>",
    "&",
    "</b>",
    "x\u200dy",
    "ا",
    "ل",
    "ع",
    "ر",
    "ب",
    "ي",
    "ة",
    "हिन्दी",
    "12",
    "1234",
    "1234567",
    "a_b_c",
    "CamelCase",
]
TEXTS = [
    "",
    " ",
    "   ",
    "a",
    " leading and trailing  ",
    "I'm you'RE 12345678 x\n\n  y\r\n\tz\n",
    "<|im_end|> <s> </s> <unk> <|eot_id|><sep>[X] <0x0A>",
    "日本語のテスト😀🎉 é e\u0301 \u00a0\u2003 ก็ \U00020000 \x00 \x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!?????",
    "▁ is a letter ▁▁ here",
]


def corpus(lines: int = 1200) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(3, 14))) for _ in range(lines)]


def texts() -> list[str]:
    draw = random.Random(1)
    letters = "".join(WORDS) + "  \n\t'’\"0123456789<|>_-" + "àß€ﬁΩ中文한글"
    noise = ["".join(draw.choices(letters, k=draw.randrange(1, 60))) for _ in range(120)]
    return [*TEXTS, *corpus(60), *noise]


def trained(cut: list, normalizer=None, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE with this way to cut text into words; special tokens behind the ordinary ones, as Llama 3 has."""
    engine = Engine(models.BPE(ignore_merges=ignore_merges))
    engine.pre_tokenizer = pre_tokenizers.Sequence(cut) if len(cut) > 1 else cut[0]
    engine.normalizer, engine.decoder = normalizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=byte_alphabet(), show_progress=False)
    engine.train_from_iterator(corpus(), trainer=trainer)
    if ignore_merges:  # as in Llama 3's file: words that no merges lead to
        state = json.loads(engine.to_str())
        state["model"]["merges"] = state["model"]["merges"][:-40]
        engine = Engine.from_str(json.dumps(state))
    engine.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<|begin|>", "<|im_end|>", "<|eot_id|>")]
    )
    engine.add_tokens([AddedToken("<think>", normalized=False), AddedToken("12345", normalized=False)])
    stops = [engine.token_to_id("<|eot_id|>")]
    return Tokenizer(engine, Settings({"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}, stops, CHATML))


def split(pattern: str) -> list:
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


def sentencepiece(folder: Path, name: str, **options) -> Tokenizer:
    spm = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    fixed = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True}
    fixed |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "hard_vocab_limit": False}
    spm.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / name),
        vocab_size=700,
        num_threads=1,
        minloglevel=2,
        **{**fixed, **options},
    )
    return Tokenizer.load(folder / f"{name}.model")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "puna": train_bpe(corpus(), 500),
        "llama3": trained(split(LLAMA3_PATTERN), ignore_merges=True),
        "qwen2": trained(split(QWEN2_PATTERN)),
        "qwen2_nfc": trained(split(QWEN2_PATTERN), normalizers.NFC()),
        "gpt2": trained([pre_tokenizers.ByteLevel(False)]),
        "smollm": trained([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
        "llama": sentencepiece(folder, "llama"),
        "no_prefix": sentencepiece(folder, "gemma", add_dummy_prefix=False),
    }


KINDS = ["puna", "llama3", "qwen2", "qwen2_nfc", "gpt2", "smollm", "llama", "no_prefix"]
PRE = {
    "puna": "llama-bpe",
    "llama3": "llama-bpe",
    "qwen2_nfc": "qwen2",
    "gpt2": "gpt-2",
    "llama": "default",
    "no_prefix": "default",
}


def written(tokenizer: Tokenizer, path: Path, rows: int = 0) -> GgufFile:
    """A tiny model with this tokenizer, as a file; `rows` more of the embedding have no token."""
    spec = Spec.preset("debug").replace(vocab_size=tokenizer.vocab_size + rows)
    save_gguf(path, spec, lambda name: torch.zeros(shapes(spec)[name]), tokenizer, "F32")
    return GgufFile(path)


def shapes(spec: Spec) -> dict:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(spec).named_parameters()}


@pytest.mark.parametrize("source", ["tokenizer.json", "llama.cpp's keys"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_comes_back(kinds, kind, source, tmp_path) -> None:
    tokenizer = kinds[kind]
    metadata = written(tokenizer, tmp_path / "m.gguf", rows=9).metadata
    assert metadata["tokenizer.ggml.pre"] == PRE.get(kind, kind)
    assert len(metadata["tokenizer.ggml.tokens"]) == tokenizer.vocab_size + 9
    if source != "tokenizer.json":
        del metadata["tokenizer.huggingface.json"]
    again = tokenizer_of(metadata)
    for text in texts():
        if kind == "qwen2" and source != "tokenizer.json" and normalizers.NFC().normalize_str(text) != text:
            continue  # llama.cpp's keys do not say whether text is normalized; Qwen's own tokenizers do it
        for specials in (False, True):
            ids = tokenizer.encode(text, specials=specials)
            assert again.encode(text, specials=specials) == ids
            assert again.decode(ids) == tokenizer.decode(ids)
    assert (again.vocab_size, again.chat_template) == (tokenizer.vocab_size, tokenizer.chat_template)
    assert (again.bos_id, again.eos_ids, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id)
    assert again.token_names == tokenizer.token_names
    assert again.specials == tokenizer.specials
    assert again.added == tokenizer.added
    assert again.encode("a", bos=True) == tokenizer.encode("a", bos=True)


@pytest.fixture(scope="module")
def llama_cpp_ids(kinds, tmp_path_factory) -> dict[str, dict]:
    if find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp comes with the xllamacpp wheel")
    folder = tmp_path_factory.mktemp("files")
    jobs = []
    for kind, tokenizer in kinds.items():
        written(tokenizer, folder / f"{kind}.gguf", rows=3)
        jobs.append({"file": str(folder / f"{kind}.gguf"), "texts": texts()})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(kinds, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_same_ids(kinds, llama_cpp_ids, kind) -> None:
    found = llama_cpp_ids[kind]
    assert "error" not in found, found["log"]
    for i, text in enumerate(texts()):
        if kind == "qwen2_nfc" and normalizers.NFC().normalize_str(text) != text:
            continue  # the known difference
        assert found["ids"][i] == kinds[kind].encode(text), text
        assert found["parsed"][i] == kinds[kind].encode(text, specials=True), text


# --- what cannot be ---------------------------------------------------------------------------------------------------


def changed(tokenizer: Tokenizer, change) -> Tokenizer:
    state = json.loads(tokenizer.to_json())
    change(state)
    return Tokenizer(Engine.from_str(json.dumps(state)))


def no_merges(state: dict) -> None:
    """Ten tokens that no merges lead to, taken as whole words by a rule that llama.cpp knows under another name."""
    state["model"]["merges"] = state["model"]["merges"][:-10]
    state["model"]["ignore_merges"] = True


CHANGES = {
    "a way that llama.cpp has no name for": (
        "puna",
        lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\w+|\W"}),
    ),
    r"no name for \(Split \+ ByteLevel\)": (
        "puna",
        lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    ),
    r"no name for \(NFKC \+ Split": ("puna", lambda s: s.update(normalizer={"type": "NFKC"})),
    r"'<\|eos\|>' swallows spaces": ("puna", lambda s: s["added_tokens"][1].update(lstrip=True)),
    "no merges lead to its token": ("gpt2", no_merges),
    "its BPE has a dropout": ("puna", lambda s: s["model"].update(dropout=0.5)),
    "normalizes text by Lowercase": ("llama", lambda s: s.update(normalizer={"type": "Lowercase"})),
    "are not the .* that its vocabulary implies": (
        "llama",
        lambda s: s["model"].update(merges=s["model"]["merges"][:-1]),
    ),
    "merges do not lead to": ("llama", lambda s: s["model"].update(merges=s["model"]["merges"][1:])),
    r"does not \(Metaspace\)": (
        "llama",
        lambda s: s.update(
            pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        ),
    ),
}


@pytest.mark.parametrize("match", CHANGES)
def test_tokenizers_that_llama_cpp_would_not_follow(kinds, match) -> None:
    kind, change = CHANGES[match]
    tokenizer_metadata(kinds[kind], kinds[kind].vocab_size)
    with pytest.raises(PunaError, match=match) as error:
        tokenizer_metadata(changed(kinds[kind], change), kinds[kind].vocab_size)
    assert "--no-tokenizer" in error.value.hint


def test_other_kinds(kinds, tmp_path) -> None:
    with pytest.raises(PunaError, match="is WordLevel, not BPE"):
        tokenizer_metadata(Tokenizer(Engine(models.WordLevel({"a": 0}, "a"))), 10)
    with pytest.raises(PunaError, match="is Unigram, not BPE"):
        tokenizer_metadata(sentencepiece(tmp_path, "u", model_type="unigram"), 1000)
    with pytest.raises(PunaError, match="user-defined symbols"):
        tokenizer_metadata(sentencepiece(tmp_path, "s", user_defined_symbols=["<sep>"]), 1000)
    plain = byte_level_engine(models.BPE({"a": 0}, []))
    with pytest.raises(PunaError, match="255 of the 256 bytes"):
        tokenizer_metadata(Tokenizer(plain), 10)
    with pytest.raises(PunaError, match="the tokenizer has 500 tokens, the model only 499"):
        tokenizer_metadata(kinds["puna"], 499)


def test_a_rule_of_another_name_is_fine_where_it_changes_no_id(kinds) -> None:
    """Every token is reached by merges, so taking whole words first or not is the same."""
    tokenizer = changed(kinds["gpt2"], lambda state: state["model"].update(ignore_merges=True))
    assert tokenizer_metadata(tokenizer, tokenizer.vocab_size)["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("gpt2", {"tokenizer.ggml.pre": "deepseek-llm"}, "rule 'deepseek-llm'"),
        ("gpt2", {"tokenizer.ggml.model": "bert"}, "of kind 'bert'"),
        ("gpt2", {"tokenizer.ggml.model": None}, "of kind 'no_vocab'"),
        ("gpt2", {"tokenizer.ggml.tokens": None}, "without tokens"),
        ("gpt2", {"tokenizer.ggml.token_type": np.zeros(3, np.int32)}, "3 types for"),
        ("gpt2", {"tokenizer.ggml.merges": ["qqqq zzzz"]}, "1 merges do not fit"),
        ("llama", {"tokenizer.ggml.scores": None}, "no scores of their own"),
        ("llama", {"tokenizer.ggml.scores": np.full(700, -1000.0, np.float32)}, "no scores of their own"),
    ],
)
def test_files_whose_tokenizer_puna_cannot_read(kinds, kind, changes, match) -> None:
    metadata = {**tokenizer_metadata(kinds[kind], 700), **changes}
    del metadata["tokenizer.huggingface.json"]
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"])
    metadata["tokenizer.ggml.scores"] = (
        None if metadata.get("tokenizer.ggml.scores") is None else np.array(metadata["tokenizer.ggml.scores"])
    )
    with pytest.raises(PunaError, match=match):
        tokenizer_of({key: value for key, value in metadata.items() if value is not None})


def test_a_broken_tokenizer_json(kinds) -> None:
    with pytest.raises(PunaError, match=r"the tokenizer.json in the file is broken"):
        tokenizer_of({"tokenizer.huggingface.json": "{}"})


def test_a_file_without_a_tokenizer(tmp_path) -> None:
    spec = Spec.preset("debug")
    save_gguf(tmp_path / "m.gguf", spec, lambda name: torch.zeros(shapes(spec)[name]), None, "F32")
    with pytest.raises(PunaError, match="no_vocab"):
        tokenizer_of(GgufFile(tmp_path / "m.gguf").metadata)
