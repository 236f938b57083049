"""Token ids back to text, at once or one by one, with the same result.

Three kinds of vocabulary need three kinds of care, resolved once from the tokenizer's decoder:

- byte-level BPE: a token is a few bytes; the text is the UTF-8 reading of all bytes in a row.
- byte fallback (sentencepiece): tokens such as `<0xE2>` are bytes among tokens that are text. The `tokenizers` library
  gives up a whole run of them when one byte is wrong; here, as in sentencepiece, only the wrong byte is lost.
- anything else: what the library's decoder says, which depends on the beginning of the text (leading spaces) and on
  the token before, no more.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer as Engine

from puna.base.console import PunaError
from puna.text.tiktoken import byte_alphabet

_BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "x"  # stands for "text came before" in front of a token, so that no leading-space rule touches it


class TextDecoder:
    """Ids to text for one tokenizer. Thread-safe: it holds no state of a text."""

    def __init__(self, engine: Engine, vocab_size: int, special_ids: Iterable[int]):
        self.engine = engine
        self.vocab_size = vocab_size
        self.special_ids = frozenset(special_ids)
        self.library = engine.decoder
        state = json.loads(self.library.__getstate__()) if self.library is not None else {}
        parts = [part["type"] for part in state.get("decoders", [state] if state else [])]
        self.is_byte_level = parts == ["ByteLevel"]
        self.has_byte_fallback = "ByteFallback" in parts

    def decode(self, ids: Sequence[int], skip_specials: bool) -> str:
        """The text of `ids`; PunaError when one is not in the vocabulary."""
        if not len(ids):
            return ""
        self.check(max(ids))  # the library would leave it out in silence
        if not self.has_byte_fallback:
            try:
                return self.engine.decode(ids, skip_special_tokens=skip_specials)
            except OverflowError:
                self.check(min(ids))
                raise
        buffer, pieces = bytearray(), []
        for token_id in ids:
            token = self.token(token_id, skip_specials)
            if token:
                pieces += resolve_bytes(token, buffer)
        return self.join([*pieces, *take_characters(buffer, final=True)])

    def check(self, token_id: int) -> None:
        """PunaError unless 0 <= token_id < vocab_size."""
        if not 0 <= token_id < self.vocab_size:
            raise PunaError(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size}",
                "are the ids from this tokenizer? A model's embedding may be padded beyond it: mask those logits",
            )

    def token(self, token_id: int, skip_specials: bool) -> str | None:
        """The token's spelling; None for one that shows nothing (skipped, or a hole in the vocabulary)."""
        self.check(token_id)
        return None if skip_specials and token_id in self.special_ids else self.engine.id_to_token(token_id)

    def join(self, tokens: list[str]) -> str:
        """Spellings -> text, by the library's decoder."""
        return self.library.decode(tokens) if self.library is not None else " ".join(tokens)


def resolve_bytes(token: str, buffer: bytearray) -> list[str]:
    """Replace byte tokens by the characters they complete; `buffer` carries the unfinished rest to the next call."""
    match = _BYTE_TOKEN.fullmatch(token)
    if match is None:
        return [*take_characters(buffer, final=True), token]
    buffer.append(int(match[1], 16))
    return take_characters(buffer, final=False)


def take_characters(buffer: bytearray, final: bool) -> list[str]:
    """Take whole characters off the front of `buffer`, U+FFFD for each byte that cannot be part of one.

    The beginning of a character at the end stays in the buffer, unless the text is `final`.
    """
    characters: list[str] = []
    while buffer:
        try:
            text = buffer.decode()
            buffer.clear()
        except UnicodeDecodeError as error:
            text = buffer[: error.start].decode()
            del buffer[: error.start]
            if error.reason == "unexpected end of data" and not final:
                return [*characters, *text]
            text += "\ufffd"
            del buffer[:1]
        characters += text
    return characters


class StreamDecoder:
    """Text of a growing list of ids: the pieces, joined, are exactly `decode` of all ids.

    A piece never ends inside a UTF-8 character. Each push costs the same, however long the text is.
    """

    def __init__(self, decoder: TextDecoder, skip_specials: bool = False):
        self._decoder = decoder
        self._skip_specials = skip_specials
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # byte-level vocabularies
        self._buffer = bytearray()  # byte fallback: the unfinished character
        self._window: list[str] = []  # the tokens whose text the next one may depend on
        self._is_started = False

    def push(self, token_id: int) -> str:
        """Add one id; return the text that is now certain (often one token's, sometimes "")."""
        token = self._decoder.token(token_id, self._skip_specials)
        if not token:
            return ""
        if self._decoder.is_byte_level:
            return self._utf8.decode(_spelled_bytes(token))
        if self._decoder.has_byte_fallback:
            return "".join(map(self._show, resolve_bytes(token, self._buffer)))
        return self._show(token)

    def flush(self) -> str:
        """End the text: whatever was held back comes out (U+FFFD for half a character)."""
        if self._decoder.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return "".join(map(self._show, take_characters(self._buffer, final=True)))

    def _show(self, token: str) -> str:
        join = self._decoder.join
        shown = len(join(self._window)) if self._is_started else 0
        text = join([*self._window, token])[shown:]
        if self._is_started or text:  # until something shows, a leading-space rule may still apply
            self._is_started = True
            self._window = [_ANCHOR, token]
        else:
            self._window.append(token)
        return text


def _spelled_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; an added token with characters outside the alphabet stands for itself."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
