"""Verbs that make a model talk: one prompt, a file of prompts, a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

from puna.base.console import PunaError
from puna.cli.answer import answer
from puna.engine.options import EngineOptions
from puna.engine.request import SamplingParams

Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]
DType = Literal["float32", "bfloat16", "float16"]
T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]  # a dataclass whose fields are options of their own, without a prefix
_ENGINE = EngineOptions()


@dataclass(frozen=True)
class Parallel:
    """On how many processes."""

    tp: int = 1
    """Ranks that hold the model together: those of torchrun, or started here."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the options that `generate` and `chat` share."""

    max_tokens: int | None = None
    """Longest answer, in tokens; not given: 128, or what the context has room for."""
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this mass."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the likeliest one's probability."""
    typical_p: float = 1.0
    """Keep the tokens nearest to the expected surprise up to this mass."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were already seen less likely."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logits of tokens in the answer."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not shown."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer."""
    min_tokens: int = 0
    """Shortest answer, in tokens."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    seed: int | None = None
    """Same seed, same text."""

    def params(self, **more: Any) -> SamplingParams:
        """The engine's form of it."""
        return SamplingParams(**vars(self), **more)


def generate(
    model: Model,
    /,
    prompt: str | None = None,
    prompt_ids: str | None = None,
    prompts: str | None = None,
    out: str | None = None,
    n: int = 1,
    best_of: int | None = None,
    beams: int = 0,
    sampling: Flat[Sampling] = Sampling(),
    logprobs: bool = False,
    adapter: str | None = None,
    adapters: tuple[str, ...] = (),
    dtype: DType = "float32",
    device: str = "auto",
    parallel: Parallel = Parallel(),
    engine: Flat[EngineOptions] = _ENGINE,
    json: bool = False,
) -> None:
    """Complete a prompt, or a file of prompts; the text streams to stdout. Also under torchrun, with --parallel.tp.

    Args:
        model: A Hugging Face folder, a GGUF file or preset:NAME.
        prompt: Text to continue.
        prompt_ids: Token ids to continue, as 1,2,3 (instead of a prompt).
        prompts: JSON-lines file; a line has prompt, prompt_ids or messages, and may have sampling fields of its own.
        out: File for the answers to --prompts, a line each; a killed run goes on from OUT.part.
        n: Answers.
        best_of: Answers to make, of which the n likeliest are shown.
        beams: Width of a beam search; 0: no search.
        logprobs: Add log p of every token (with --json).
        adapter: Name of the LoRA adapter to use.
        adapters: LoRA adapters to load, as name=folder.
        dtype: Arithmetic.
        device: auto, cpu or cuda.
        json: Print one JSON object as the last line of stdout, and nothing else there.
    """
    from puna.serve.open_model import Setup
    from puna.serve.terminal import answer_prompts, complete, search

    setup = Setup(model, dtype, device, parallel.tp, adapters, engine)
    params = sampling.params(n=n, best_of=best_of, logprobs=0 if logprobs else None)
    if prompts is not None:
        if out is None or prompt is not None or prompt_ids is not None:
            raise PunaError("--prompts needs --out, and no other prompt", "--prompts FILE.jsonl --out ANSWERS.jsonl")
        found = answer_prompts(setup, prompts, out, params)
    elif out is not None:
        raise PunaError("--out is for the answers to --prompts", "leave it out; one prompt's answer goes to stdout")
    elif beams:
        found = search(setup, _prompt(prompt, prompt_ids), beams, params, adapter, quiet=json)
    else:
        found = complete(setup, _prompt(prompt, prompt_ids), params, adapter, quiet=json)
    if found:  # a rank that only computes has no answer
        answer(found, json)


def chat(
    model: Model,
    /,
    system: str = "",
    sampling: Flat[Sampling] = Sampling(temperature=0.7, top_p=0.95),
    dtype: DType = "float32",
    device: str = "auto",
    parallel: Parallel = Parallel(),
    engine: Flat[EngineOptions] = _ENGINE,
    json: bool = False,
) -> None:
    """Talk with a model in the terminal; /reset forgets, /exit or Ctrl-D ends. Reads lines from a pipe as well.

    Args:
        model: A Hugging Face folder with a chat template.
        system: A system message to begin with.
        dtype: Arithmetic.
        device: auto, cpu or cuda.
        json: Print the whole conversation as one JSON object at the end.
    """
    from puna.serve.open_model import Setup
    from puna.serve.terminal import talk

    found = talk(Setup(model, dtype, device, parallel.tp, (), engine), system, sampling.params())
    if found:
        answer(found, json)


def _prompt(text: str | None, ids: str | None) -> str | list[int]:
    if (text is None) == (ids is None):
        raise PunaError("give either --prompt or --prompt-ids", '--prompt "def main():" or --prompt-ids 1,2,3')
    if text is not None:
        return text
    try:
        return [int(part) for part in (ids or "").split(",")]
    except ValueError as error:
        raise PunaError(f"--prompt-ids {ids!r} is not a list of numbers", "write it as 1,2,3") from error
