"""Generation as a person meets it in a terminal: a completion, a conversation."""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from puna.base.console import PunaError, count, say
from puna.engine.beam import BeamParams
from puna.engine.llm import LLM, Prompt
from puna.engine.request import Output, SamplingParams
from puna.serve.answer_file import Job, answer_file
from puna.serve.open_model import Setup, open_llm
from puna.text.chat import Chat
from puna.weights.fetch import local_folder

DEFAULT_TOKENS, CHAT_TOKENS = 128, 512


def complete(
    setup: Setup, prompt: Prompt, params: SamplingParams, adapter: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Answers to one prompt, streamed to stdout unless `quiet`; returns the JSON of the command line's contract.

    A rank of a torchrun job that only computes returns {}.
    """
    with open_llm(setup) as llm:
        if llm is None:
            return {}
        started = time.perf_counter()
        params = fitted(llm, prompt, params)
        outputs = _answers(llm, prompt, params, adapter, quiet)
        seconds = time.perf_counter() - started
        report = llm.engine.stats().get("speculation")
    generated = sum(len(output.token_ids) for output in outputs)
    usage = {
        "prompt_tokens": outputs[0].prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": outputs[0].prompt_tokens + generated,
    }
    say(f"{generated} tokens in {seconds:.2f}s ({count(generated / seconds)} tok/s), {outputs[-1].finish_reason}")
    found: dict[str, Any] = {"outputs": [_json(output) for output in outputs], "usage": usage, "seconds": seconds}
    if report is not None:
        say(f"speculation: {report['accepted']} of {report['proposed']} proposed tokens were right")
        found["speculation"] = report
    return found


def search(
    setup: Setup, prompt: Prompt, width: int, params: SamplingParams, adapter: str | None, quiet: bool
) -> dict[str, Any]:
    """The best answers of a beam search, best first."""
    with open_llm(setup) as llm:
        if llm is None:
            return {}
        params = fitted(llm, prompt, params)
        beams = BeamParams(width, params.max_tokens or 1, params.n, ignore_eos=params.ignore_eos)
        outputs = llm.beam_search(prompt, beams, adapter)
    for output in outputs:
        if not quiet:
            print(output.text)
    return {"outputs": [_json(output) for output in outputs]}


def fitted(llm: LLM, prompt: Prompt, params: SamplingParams, most: int = DEFAULT_TOKENS) -> SamplingParams:
    """max_tokens, where nobody asked for a number: `most`, or as many as the context has room for."""
    if params.max_tokens is not None:
        return params
    room = llm.engine.max_model_len - len(llm.encode(prompt))
    return dataclasses.replace(params, max_tokens=min(most, room)) if room > 0 else params


def _answers(llm: LLM, prompt: Prompt, params: SamplingParams, adapter: str | None, quiet: bool) -> list[Output]:
    if params.n == 1 and not params.is_ranked:
        return [_show(llm, prompt, params, 0, quiet, adapter)]
    outputs = llm.generate([prompt], params, adapter)  # together: they share the prompt
    for output in outputs:
        if not quiet:
            print(output.text, flush=True)
    return outputs


def talk(setup: Setup, system: str, params: SamplingParams) -> dict[str, Any]:
    """A conversation on stdin and stdout; returns its messages."""
    chat = Chat.load(local_folder(setup.model, state=False))
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    with open_llm(setup) as llm:
        if llm is None:
            return {}
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
                text = _show(llm, ids, fitted(llm, ids, params, CHAT_TOKENS), 0, quiet=False).text
                messages.append({"role": "assistant", "content": text})
    return {"messages": messages}


def answer_prompts(setup: Setup, prompts: str, out: str, params: SamplingParams) -> dict[str, Any]:
    """A file of prompts to a file of answers."""
    with open_llm(setup) as llm:
        if llm is None:
            return {}
        chat = find_chat(setup.model)
        params = dataclasses.replace(params, max_tokens=params.max_tokens or DEFAULT_TOKENS)
        return answer_file(llm, chat, Job(Path(prompts), Path(out), params, setup.model))


def find_chat(model: str) -> Chat | None:
    """The chat template beside a model, if it has one."""
    try:
        return Chat.load(local_folder(model, state=False))
    except PunaError:
        return None


def _show(
    llm: LLM, prompt: Prompt, params: SamplingParams, index: int, quiet: bool, adapter: str | None = None
) -> Output:
    """Stream one answer; a Ctrl-C keeps what is there."""
    output = Output(finish_reason="interrupted")
    try:
        for piece, so_far in llm.stream(prompt, params, index, adapter):
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
