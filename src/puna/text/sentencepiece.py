"""SentencePiece `.model` files as a `tokenizers.Tokenizer` with the same ids; the sentencepiece library is not needed.

A file is one protobuf message: the pieces (text, score, type) in id order, how they were trained and how text is
normalized. The two libraries differ in four places, and each is met by plain parts of `tokenizers`, so that the result
still saves as an ordinary tokenizer.json:

- BPE: sentencepiece keeps no merge list; it joins the neighbours whose union is the best-scored piece. Listing every
  split of every piece in order of score gives the same joins.
- Unigram: `tokenizers` would find control and byte pieces (`<s>`, `<0x0A>`) inside plain text. A cut inside each of
  their spellings, at a place no ordinary piece crosses, prevents that.
- User-defined symbols are found before anything else, wherever they stand.
- Words: when no piece reaches across a space, cutting before each space changes no id and lets the library cache words.

Source: sentencepiece_model.proto, normalizer.cc, bpe_model.cc, unigram_model.cc (behaviour only).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

from puna.base.console import PunaError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
SPACE = "▁"  # how sentencepiece spells a space
_TILDE, _HIDDEN = "\uff5e", "\ufdd0"  # fullwidth tilde; a noncharacter, which is in no text and no table


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a ModelProto that decide ids: `pieces` are (text, score, type) in id order."""

    pieces: list[tuple[str, float, int]]
    model_type: int
    byte_fallback: bool
    ids: dict[str, int]  # unk_token, bos_token, eos_token, pad_token -> id, -1 for none
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    def texts(self, *types: int) -> list[str]:
        """Texts of all pieces of these types, in id order."""
        return [text for text, _, kind in self.pieces if kind in types]


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one protobuf message: varints as int, everything else as its bytes.

    Raises ValueError where the bytes are not a whole message. Source: protobuf encoding guide, "Message Structure".
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position} of {len(data)}")
        if number == 0 or position + length > len(data):
            raise ValueError(f"field {number} needs {length} bytes at {position}, the message has {len(data)}")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError(f"the message ends inside a number at byte {position}")
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


def parse_model(data: bytes) -> SentencePieceModel:
    """Read a ModelProto; ValueError when the bytes are not one (or are cut short)."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in read_fields(data):
        if number == 1:
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer = dict(read_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(read_fields(_as_bytes(value)))
    if not pieces or not trainer:
        raise ValueError(f"{len(pieces)} pieces and {'a' if trainer else 'no'} trainer specification found")
    _check_supported(trainer, normalizer)
    names = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
    return SentencePieceModel(
        pieces=pieces,
        model_type=_integer(trainer, 3, UNIGRAM),
        byte_fallback=bool(_integer(trainer, 35, 0)),
        ids={name: _integer(trainer, number, default) for name, (number, default) in names.items()},
        charsmap=_as_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(_integer(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_integer(normalizer, 4, 1)),
    )


def _piece(message: bytes) -> tuple[str, float, int]:
    fields = dict(read_fields(message))
    score = struct.unpack("<f", _as_bytes(fields.get(2, b"\0\0\0\0")))[0]
    return _as_bytes(fields.get(1, b"")).decode(), score, _integer(fields, 3, NORMAL)


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where text was expected")
    return value


def _integer(fields: dict[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} is not a number")
    return value - (1 << 64) if value >= 1 << 63 else value  # int32 -1 travels as a 64-bit two's complement


def _check_supported(trainer: dict[int, int | bytes], normalizer: dict[int, int | bytes]) -> None:
    kind = _integer(trainer, 3, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        raise PunaError(f"sentencepiece model type {kind} is not supported", "types 1 (unigram) and 2 (BPE) are")
    if _integer(trainer, 24, 0) or not _integer(normalizer, 5, 1):
        raise PunaError(
            "this sentencepiece model puts spaces after words or does not mark them",
            "models with treat_whitespace_as_suffix or without escape_whitespaces are not supported",
        )


def convert_sentencepiece(data: bytes) -> tuple[Engine, dict[str, str]]:
    """A ModelProto's bytes -> (engine with the same ids, names of special tokens: {"bos_token": "<s>", ...}).

    Raises ValueError for bytes that are not a whole ModelProto, PunaError for model kinds that cannot be converted.
    """
    model = parse_model(data)
    engine = Engine(_unigram(model) if model.model_type == UNIGRAM else _bpe(model))
    engine.normalizer = _normalizer(model)
    hard_symbols = model.model_type == BPE and bool(model.texts(USER_DEFINED))
    if hard_symbols and not _every_piece_is_reachable(engine, model):
        # Only then are the symbols cut out before normalization, which differs by spaces around a symbol.
        engine.add_tokens([AddedToken(text, normalized=False) for text in model.texts(USER_DEFINED)])
        hard_symbols = False
    if hard_symbols:
        engine.model.ignore_merges = True
    cuts = _pre_tokenizers(model, hard_symbols)
    if cuts:
        engine.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    engine.decoder = _decoder(model)
    engine.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in model.texts(UNKNOWN, CONTROL)])
    names = _special_names(model)
    if model.model_type == BPE and "bos_token" in names:  # Llama's kind; T5's unigram texts begin with no token
        start_with(engine, names["bos_token"])
    return engine, names


def start_with(engine: Engine, bos: str) -> None:
    """Let other programs that open the saved file (transformers, vLLM) put `bos` first, as Llama's own files do."""
    engine.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, engine.token_to_id(bos))]
    )


def _special_names(model: SentencePieceModel) -> dict[str, str]:
    known = {name: i for name, i in model.ids.items() if 0 <= i < len(model.pieces)}
    return {name: model.pieces[i][0] for name, i in known.items() if model.pieces[i][2] in (UNKNOWN, CONTROL)}


def _bpe(model: SentencePieceModel) -> models.BPE:
    vocabulary = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    mergeable = {text: score for text, score, kind in model.pieces if kind in (NORMAL, UNUSED)}
    merges = ranked_merges(sorted(mergeable, key=lambda text: -mergeable[text]), mergeable)
    unknown = next(iter(model.texts(UNKNOWN)), None)
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)


def ranked_merges(ordered: list[str], known: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every split of every piece into two known pieces, best piece first.

    Both sentencepiece and tiktoken rank a join by the piece it makes, whatever its halves, and take the leftmost place
    first. A list needs an order among the halves of one piece too: longest left half first. No text was found where
    that order matters (26,000 random ones, many of them runs of one character).
    """
    merges = []
    for text in ordered:
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in known and text[cut:] in known:
                merges.append((text[:cut], text[cut:]))
    return merges


def _unigram(model: SentencePieceModel) -> models.Unigram:
    best = max((score for _, score, kind in model.pieces if kind == NORMAL), default=0.0)
    worst = min((score for _, score, kind in model.pieces if kind == NORMAL), default=0.0)
    scores = []
    for text, score, kind in model.pieces:
        if kind == USER_DEFINED:  # sentencepiece's own bonus for them
            score = len(text.encode()) * best - 0.1
        elif kind != NORMAL:
            score = worst  # never used (see _cuts_inside), but the worst score of all sets the price of an unknown
        scores.append((text, score))
    unknown = model.ids["unk_token"]
    return models.Unigram(scores, unknown if 0 <= unknown < len(scores) else None, model.byte_fallback)


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps += _character_map(model.charsmap)
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return normalizers.Sequence(steps)


def _character_map(charsmap: bytes) -> list[normalizers.Normalizer]:
    """sentencepiece's character table, prepared so that `Precompiled` loses nothing.

    `Precompiled` looks up whole grapheme clusters and, where only the beginning of one is in the table, drops the
    rest: U+2116 + U+0368 became "No", the mark was gone (tokenizers 0.23.3). Doing first what the table is made of
    (NFKC, lower case) leaves it no cluster to shorten. The fullwidth tilde stands apart: sentencepiece's NFKC tables
    keep it. A table that is not of that kind goes in as it is.
    """
    table = normalizers.Precompiled(charsmap)
    if table.normalize_str("\u2116") not in ("No", "no") or table.normalize_str("e\u0301") != "\u00e9":
        return [table]
    steps: list[normalizers.Normalizer] = [normalizers.NFKC()]
    if table.normalize_str(_TILDE) == _TILDE:
        steps = [normalizers.Replace(_TILDE, _HIDDEN), *steps, normalizers.Replace(_HIDDEN, _TILDE)]
    if table.normalize_str("X") == "x":
        steps.append(normalizers.Lowercase())
    return [*steps, table]


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _every_piece_is_reachable(engine: Engine, model: SentencePieceModel) -> bool:
    """Whether merges lead from the characters of each ordinary piece to it: then `ignore_merges` changes no id."""
    return all(len(engine.model.tokenize(text)) == 1 for text in model.texts(NORMAL))


def _pre_tokenizers(model: SentencePieceModel, hard_symbols: bool) -> list[pre_tokenizers.PreTokenizer]:
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if hard_symbols:
        symbols = sorted(model.texts(USER_DEFINED), key=len, reverse=True)
        cuts.append(pre_tokenizers.Split(Regex("|".join(map(_escape, symbols))), "isolated"))
    if model.model_type == UNIGRAM or hard_symbols:
        cuts += [pre_tokenizers.Split(Regex(p), "merged_with_previous") for p in _cuts_inside(model)]
    across = re.compile(f"[^{SPACE}]{SPACE}")
    if not any(across.search(text) for text in model.texts(NORMAL, USER_DEFINED, UNUSED)):
        cuts.append(pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated"))
    return cuts


def _cuts_inside(model: SentencePieceModel) -> list[str]:
    """Patterns that end where a control, unknown or byte piece's spelling is to be cut in two."""
    ordinary = model.texts(NORMAL, USER_DEFINED)
    known = {text for text in ordinary if len(text) == 1}
    patterns = []
    for text in model.texts(UNKNOWN, CONTROL):
        if len(text) > 1:
            # Not between two unknown characters either: sentencepiece makes one <unk> of neighbours.
            places = [k for k in range(1, len(text)) if text[k - 1] in known or text[k] in known]
            cut = next((k for k in places if not _crossed(text, k, ordinary)), 1)
            patterns.append(f"(?<={_escape(text[: cut - 1])}){_escape(text[cut - 1])}(?={_escape(text[cut:])})")
    if model.texts(BYTE):
        patterns.append("<(?=0x[0-9A-F]{2}>)")
    return ["|".join(patterns)] if patterns else []


def _crossed(text: str, cut: int, ordinary: list[str]) -> bool:
    pair = text[cut - 1 : cut + 1]
    return any(pair in piece for piece in ordinary)


def _escape(text: str) -> str:
    return re.sub(r"([\\.^$|?*+()\[\]{}&~#-])", r"\\\1", text)
