"""Chat templates: Jinja, sandboxed, with the extras that model authors rely on.

A template is code from a download. It runs in jinja2's immutable sandbox and sees plain data only.
Source: "Writing a chat template" in the documentation of transformers, which lists the extras.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from puna.base.console import PunaError

# Marks around what {% generation %} encloses, in the raw output only. Nobody can guess them, so no message holds them.
_KEY = secrets.token_hex(8)
_OPEN, _CLOSE = f"\U0010fffe{_KEY}(", f"\U0010fffe{_KEY})"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names in use for an assistant's reasoning

Span = tuple[int, int]


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model itself writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class Template:
    """A compiled chat template."""

    def __init__(self, source: str):
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise PunaError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error
        self.marks_generation = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    def render(self, variables: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """The text, and the character spans that `{% generation %}` enclosed.

        PunaError with the template's own words when it refuses the conversation.
        """
        try:
            raw = self._template.render(variables)
        except TemplateError as error:
            raise PunaError(
                f"the chat template refused the conversation: {error.message or type(error).__name__}",
                "check the roles, their order and the fields of the messages",
            ) from error
        except Exception as error:  # a template is a program: None + "text" is a TypeError
            raise PunaError(
                f"the chat template failed: {type(error).__name__}: {error}",
                "check that each message has the fields the template reads, `content` first of all",
            ) from error
        return _without_marks(raw)


def _without_marks(raw: str) -> tuple[str, list[Span]]:
    text, spans, start = "", [], 0
    for part in re.split(f"({re.escape(_OPEN)}|{re.escape(_CLOSE)})", raw):
        if part == _OPEN:
            start = len(text)
        elif part == _CLOSE:
            spans.append((start, len(text)))
        else:
            text += part
    return text, spans


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Check a conversation and copy it as plain data; an assistant's reasoning is there under each of its names."""
    if not isinstance(messages, list | tuple):
        raise PunaError(f"messages must be a list, not {type(messages).__name__}", '[{"role": "user", "content": ...}]')
    copies = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PunaError(f"message {index} of {len(messages)} has no role", 'use {"role": "user", "content": "..."}')
        copy = plain_data(message)
        reasoning = next((copy[name] for name in _REASONING if copy.get(name) is not None), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        copies.append(copy)
    return copies


def plain_data(value: Any) -> Any:
    """Mappings, lists and scalars as they are; of anything else only the name of its type: it may have methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"
