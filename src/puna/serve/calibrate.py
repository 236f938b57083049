"""Text for a quantization: read from files, or Python's own library where none were named; chats stay chats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from puna.base import files
from puna.base.console import PunaError
from puna.corpus.in_memory import STANDARD_LIBRARY, read_documents
from puna.quant.calibration import Content, Sequences, split
from puna.quant.config import QuantConfig
from puna.text.tokenizer import Tokenizer

Document = tuple[str, Content]  # the name of its file, and its text or messages


def read_sequences(
    tokenizer: Tokenizer | None, config: QuantConfig, calib: Sequence[str], evaluation: Sequence[str], eval_tokens: int
) -> Sequences:
    """Calibration and held-out sequences of the lengths the config says.

    Errors: `PunaError` for a model without a tokenizer, files without text, too little of it.
    """
    if tokenizer is None:
        raise PunaError(
            "this model has no tokenizer, so no text can be calibrated on or judged by",
            "add its tokenizer files to the folder; formats without calibration also go with --eval-tokens 0",
        )
    documents = read_contents(calib or (STANDARD_LIBRARY,))
    held = read_contents(evaluation) if evaluation else None
    samples = config.samples if config.needs_calibration else 0
    found = split(documents, tokenizer, samples, config.seq_len, max(1, eval_tokens), config.seed, held)
    return found if eval_tokens else _without_evaluation(found)


def _without_evaluation(text: Sequences) -> Sequences:
    nothing = text.evaluation_ST[:0]
    provenance = {**text.provenance, "evaluation_tokens": 0, "evaluation_sha256": None}
    return replace(text, evaluation_ST=nothing, targets_ST=nothing, bytes_ST=None, provenance=provenance)


def read_contents(paths: Sequence[str]) -> list[Document]:
    """(name, text) of every document; a jsonl line with "messages" is a chat and keeps its messages."""
    chats = [path for path in paths if path.endswith(".jsonl") and _first_line_is_chat(path)]
    found: list[Document] = [chat for path in chats for chat in _read_chats(path)]
    rest = [path for path in paths if path not in chats]
    if rest:
        found += [(document.name, document.text) for document in read_documents(rest)]
    return found


def _first_line_is_chat(path: str) -> bool:
    if files.stat(path) is None:
        return False
    line = files.read_file(path).lstrip().partition(b"\n")[0]
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("messages"), list)


def _read_chats(path: str) -> list[Document]:
    found: list[Document] = []
    for number, line in enumerate(files.read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            assert isinstance(messages, list)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise PunaError(f"line {number} of {path} holds no messages", 'each line: {"messages": [...]}') from error
        found.append((path, messages))
    return found
