"""Text to token ids and back: one engine, the `tokenizers` library, for every kind of tokenizer file.

tokenizer.json, sentencepiece and tiktoken files (told apart by content) all become a `tokenizers.Tokenizer`, so what is
saved is always a folder that `transformers.AutoTokenizer` opens and that gives the same ids.

Special tokens have two faces. In text from a person `<|eot_id|>` is eight ordinary characters (`specials=False`, the
default); in text from a chat template it is one token (`specials=True`). The switch is a property of the engine, not
of a call, so there are two engines, and calls on many threads cannot disturb each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine

from puna.base.console import PunaError
from puna.base.storage import read_json, write_atomic, write_json
from puna.text.decoding import StreamDecoder, TextDecoder, resolve_bytes
from puna.text.sentencepiece import convert_sentencepiece
from puna.text.tiktoken import byte_alphabet, convert_tiktoken, looks_like_tiktoken

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FILES = ("tokenizer.json", "tokenizer.model")  # what a folder may hold, best first
_BYTE_LETTERS = frozenset(byte_alphabet())


@dataclass
class Settings:
    """What stands beside the vocabulary: which tokens play which part, and the chat template."""

    names: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>"
    stops: list[int] = field(default_factory=list)  # ids that end an answer, besides eos
    chat_template: str | None = None
    model_max_length: int | None = None


class Tokenizer:
    """A vocabulary with encode, decode, stream and save.

    `Tokenizer.load(path)` opens a file or folder; `puna.text.train_tokenizer.train_bpe` makes one from text.
    """

    def __init__(self, engine: Engine, settings: Settings | None = None, json_text: str | None = None):
        """`json_text`: the tokenizer.json the engine was read from; `save` writes it back unchanged."""
        self._json_text = json_text or engine.to_str()
        engine.no_truncation()  # a file may carry the limits of somebody's old training job
        engine.no_padding()
        engine.encode_special_tokens = True
        self._engine = engine
        self._settings = settings or Settings()
        added = engine.get_added_tokens_decoder()
        # Every token that was added beside the model's vocabulary: the special ones, and those that only stay whole.
        self.added: dict[str, int] = {t.content: i for i, t in sorted(added.items())}
        self.specials: dict[str, int] = {t.content: i for i, t in sorted(added.items()) if t.special}
        self.eats_space: dict[str, tuple[bool, bool]] = {  # special token -> swallows spaces (before, after) it
            t.content: (t.lstrip, t.rstrip) for t in added.values() if t.special
        }
        self.vocab_size = 1 + max(engine.get_vocab(with_added_tokens=True).values(), default=-1)
        self._decoder = TextDecoder(engine, self.vocab_size, self.specials.values())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a folder (tokenizer.json, else tokenizer.model) or one such file of any name.

        Raises PunaError when it is missing, cut short or of no known kind.
        """
        path = Path(path)
        file = _find_file(path)
        data = file.read_bytes()
        json_text = None
        if data.lstrip()[:1] == b"{":
            json_text, settings = data.decode("utf-8", "replace"), Settings()
            engine = _open_json(json_text, file)
        else:
            engine, settings = _convert(data, file)
        return cls(engine, _read_settings(file.parent, engine, settings), json_text)

    # Text to ids.

    def encode(self, text: str, specials: bool = False, bos: bool = False) -> list[int]:
        """Ids of `text`. `specials`: special tokens spelled in the text become those tokens, else they stay text.

        `bos`: begin with the beginning-of-text token, once; nothing is added when there is none or it is there.
        """
        try:
            ids = self._engine_for(specials).encode(text, add_special_tokens=False).ids
        except (UnicodeError, TypeError) as error:
            raise _not_text(text) from error
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_batch(self, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        try:
            encodings = self._engine_for(specials).encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeError, TypeError) as error:
            raise _not_text(next((t for t in texts if not _is_text(t)), None)) from error
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str, specials: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, the characters [start, end) of `text` it stands for."""
        try:
            encoding = self._engine_for(specials).encode(text, add_special_tokens=False)
        except (UnicodeError, TypeError) as error:
            raise _not_text(text) from error
        return encoding.ids, encoding.offsets

    def _engine_for(self, specials: bool) -> Engine:
        return self._parsing_engine if specials and self.specials else self._engine

    @cached_property
    def _parsing_engine(self) -> Engine:
        return Engine.from_str(self._engine.to_str())

    # Ids to text.

    def decode(self, ids: Sequence[int], skip_specials: bool = False) -> str:
        """Text of `ids`, without special tokens if asked. PunaError for an id outside the vocabulary."""
        return self._decoder.decode(ids, skip_specials)

    def stream(self, skip_specials: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self._decoder, skip_specials)

    # What the vocabulary says about itself.

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, if there is one."""
        return self._named("bos_token")

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's eos, then end-of-turn tokens of generation_config.json."""
        eos = self._named("eos_token")
        return list(dict.fromkeys([*([] if eos is None else [eos]), *self._settings.stops]))

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, if there is one."""
        return self._named("pad_token")

    def _named(self, name: str) -> int | None:
        text = self._settings.names.get(name)
        return None if text is None else self._engine.token_to_id(text)

    @property
    def token_names(self) -> dict[str, str]:
        """The parts tokens play, as chat templates see them: {"bos_token": "<s>", ...}."""
        return dict(self._settings.names)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, if the tokenizer has one."""
        return self._settings.chat_template

    @cached_property
    def vocab_hash(self) -> str:
        """Hex sha256 of all (token, id) and of the model with its merges: equal hashes, equal vocabularies."""
        vocabulary = sorted(self._engine.get_vocab(with_added_tokens=True).items())
        model = json.loads(self._engine.to_str())["model"]
        return hashlib.sha256(json.dumps([vocabulary, model], sort_keys=True).encode()).hexdigest()

    @cached_property
    def byte_lengths(self) -> list[int] | None:
        """UTF-8 bytes of text that each id stands for, 0 for special tokens; None if that depends on its neighbours.

        It does not in byte-level BPE, nor with byte fallback, where a space that begins the text counts as any other.
        """
        if not (self._decoder.is_byte_level or self._decoder.has_byte_fallback):
            return None
        return [self._byte_length(token_id) for token_id in range(self.vocab_size)]

    def _byte_length(self, token_id: int) -> int:
        token = self._decoder.token(token_id, skip_specials=True)
        if not token:
            return 0
        if self._decoder.is_byte_level:  # one letter of the alphabet is one byte; what is not in it stands for itself
            return len(token) if _BYTE_LETTERS.issuperset(token) else len(token.encode())
        is_byte = resolve_bytes(token, bytearray()) != [token]
        return 1 if is_byte else len(self._decoder.join(["x", token]).encode()) - 1

    # Saving.

    def to_json(self) -> str:
        """The tokenizer.json that `save` writes: as it was read, or as it was made."""
        return self._json_text

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and its companions: a folder AutoTokenizer and `Tokenizer.load` open, with our ids."""
        folder, settings = Path(folder), self._settings
        names = {name: settings.names[name] for name in TOKEN_NAMES if self._named(name) is not None}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        config["clean_up_tokenization_spaces"] = False
        if settings.model_max_length is not None:
            config["model_max_length"] = settings.model_max_length
        if settings.stops:
            config["stop_token_ids"] = settings.stops  # read back by `load`; others ignore it
        if settings.chat_template is not None:
            config["chat_template"] = settings.chat_template
            write_atomic(folder / "chat_template.jinja", settings.chat_template)
        else:
            (folder / "chat_template.jinja").unlink(missing_ok=True)  # of whatever was here before
        write_atomic(folder / "tokenizer.json", self._json_text)
        write_json(folder / "special_tokens_map.json", names)
        write_json(folder / "tokenizer_config.json", config)


def _find_file(path: Path) -> Path:
    if not path.exists():
        raise PunaError(f"{path} does not exist", "give a tokenizer file or a folder with a tokenizer.json")
    if path.is_file():
        return path
    found = [path / name for name in _FILES if (path / name).is_file()]
    if not found:
        raise PunaError(f"{path} holds no {' and no '.join(_FILES)}", "give the folder of a model or of a tokenizer")
    return found[0]


def _open_json(text: str, file: Path) -> Engine:
    try:
        return Engine.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise PunaError(
            f"{file} ({len(text)} characters) is not a whole tokenizer.json: {error}",
            "it must hold a `model`; restore the file from its source",
        ) from error


def _convert(data: bytes, file: Path) -> tuple[Engine, Settings]:
    if looks_like_tiktoken(data):
        engine, names, stops = convert_tiktoken(data)
        return engine, Settings(names, stops)
    try:
        engine, names = convert_sentencepiece(data)
    except ValueError as error:
        is_pointer = data.startswith(b"version https://git-lfs")
        raise PunaError(
            f"{file} ({len(data)} bytes) is no tokenizer.json, tiktoken file or whole sentencepiece model: {error}",
            "it is a Git LFS pointer: run `git lfs pull`" if is_pointer else "download the file again",
        ) from error
    return engine, Settings(names)


def _read_settings(folder: Path, engine: Engine, settings: Settings) -> Settings:
    """Fill `settings` (what the vocabulary file itself knew) from the JSON files beside it; those win."""
    files = {name: _object_or_empty(folder / f"{name}.json") for name in _COMPANIONS}
    config, model = files["tokenizer_config"], files["config"]
    for source in (files["special_tokens_map"], config):
        settings.names |= _token_texts(source)
        absent = [name for name in TOKEN_NAMES if name in source and source[name] is None]
        settings.names = {name: text for name, text in settings.names.items() if name not in absent}
    answer = files["generation_config"] or model
    if not config and not settings.names:  # nothing but a vocabulary and the model's config: take its ids
        texts = {name: engine.id_to_token(answer[f"{name[:3]}_token_id"]) for name in _plain_ids(answer)}
        settings.names = {name: text for name, text in texts.items() if text is not None}
    stops = [*config.get("stop_token_ids", []), *settings.stops, *_ids(files["generation_config"])]
    stops += _ids(model) or _ids(model.get("text_config") or {})
    settings.stops = [i for i in dict.fromkeys(stops) if engine.id_to_token(i) is not None]
    settings.chat_template = _chat_template(folder, config)
    length = config.get("model_max_length")
    settings.model_max_length = int(length) if isinstance(length, int | float) and length < 1e9 else None
    return settings


_COMPANIONS = ("tokenizer_config", "special_tokens_map", "generation_config", "config")


def _object_or_empty(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _token_texts(source: dict[str, Any]) -> dict[str, str]:
    """Named tokens of a JSON file, where a token is a string or {"content": string, ...}."""
    values = {name: source.get(name) for name in TOKEN_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _plain_ids(source: dict[str, Any]) -> list[str]:
    return [name for name in ("bos_token", "eos_token", "pad_token") if isinstance(source.get(f"{name}_id"), int)]


def _ids(source: dict[str, Any]) -> list[int]:
    value = source.get("eos_token_id")
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: [{"name": "default", "template": "..."}, ...]
        named = {entry.get("name"): entry.get("template") for entry in template}
        return named.get("default", next(iter(named.values()), None))
    return template


def _is_text(text: object) -> bool:
    return isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)


def _not_text(text: object) -> PunaError:
    if not isinstance(text, str):
        return PunaError(f"text was expected, not {type(text).__name__}", "pass a str")
    place = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), -1)
    return PunaError(
        f"the text is not valid Unicode: half a surrogate pair at character {place} of {len(text)}",
        "read the text with errors='replace'",
    )
