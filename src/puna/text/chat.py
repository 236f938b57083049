"""Messages to token ids and a loss mask: the one renderer for tuning, evaluation and the server.

Three things go wrong elsewhere and are settled here:

- `<|eot_id|>` typed by a user must not end the turn. Special tokens inside messages are disguised (each character
  becomes a private-use one), the template runs, and only the special tokens that then stand in its output are the
  template's own.
- The end-of-turn token is part of what the assistant says: a model that never learns it never stops.
- Templates rewrite history, so the text before a turn is not always the beginning of the whole text. Each turn is
  found by putting a probe in its place and comparing.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from puna.base.console import PunaError
from puna.text.template import Span, Template, plain_data, plain_messages
from puna.text.tokenizer import Tokenizer

_PRIVATE_USE = 0x100000  # plane 16
_UNTOUCHED = ("role", "type")  # structure, not speech: templates build special tokens from them ("<|user|>")


@dataclass(frozen=True)
class _Conversation:
    """Everything a template sees."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    others: dict[str, Any]

    def cut(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> _Conversation:
        return replace(self, messages=messages, add_generation_prompt=add_generation_prompt)


class Chat:
    """A tokenizer and its chat template. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        """`template`: Jinja source to use instead of the tokenizer's own. PunaError when there is neither."""
        source = template if template is not None else tokenizer.chat_template
        if source is None:
            raise PunaError(
                "the tokenizer has no chat template",
                "use a chat model's folder, or put a chat_template.jinja beside tokenizer.json",
            )
        self.tokenizer = tokenizer
        self._template = Template(source)
        self._special = _any_of(tokenizer.specials)
        eos = tokenizer.token_names.get("eos_token")  # in some files an ordinary token
        self._end_of_turn = _any_of([*tokenizer.specials, *([eos] if eos else [])])
        self._halves = _proper_affixes(tokenizer.specials)
        self._probe = f"\U0010fffd{secrets.token_hex(8)}"

    @classmethod
    def load(cls, path: str | Path) -> Chat:
        """The chat of a model or tokenizer folder."""
        return cls(Tokenizer.load(path))

    def render_text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as the template writes it, like transformers' `apply_chat_template(tokenize=False)`."""
        return self._run(_conversation(messages, tools, add_generation_prompt, template_kwargs))[0]

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **template_kwargs: Any,
    ) -> tuple[list[int], list[int]]:
        """(token ids, loss mask): 1 on what the assistant says, its end-of-turn token included, 0 elsewhere.

        The mask follows the template's `{% generation %}` marks if it has them, else each turn is searched for.
        Raises PunaError when the template refuses, or when a turn cannot be found.
        """
        conversation = _conversation(messages, tools, add_generation_prompt, template_kwargs)
        text, hidden, disguised = self._both_faces(conversation)
        if self._template.marks_generation:
            spans = [self._with_end_of_turn(hidden, span) for span in self._run(disguised)[1]]
        else:
            spans = self._assistant_spans(disguised, hidden)
        ids, offsets = self._encode(text, hidden)
        return ids, _mask(offsets, spans)

    def render_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """Only the ids of `render`, ready for an answer: what a server needs, at the price of one or two renderings."""
        text, hidden, _ = self._both_faces(_conversation(messages, tools, add_generation_prompt, template_kwargs))
        return self._encode(text, hidden)[0]

    def _run(self, conversation: _Conversation) -> tuple[str, list[Span]]:
        variables = {
            **self.tokenizer.token_names,
            "messages": conversation.messages,
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": conversation.add_generation_prompt,
            **conversation.others,
        }
        return self._template.render(variables)

    # Keeping the special tokens of messages apart from those of the template.

    def _both_faces(self, conversation: _Conversation) -> tuple[str, str, _Conversation]:
        """(text, the same text with the messages' special tokens disguised, the disguised conversation)."""
        text, _ = self._run(conversation)
        disguise = _Disguise(self._special, self._halves, text)
        messages, tools = disguise.put_on(conversation.messages), disguise.put_on(conversation.tools)
        if not disguise.table:
            return text, text, conversation
        disguised = replace(conversation, messages=messages, tools=tools)
        hidden, _ = self._run(disguised)
        if disguise.take_off(hidden) != text:
            raise PunaError(
                "the chat template treats special tokens inside a message in a way of its own, so they cannot be told "
                "from the template's",
                "remove special tokens such as " + ", ".join(list(self.tokenizer.specials)[:3]) + " from the messages",
            )
        return text, hidden, disguised

    def _encode(self, text: str, hidden: str) -> tuple[list[int], list[Span]]:
        """Ids and offsets of `text`, where only special tokens that `hidden` shows too are special."""
        own = [match.span() for match in self._special.finditer(hidden)]
        if own == [match.span() for match in self._special.finditer(text)]:
            ids, offsets = self.tokenizer.encode_with_offsets(text, specials=True)
        else:
            ids, offsets = self._encode_apart(text, own)
        bos = self.tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos]:
            return ids[1:], offsets[1:]
        return ids, offsets

    def _encode_apart(self, text: str, own: list[Span]) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        offsets: list[Span] = []
        place, strips_left = 0, False
        for start, end in [*own, (len(text), len(text))]:
            special = text[start:end]
            strips_right, next_strips_left = self.tokenizer.eats_space.get(special, (False, False))
            place = place + len(text[place:start]) - len(text[place:start].lstrip()) if strips_left else place
            stop = place + len(text[place:start].rstrip()) if strips_right else start
            part_ids, part_offsets = self.tokenizer.encode_with_offsets(text[place:stop])
            ids += part_ids
            offsets += [(place + a, place + b) for a, b in part_offsets]
            if special in self.tokenizer.specials:
                ids.append(self.tokenizer.specials[special])
                offsets.append((start, end))
            place, strips_left = end, next_strips_left
        return ids, offsets

    # Finding what the assistant said.

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        """Extend a `{% generation %}` span by an end-of-turn token that the template's author left just outside."""
        match = self._special.match(text, span[1])
        stops = self.tokenizer.eos_ids
        return (span[0], match.end()) if match and self.tokenizer.specials.get(match[0]) in stops else span

    def _assistant_spans(self, conversation: _Conversation, text: str) -> list[Span]:
        spans: list[Span] = []
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                spans.append(self._turn(conversation, text, index, floor=spans[-1][1] if spans else 0))
        return spans

    def _turn(self, conversation: _Conversation, text: str, index: int, floor: int) -> Span:
        """Where in `text` the turn of message `index` stands: put a probe in its place and see what stays.

        text    ... <start>assistant\\n  Hello there.  <end>\\n <start>user ...
        probed  ... <start>assistant\\n  PROBE         <end>\\n <start>user ...
                   head ends here ^              ^ rest: the end-of-turn token comes first
        """
        message = conversation.messages[index]
        for stand_in in ({"role": "assistant", "content": self._probe}, {**message, "content": self._probe}):
            span = self._turn_by(conversation, text, index, floor, stand_in)
            if span is not None:
                return span
        raise PunaError(
            f"cannot tell which part of the text message {index} of {len(conversation.messages)} (assistant) became",
            "mark it in the chat template: {% generation %} before what the model writes, {% endgeneration %} after",
        )

    def _turn_by(
        self, conversation: _Conversation, text: str, index: int, floor: int, stand_in: dict[str, Any]
    ) -> Span | None:
        messages = conversation.messages
        before, after = messages[:index], messages[index + 1 :]
        probed = self._try(conversation.cut([*before, stand_in, *after], conversation.add_generation_prompt))
        last = self._try(conversation.cut([*before, stand_in]))
        if probed.count(self._probe) != 1 or last.count(self._probe) != 1:
            return None
        head, rest = probed.split(self._probe)
        start = self._turn_start(conversation.cut(before), text, head, floor)
        if start is None or not text.endswith(rest) or not floor <= start <= len(text) - len(rest):
            return None
        # What follows the turn in any case; after it the next turn, or what ends a conversation, begins.
        closing = _common_start(rest, last.split(self._probe)[1])
        match = self._end_of_turn.match(closing, len(closing) - len(closing.lstrip()))
        return start, len(text) - len(rest) + (match.end() if match else 0)

    def _turn_start(self, before: _Conversation, text: str, head: str, floor: int) -> int | None:
        """Just after the generation prompt, as this request words it or, failing that, as the bare template does."""
        for asked in (before, replace(before, others={})):
            prompted = self._try(replace(asked, add_generation_prompt=True))
            if prompted and text.startswith(prompted) and head.startswith(prompted):
                return len(prompted)
            start = _after_prompt(prompted[len(_common_start(prompted, self._try(asked))) :], head, floor)
            if start is not None and text[:start] == head[:start]:
                return start
        return None

    def _try(self, conversation: _Conversation) -> str:
        """The text, or "" where the template refuses (no message yet, roles out of order)."""
        try:
            return self._run(conversation)[0]
        except PunaError:
            return ""


class _Disguise:
    """Replaces the characters of special tokens inside messages, one for one, by private-use characters."""

    def __init__(self, special: re.Pattern[str], halves: tuple[frozenset[str], frozenset[str]], taken: str):
        self._special, (self._heads, self._tails) = special, halves
        self._longest = max(map(len, self._heads), default=0)
        self._taken = set(taken)
        self._next = _PRIVATE_USE
        self.table: dict[str, str] = {}

    def put_on(self, value: Any) -> Any:
        """The same data with its special tokens disguised; `role` and `type` stay."""
        if isinstance(value, str):
            return self._string(value)
        if isinstance(value, dict):
            return {k: v if k in _UNTOUCHED and isinstance(v, str) else self.put_on(v) for k, v in value.items()}
        return [self.put_on(item) for item in value] if isinstance(value, list) else value

    def take_off(self, text: str) -> str:
        """The original characters."""
        return text.translate({ord(mask): character for character, mask in self.table.items()})

    def _string(self, text: str) -> str:
        spans = [match.span() for match in self._special.finditer(text)]
        # Half a token at an end (templates trim spaces) could meet its other half in the neighbouring message.
        left, right = len(text) - len(text.lstrip()), len(text.rstrip())
        for size in range(1, min(self._longest, right - left) + 1):
            if text[left : left + size] in self._tails:
                spans.append((left, left + size))
            if text[right - size : right] in self._heads:
                spans.append((right - size, right))
        characters = list(text)
        for start, end in spans:
            characters[start:end] = [self._mask(character) for character in text[start:end]]
        return "".join(characters)

    def _mask(self, character: str) -> str:
        if character not in self.table:
            while chr(self._next) in self._taken:
                self._next += 1
            self.table[character] = chr(self._next)
            self._next += 1
        return self.table[character]


def _after_prompt(prompt: str, head: str, floor: int) -> int | None:
    """Where the last generation prompt in `head` ends: history was rewritten, so only its wording helps.

    A turn in the past may open with less than today's prompt (which may add an empty <think>): then `head` ends there.
    """
    place = head.rfind(prompt) if prompt else -1
    if place >= floor:
        return place + len(prompt)
    ends = (prompt[:size] for size in range(len(prompt), 0, -1))
    return len(head) if any(part.strip() and head.endswith(part) for part in ends) else None


def _common_start(one: str, other: str) -> str:
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differs, min(len(one), len(other)))]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(set(texts), key=len, reverse=True))) or r"(?!)")


def _proper_affixes(texts: dict[str, int]) -> tuple[frozenset[str], frozenset[str]]:
    heads = frozenset(text[:size] for text in texts for size in range(1, len(text)))
    tails = frozenset(text[size:] for text in texts for size in range(1, len(text)))
    return heads, tails


def _conversation(messages: Any, tools: Any, add_generation_prompt: bool, others: dict[str, Any]) -> _Conversation:
    if tools is not None and not all(isinstance(tool, dict) for tool in tools):
        raise PunaError("tools must be JSON schemas (dicts)", '[{"type": "function", "function": {"name": ...}}]')
    plain_tools = None if tools is None else plain_data(list(tools))
    return _Conversation(plain_messages(messages), plain_tools, add_generation_prompt, plain_data(others))


def _mask(offsets: list[Span], spans: list[Span]) -> list[int]:
    """1 for each token that begins inside a span. Both lists are in order of place."""
    mask, index = [], 0
    for start, _ in offsets:
        while index < len(spans) and start >= spans[index][1]:
            index += 1
        mask.append(int(index < len(spans) and start >= spans[index][0]))
    return mask
