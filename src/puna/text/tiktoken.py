"""Llama 3's tiktoken files (`base64-of-a-token rank` lines) as a `tokenizers.Tokenizer` with the same ids.

tiktoken joins the neighbours whose union has the lowest rank, whatever its halves, and takes a whole word that is a
token as it is. Every split of every token, in order of rank, plus `ignore_merges`, does the same in `tokenizers`.
"""

from __future__ import annotations

import base64
import binascii
import re

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from puna.base.console import PunaError
from puna.text.sentencepiece import ranked_merges, start_with

# Llama 3's split of text into words. Source: llama-models, models/llama3/tokenizer.py.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_COUNT = 256
_NAMED = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id"),
    *("eom_id", "eot_id", "python_tag", "image"),
)
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)")


def llama3_specials() -> list[str]:
    """Llama 3.1's 256 special tokens in id order; the first follows the last ranked token."""
    reserved = [f"reserved_special_token_{i + 2}" for i in range(SPECIAL_COUNT - len(_NAMED))]
    return [f"<|{name}|>" for name in (*_NAMED, *reserved)]


def byte_alphabet() -> list[str]:
    """The printable stand-in of each byte value in byte-level BPE files: itself, or U+0100 onwards. Source: GPT-2."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]


def looks_like_tiktoken(data: bytes) -> bool:
    """Whether the first line is a `base64 rank` line."""
    return _LINE.fullmatch(data[:4096].split(b"\n", 1)[0].strip()) is not None


def parse_ranks(data: bytes) -> list[bytes]:
    """The tokens in order of rank. PunaError when a line is not whole or the ranks leave a gap."""
    ranks: dict[int, bytes] = {}
    lines = [line.strip() for line in data.splitlines()]
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        try:
            if match is None:
                raise ValueError
            ranks[int(match[2])] = base64.b64decode(match[1], validate=True)
        except (ValueError, binascii.Error):
            raise _broken(f"line {number} of {len(lines)} is not `base64 rank`: {line[:40]!r}") from None
    missing = next((rank for rank in range(len(ranks)) if rank not in ranks), None)
    if missing is not None:
        raise _broken(f"rank {missing} is missing, the highest of {len(ranks)} is {max(ranks)}")
    tokens = [ranks[rank] for rank in range(len(ranks))]
    if len(set(tokens)) < len(tokens):
        raise _broken(f"{len(tokens) - len(set(tokens))} of {len(tokens)} tokens appear twice")
    single = sum(len(token) == 1 for token in tokens)
    if single != 256:
        raise _broken(f"{single} of the 256 single bytes have a rank, so some text could not be encoded")
    return tokens


def _broken(message: str) -> PunaError:
    return PunaError(f"the tiktoken file is broken: {message}", "download the file again; it may be cut short")


def convert_tiktoken(data: bytes) -> tuple[Engine, dict[str, str], list[int]]:
    """A tiktoken file's bytes -> (engine with the same ids, names of special tokens, ids that end an answer)."""
    alphabet = byte_alphabet()
    tokens = ["".join(map(alphabet.__getitem__, token)) for token in parse_ranks(data)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    engine = byte_level_engine(models.BPE(ranks, ranked_merges(tokens, ranks), ignore_merges=True))
    specials = llama3_specials()
    engine.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    names = {"bos_token": specials[0], "eos_token": specials[1], "pad_token": "<|finetune_right_pad_id|>"}
    start_with(engine, names["bos_token"])
    stops = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    return engine, names, [len(tokens) + specials.index(text) for text in stops]


def byte_level_engine(model: models.BPE) -> Engine:
    """An engine for byte-level BPE with Llama 3's words."""
    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    return engine
