"""Generation as a person meets it in a terminal: a completion, a conversation."""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import suppress
from typing import Any

from puna.base.console import count, say
from puna.base.hardware import pick_device
from puna.engine.llm import LLM, Prompt
from puna.engine.request import Output, SamplingParams
from puna.text.chat import Chat
from puna.weights.fetch import local_folder


def complete(
    model: str, prompt: Prompt, params: SamplingParams, dtype: str, device: str, quiet: bool = False
) -> dict[str, Any]:
    """Answers to one prompt, streamed to stdout unless `quiet`; returns the JSON of the command line's contract."""
    llm = LLM(model, dtype, str(pick_device(device)))
    started = time.perf_counter()
    outputs = [_show(llm, prompt, params, index, quiet) for index in range(params.n)]
    seconds = time.perf_counter() - started
    generated = sum(len(output.token_ids) for output in outputs)
    usage = {
        "prompt_tokens": outputs[0].prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": outputs[0].prompt_tokens + generated,
    }
    say(f"{generated} tokens in {seconds:.2f}s ({count(generated / seconds)} tok/s), {outputs[-1].finish_reason}")
    return {"outputs": [_json(output) for output in outputs], "usage": usage, "seconds": seconds}


def talk(model: str, system: str, params: SamplingParams, dtype: str, device: str) -> dict[str, Any]:
    """A conversation on stdin and stdout; returns its messages."""
    llm = LLM(model, dtype, str(pick_device(device)))
    chat = Chat.load(local_folder(model, state=False))
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    say("/reset forgets, /exit or Ctrl-D ends")
    while (line := _ask()) is not None:
        if line.strip() in ("/exit", "/quit"):
            break
        if line.strip() == "/reset":
            messages = list(first)
            continue
        if line.strip():
            messages.append({"role": "user", "content": line})
            ids = chat.render_prompt(messages)
            messages.append({"role": "assistant", "content": _show(llm, ids, params, 0, quiet=False).text})
    return {"messages": messages}


def _show(llm: LLM, prompt: Prompt, params: SamplingParams, index: int, quiet: bool) -> Output:
    """Stream one answer; a Ctrl-C keeps what is there."""
    output = Output(finish_reason="interrupted")
    try:
        for piece, so_far in llm.stream(prompt, params, index):
            output = so_far
            if not quiet:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        output.finish_reason = "interrupted"
    if not quiet:
        print(flush=True)
    return output


def _ask() -> str | None:
    """The next line, or None at the end. At a terminal with line editing and history, from a pipe without a prompt."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines once it is imported
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None


def _json(output: Output) -> dict[str, Any]:
    fields = dataclasses.asdict(output)
    return {name: fields[name] for name in ("text", "token_ids", "logprobs", "finish_reason")}
