"""Text to token sequences: some to calibrate with, others to judge by, and a proof that the two are disjoint.

Documents go whole to one side or the other, by a hash of their text; the one at the border is cut at a line. Every
sequence is `[bos] text ...`; where a document ends early, `[eos] [bos]` and the next one follow, as in training.

Disjoint is checked, not assumed: an evaluation token inside a window of tokens that also stands in the calibration
sequences is not scored. A window is 13 tokens (GPT-3, Brown et al. 2020, arXiv:2005.14165, appendix C: 13 words), or
more where a small vocabulary needs more for 64 bytes of text.

Shapes: S sequences of T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.quant.score import IGNORED
from puna.quant.wording import check_wording
from puna.text.chat import Chat
from puna.text.tokenizer import Tokenizer

Content = str | Sequence[Mapping[str, Any]]  # plain text, or the messages of a chat
WINDOW_TOKENS, WINDOW_BYTES = 13, 64
MOST_CHOSEN = 0.1  # of evaluation tokens the user chose may be in calibration too: more is a mistake
MOST_CUT = 0.5  # of those set aside from the same documents: more, and the text repeats itself
WORTH_TELLING = 0.01
_PART = 8  # characters of a part of a document, per token of a sequence: two or three sequences
_ENCODED_TOGETHER = 64  # parts
_FILES_NAMED = 20


@dataclass(frozen=True)
class Sequences:
    """What goes through the model. `provenance` (for the report) holds plain values only."""

    calibration_ST: Tensor  # int64; S may be 0
    evaluation_ST: Tensor
    targets_ST: Tensor  # of evaluation: the next token, or score.IGNORED
    bytes_ST: Tensor | None  # UTF-8 bytes that each target stands for; None where the vocabulary cannot tell
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def split(
    documents: Sequence[tuple[str, Content]],
    tokenizer: Tokenizer,
    samples: int,
    seq_len: int,
    eval_tokens: int,
    seed: int = 0,
    evaluation: Sequence[tuple[str, Content]] | None = None,
) -> Sequences:
    """`samples` calibration sequences and at least `eval_tokens` evaluation tokens, in sequences of `seq_len`.

    documents: (name of the file, its text or the messages of a chat, which the tokenizer's template renders).
    evaluation: documents to evaluate on; without them, part of `documents` is set aside. samples 0: no calibration.
    The same documents in any order, the same seed: the same sequences.

    Errors: `PunaError` for too little text (with numbers), evaluation text that is calibration text, chats without a
    template, and text in the words of a template that this tokenizer does not know.
    """
    assert seq_len > 1
    assert min(eval_tokens, samples + 1) > 0
    texts, repeated = _texts(documents)
    wording = check_wording([text.content for text in texts if isinstance(text.content, str)], tokenizer)
    rows = max(2, math.ceil(eval_tokens / seq_len))  # one sequence would have no error bar
    if evaluation is None:
        judged, learned = _divide(texts, rows / (rows + samples), seed, _PART * seq_len)
    else:
        judged, learned = _texts(evaluation)[0], texts
        _refuse_common(judged, learned)
    cutter = _Cutter(tokenizer, seq_len, seed, wording.parse_specials)
    evaluation_ST, calibration_ST = cutter.sequences(judged, rows), cutter.sequences(learned, samples)
    if len(evaluation_ST) < rows or len(calibration_ST) < samples:
        raise _too_little(cutter, texts, None if evaluation is None else judged, samples, rows)
    shared_ST = shared_tokens(evaluation_ST, calibration_ST, cutter.window)
    _check_shared(shared_ST, evaluation is not None)
    targets_ST = _targets(evaluation_ST, shared_ST, tokenizer.bos_id)
    bytes_ST = _bytes(targets_ST, tokenizer.byte_lengths)
    has_chats = any(not isinstance(text.content, str) for text in texts)
    provenance = {
        "files": sorted({text.name for text in texts})[:_FILES_NAMED],
        "documents": len(texts),
        "repeated_documents": repeated,
        "evaluation_files": None if evaluation is None else sorted({text.name for text in judged})[:_FILES_NAMED],
        "template": "the tokenizer's chat template" if has_chats else wording.template,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "bos": tokenizer.bos_id is not None,
        "calibration_tokens": calibration_ST.numel(),
        "calibration_sha256": _digest(calibration_ST),
        "evaluation_tokens": evaluation_ST.numel(),
        "evaluation_sha256": _digest(evaluation_ST),
        "scored_tokens": int((targets_ST != IGNORED).sum()),
        "scored_bytes": None if bytes_ST is None else int(bytes_ST.sum()),
        "window_tokens": cutter.window,
        "shared_tokens": int(shared_ST.sum()),
        "vocab_sha256": tokenizer.vocab_hash,
    }
    warnings = (*wording.warnings, *_told(shared_ST))
    return Sequences(calibration_ST, evaluation_ST, targets_ST, bytes_ST, provenance, warnings)


@dataclass(frozen=True)
class _Text:
    """A document, or a part of one; `ends`: its document ends with it."""

    name: str
    content: Content
    ends: bool = True

    @cached_property
    def plain(self) -> str:
        return self.content if isinstance(self.content, str) else json.dumps(list(self.content), default=str)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.plain.encode("utf-8", "replace")).hexdigest()

    def place(self, seed: int) -> str:
        """Where it stands in the order that `seed` gives."""
        return hashlib.sha256(f"{seed} {self.digest}".encode()).hexdigest()

    def parts(self, size: int) -> Iterator[_Text]:
        """Pieces of `size` to 2 `size` characters that end at a line where there is one."""
        text, start = self.content, 0
        if not isinstance(text, str):
            yield self
            return
        while start < len(text):
            line = text.find("\n", start + size, start + 2 * size)
            stop = line + 1 if line >= 0 else start + 2 * size
            yield _Text(self.name, text[start:stop], self.ends and stop >= len(text))
            start = stop


class _Cutter:
    """Cuts sequences from texts, in the order of the seed, encoding no more than it needs."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int, parse_specials: bool):
        self._tokenizer, self.seq_len, self._seed, self._parse_specials = tokenizer, seq_len, seed, parse_specials
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._end = tokenizer.eos_ids[:1]
        self._characters = self._tokens = 0

    @property
    def window(self) -> int:
        """Tokens of a window of the overlap check, by what was encoded so far (a character counts as a byte)."""
        return max(WINDOW_TOKENS, math.ceil(WINDOW_BYTES * self._tokens / max(1, self._characters)))

    def sequences(self, texts: Sequence[_Text], wanted: int) -> Tensor:
        """(wanted, seq_len) token ids, or as many rows as the texts give."""
        rows = list(islice(self._rows(self._encode(texts)), wanted))
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.seq_len)

    def tokens(self, texts: Sequence[_Text]) -> int:
        """How many tokens the texts give."""
        return sum(map(len, self._encode(texts)))

    def _rows(self, pieces: Iterable[list[int]]) -> Iterator[list[int]]:
        row = [*self._start]
        for ids in pieces:
            row += self._start if len(row) > len(self._start) else []
            row += ids
            while len(row) >= self.seq_len:
                yield row[: self.seq_len]
                row = self._start + row[self.seq_len :]

    def _encode(self, texts: Sequence[_Text]) -> Iterator[list[int]]:
        parts = [part for text in texts for part in text.parts(_PART * self.seq_len)]
        parts.sort(key=lambda part: part.place(self._seed))
        for first in range(0, len(parts), _ENCODED_TOGETHER):
            some = parts[first : first + _ENCODED_TOGETHER]
            plain = [part.content for part in some if isinstance(part.content, str)]
            encoded = iter(self._tokenizer.encode_batch(plain, specials=self._parse_specials))
            for part in some:
                is_text = isinstance(part.content, str)
                ids = next(encoded) if is_text else self._render(part.content)
                self._characters, self._tokens = self._characters + len(part.plain), self._tokens + len(ids)
                ids = ids[1:] if ids[:1] == self._start else ids
                yield ids + self._end if is_text and part.ends else ids  # a template writes its own end

    @cached_property
    def _render(self) -> Callable[[Any], list[int]]:
        chat = Chat(self._tokenizer)
        return lambda messages: chat.render_prompt(messages, add_generation_prompt=False)


def shared_tokens(evaluation_ST: Tensor, calibration_ST: Tensor, window: int) -> Tensor:
    """bool (S, T): evaluation tokens inside a window of tokens that stands in the calibration sequences too."""
    window = min(window, evaluation_ST.shape[1])
    hits_SW = np.isin(_hashes(evaluation_ST, window), np.unique(_hashes(calibration_ST, window)))
    shared_ST = np.zeros(tuple(evaluation_ST.shape), dtype=bool)
    for offset in range(window):
        shared_ST[:, offset : offset + hits_SW.shape[1]] |= hits_SW
    return torch.from_numpy(shared_ST)


def _hashes(ids_ST: Tensor, window: int) -> np.ndarray:
    """uint64 (S, T - window + 1): one hash per window, a polynomial mod 2^64 in scattered token values."""
    ids = ids_ST.numpy().astype(np.uint64)
    # splitmix64's finisher (Steele et al. 2014): neighbouring ids become unrelated numbers.
    ids = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x9E3779B97F4A7C15)
    ids = (ids ^ (ids >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ids ^= ids >> np.uint64(31)
    windows = max(0, ids.shape[1] - window + 1)
    found = np.zeros((ids.shape[0], windows), dtype=np.uint64)
    for offset in range(window):
        found = found * np.uint64(0x2545F4914F6CDD1D) + ids[:, offset : offset + windows]
    return found


def _texts(documents: Sequence[tuple[str, Content]]) -> tuple[list[_Text], int]:
    """Without empty ones and exact repetitions, and how many repetitions there were."""
    kept: dict[str, _Text] = {}
    texts = [_Text(name, content) for name, content in documents if content]
    for text in texts:
        kept.setdefault(text.digest, text)
    return list(kept.values()), len(texts) - len(kept)


def _divide(texts: Sequence[_Text], share: float, seed: int, part: int) -> tuple[list[_Text], list[_Text]]:
    """(evaluation, calibration): whole documents by a hash until `share` of the characters; a long last one is cut."""
    wanted = int(share * sum(len(text.plain) for text in texts))
    ordered = sorted(texts, key=lambda text: text.place(seed))
    for number, text in enumerate(ordered):
        if len(text.plain) >= wanted:
            one, other = _cut(text, max(wanted, part))
            return [*ordered[:number], one], [*other, *ordered[number + 1 :]]
        wanted -= len(text.plain)
    return ordered, []


def _cut(text: _Text, place: int) -> tuple[_Text, list[_Text]]:
    """What lies before the last line that ends at `place`, and the rest; chats and what is shorter stay whole."""
    if not isinstance(text.content, str) or len(text.content) <= place:
        return text, []
    place = text.content.rfind("\n", 0, place) + 1 or place
    return _Text(text.name, text.content[:place], ends=False), [_Text(text.name, text.content[place:])]


def _targets(ids_ST: Tensor, shared_ST: Tensor, bos_id: int | None) -> Tensor:
    """The next token; IGNORED at the end, before a bos (nobody predicts the next document) and where it is shared."""
    following = torch.nn.functional.pad(ids_ST[:, 1:], (0, 1), value=IGNORED)
    unscored = torch.nn.functional.pad(shared_ST[:, 1:], (0, 1))
    if bos_id is not None:
        unscored = unscored | (following == bos_id)
    return following.masked_fill(unscored, IGNORED)


def _bytes(targets_ST: Tensor, byte_lengths: Sequence[int] | None) -> Tensor | None:
    if byte_lengths is None:
        return None
    lengths = torch.tensor(byte_lengths)[targets_ST.clamp(min=0)]
    return lengths.masked_fill(targets_ST == IGNORED, 0)


def _refuse_common(judged: Sequence[_Text], learned: Sequence[_Text]) -> None:
    calibration = {text.digest: text.name for text in learned}
    common = [text for text in judged if text.digest in calibration]
    if common:
        names = ", ".join(dict.fromkeys(text.name for text in common[:3]))
        raise PunaError(
            f"{len(common)} of {len(judged)} evaluation documents are calibration documents too: {names}",
            "evaluate on other text, or give no evaluation text: part of the calibration text is then set aside",
        )


def _check_shared(shared_ST: Tensor, is_chosen: bool) -> None:
    share = float(shared_ST.double().mean())
    if is_chosen and share > MOST_CHOSEN:
        raise PunaError(
            f"{share:.0%} of the evaluation text stands in the calibration text too ({MOST_CHOSEN:.0%} is the most)",
            "evaluate on other text, or give no evaluation text: part of the calibration text is then set aside",
        )
    if share > MOST_CUT:
        raise PunaError(
            f"the text repeats itself: {share:.0%} of what was set aside for evaluation stands in calibration text too",
            "give text with fewer repetitions, or evaluation text of its own",
        )


def _told(shared_ST: Tensor) -> list[str]:
    share = float(shared_ST.double().mean())
    words = f"{share:.1%} of the evaluation tokens stand in calibration text too; they are not scored"
    return [words] if share > WORTH_TELLING else []


def _too_little(
    cutter: _Cutter, texts: Sequence[_Text], judged: Sequence[_Text] | None, samples: int, rows: int
) -> PunaError:
    """With evaluation text of its own each side is told by itself, otherwise what both would need."""
    length = cutter.seq_len
    if judged is not None and cutter.tokens(judged) < rows * length:
        need, have, of, most = rows, cutter.tokens(judged), f"evaluation needs {rows}", 0
    else:
        have, share = cutter.tokens(texts), 0 if judged is not None else rows
        need, most = samples + share, int(0.9 * have / length) - share
        of = f"calibration needs {samples}" + (f" and evaluation {rows}" if share else "")
    factor = max(1.1, 1.05 * need * length / max(1, have))
    return PunaError(
        f"{of} sequences of {length} tokens, {need * length:,} together; the text has {have:,}",
        f"give about {factor:.1f} times as much text, "
        + (f"or --samples {most}" if most > 0 else "or shorter sequences"),
    )


def _digest(ids_ST: Tensor) -> str:
    return hashlib.sha256(ids_ST.to(torch.int64).numpy().tobytes()).hexdigest()
