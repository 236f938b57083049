"""Is calibration text written as this model expects it? Chat templates leave marks, and the wrong ones teach nothing.

A model that has never seen `<|im_start|>` reads ten odd characters there: the inputs its layers then show are not those
of its use. Marks of a template the tokenizer does not know are an error where most documents hold them, and a warning
where some do (text about language models quotes them).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from puna.base.console import PunaError
from puna.text.tokenizer import Tokenizer

MOST = 0.5  # of the documents: from this share on, the text is a file of chats rather than one that quotes a chat
# How the templates in use open or close a turn.
MARKS = {
    "ChatML (Qwen, Yi)": ("<|im_start|>", "<|im_end|>"),
    "Llama 3": ("<|start_header_id|>", "<|eot_id|>"),
    "Llama 4": ("<|header_start|>", "<|eot|>"),
    "Llama 2 and Mistral": ("[INST]", "[/INST]"),
    "Gemma": ("<start_of_turn>", "<end_of_turn>"),
    "Phi and Zephyr": ("<|user|>", "<|assistant|>"),
    "DeepSeek": ("<｜User｜>", "<｜Assistant｜>"),
    "Harmony (gpt-oss)": ("<|start|>", "<|message|>"),
    "Alpaca": ("### Instruction:", "### Response:"),
    "Vicuna": ("\nUSER: ", "\nASSISTANT: "),
}


@dataclass(frozen=True)
class Wording:
    """What plain text turned out to be: `parse_specials` where it spells this tokenizer's own special tokens."""

    template: str
    parse_specials: bool = False
    warnings: tuple[str, ...] = ()


def check_wording(texts: Sequence[str], tokenizer: Tokenizer) -> Wording:
    """How these texts are to be read. Errors: `PunaError` naming the template, the mark and how many texts hold it."""
    found = {name: sum(_holds(text, marks) for text in texts) for name, marks in MARKS.items()}
    own = [name for name in found if found[name] and _knows(tokenizer, MARKS[name])]
    foreign = {name: number for name, number in found.items() if number and name not in own}
    for name, number in foreign.items():
        if number >= MOST * len(texts):
            raise PunaError(
                f"the calibration text is written in the chat template of {name}: {MARKS[name][0].strip()!r} stands in "
                f"{number} of {len(texts)} documents, and this tokenizer does not know it",
                'give chats as lines of JSON, {"messages": [{"role": "user", "content": "..."}, ...]}: they are '
                "rendered with the model's own template",
            )
    if any(found[name] >= MOST * len(texts) for name in own):
        return Wording(f"as the text spells it ({', '.join(own)})", True, _warnings(foreign, len(texts)))
    return Wording("plain text", False, _warnings(foreign, len(texts)))


def _warnings(foreign: dict[str, int], texts: int) -> tuple[str, ...]:
    return tuple(
        f"{number} of {texts} calibration documents hold {MARKS[name][0].strip()!r} of {name}, which this tokenizer "
        "does not know; they are read as plain text"
        for name, number in foreign.items()
    )


def _holds(text: str, marks: Sequence[str]) -> bool:
    """Both marks: `[INST]` alone is somebody's footnote."""
    return all(mark in text for mark in marks)


def _knows(tokenizer: Tokenizer, marks: Sequence[str]) -> bool:
    """As tokens, or as words of its template (Llama 2 writes `[INST]` in plain characters)."""
    template = re.sub(r"\\n", "\n", tokenizer.chat_template or "")
    return any(mark in tokenizer.added or mark.strip() in template for mark in marks)
