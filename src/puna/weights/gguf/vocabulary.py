"""The tokenizer that a GGUF file describes: from the tokenizer.json it may carry, else from llama.cpp's own keys."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from puna.base.console import PunaError
from puna.text.sentencepiece import BPE, CONTROL, NORMAL, UNUSED, USER_DEFINED, convert_sentencepiece, start_with
from puna.text.tiktoken import LLAMA3_PATTERN
from puna.text.tokenizer import Settings, Tokenizer

QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = {LLAMA3_PATTERN: "llama-bpe", QWEN2_PATTERN: "qwen2"}  # how text is cut into words -> llama.cpp's name of it
# Other names of the same ways to cut text into words.
_SAME_PRE = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
             "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "phi-2": "gpt-2", "mpt": "gpt-2", "olmo": "gpt-2",
             "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "codeshell": "smollm"}  # fmt: skip
IGNORES_MERGES = ("llama-bpe",)  # a word that is a token is taken as it is
IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a file's metadata, chat template included.

    Errors: PunaError when there is none, or one of a kind that puna does not read.
    """
    text = metadata.get("tokenizer.huggingface.json")
    if text is not None:
        return Tokenizer(_open(text), _settings(metadata), text)
    kind = metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind not in ("gpt2", "llama"):
        raise PunaError(f"the file's tokenizer is of kind {kind!r}", "puna reads gpt2 and llama; give --tokenizer DIR")
    engine = _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata)
    settings = _settings(metadata)
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in settings.names:
        start_with(engine, settings.names["bos_token"])
    return Tokenizer(engine, settings)


def _open(text: str) -> Engine:
    try:
        return Engine.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise PunaError(f"the tokenizer.json in the file is broken: {error}", "fetch the file again") from error


def _settings(metadata: Mapping[str, Any]) -> Settings:
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: metadata.get(f"tokenizer.ggml.{part}_token_id") for name, part in IDS.items()}
    names = {name: tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    ends = [metadata.get(f"tokenizer.ggml.{part}_token_id") for part in ("eot", "eom")]
    ends = [*metadata.get("puna.stop_token_ids", []), *ends]
    stops = [int(i) for i in dict.fromkeys(ends) if i is not None and i != ids["eos_token"]]
    return Settings(names, stops, metadata.get("tokenizer.chat_template"))


def _table(metadata: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(token, type) of each id."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise PunaError("the file has a tokenizer without tokens", "fetch the file again")
    types = metadata.get("tokenizer.ggml.token_type")
    kinds = [NORMAL] * len(tokens) if types is None else types.tolist()
    if len(kinds) != len(tokens):
        raise PunaError(f"{len(kinds)} types for {len(tokens)} tokens in the file", "fetch the file again")
    return list(zip(tokens, kinds, strict=True))


def _byte_level(metadata: Mapping[str, Any]) -> Engine:
    table = _table(metadata)
    pre = metadata.get("tokenizer.ggml.pre", "default")
    pre = _SAME_PRE.get(pre, pre)
    vocabulary = {token: i for i, (token, kind) in enumerate(table) if not _fills(token, i, kind)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    try:
        engine = Engine(models.BPE(vocabulary, merges, ignore_merges=pre in IGNORES_MERGES))
    except Exception as error:  # a merge of tokens that are not there
        raise PunaError(
            f"the file's {len(merges)} merges do not fit its vocabulary: {error}", "fetch it again"
        ) from error
    engine.pre_tokenizer = _words(pre)
    engine.normalizer = normalizers.NFC() if pre == "qwen2" else None
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in table if kind == CONTROL])
    engine.add_tokens([AddedToken(t, normalized=False) for t, kind in table if kind == USER_DEFINED])
    return engine


def _fills(token: str, token_id: int, kind: int) -> bool:
    """Whether this is no token at all, but the name of a row of the embedding that has none."""
    return kind == UNUSED and token == f"[PAD{token_id}]"


def _words(pre: str) -> pre_tokenizers.PreTokenizer:
    pattern = next((pattern for pattern, name in PATTERNS.items() if name == pre), None)
    if pattern is not None:
        cut, letters = (
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        )
        return pre_tokenizers.Sequence([cut, letters])
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(False)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    known = ", ".join([*dict.fromkeys(PATTERNS.values()), "gpt-2", "smollm"])
    raise PunaError(
        f"the file cuts text into words by llama.cpp's rule {pre!r}, which puna does not know (it knows {known})",
        "give the tokenizer of the model's Hugging Face folder (--tokenizer DIR)",
    )


def _sentencepiece(metadata: Mapping[str, Any]) -> Engine:
    """By way of sentencepiece's own file: `text.sentencepiece` then does the rest."""
    table, scores = _table(metadata), metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(table) or len({*scores.tolist()}) < 3 <= len(table):
        raise PunaError(
            "the file's tokens have no scores of their own, so their order of merging is unknown",
            "give the tokenizer of the model's Hugging Face folder (--tokenizer DIR)",
        )
    pieces = [(token, float(score), kind) for (token, kind), score in zip(table, scores, strict=True)]
    while pieces and _fills(pieces[-1][0], len(pieces) - 1, pieces[-1][2]):
        pieces.pop()
    engine, _ = convert_sentencepiece(_model_proto(pieces, bool(metadata.get("tokenizer.ggml.add_space_prefix", True))))
    return engine


def _model_proto(pieces: list[tuple[str, float, int]], add_prefix: bool) -> bytes:
    """sentencepiece's file: pieces (field 1), how they were trained (2), how text is normalized (3)."""
    parts = []
    for text, score, kind in pieces:
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
        parts.append(_field(1, piece))
    trainer = _field(3, BPE) + _field(35, 1)
    normalizer = _field(3, int(add_prefix)) + _field(4, 0)
    return b"".join(parts) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: an integer (wire type 0) or bytes (wire type 2)."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
