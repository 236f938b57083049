"""The front door: one verb per function. Nothing heavy is imported until a verb runs, so `--help` is instant."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

from puna.base.config import describe, parse_overrides
from puna.base.console import PunaError, emit_json, table
from puna.engine.request import SamplingParams

Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]
Paths = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH...")]
DType = Literal["float32", "bfloat16", "float16"]
T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]  # a dataclass whose fields are options of their own, without a prefix


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the options that `generate` and `chat` share."""

    max_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this mass."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were already seen less likely."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logits of tokens in the answer."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not shown."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    seed: int | None = None
    """Same seed, same text."""

    def params(self, **more: Any) -> SamplingParams:
        """The engine's form of it."""
        return SamplingParams(**vars(self), **more)


def run(arguments: Sequence[str]) -> None:
    """Find the verb and hand it the rest of the command line."""
    words = list(arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if words[0] in ("-V", "--version"):
        from puna import __version__

        print(f"puna {__version__}")
        return
    for length in (2, 1):
        verb = " ".join(words[:length])
        if len(words) >= length and verb in VERBS:
            _call(verb, words[length:])
            return
    near = difflib.get_close_matches(" ".join(words[:2]), VERBS, 1) or difflib.get_close_matches(words[0], VERBS, 1)
    raise PunaError(
        f"puna has no verb {words[0]!r}", f"did you mean `puna {near[0]}`?" if near else f"verbs: {', '.join(VERBS)}"
    )


def _call(verb: str, arguments: list[str]) -> None:
    if verb == "train":  # its options are the recipe's keys
        train(arguments)
    else:
        tyro.cli(VERBS[verb], prog=f"puna {verb}", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


def _overview() -> str:
    rows = [(f"puna {verb}", (handler.__doc__ or "").splitlines()[0]) for verb, handler in VERBS.items()]
    return (
        "Llama-family language models, from raw text to served tokens.\n\n"
        + table(rows)
        + "\n\nMODEL is a Hugging Face folder or preset:NAME. `puna VERB --help` says more; every verb takes --json."
    )


def quickstart(out: str = "quickstart", minutes: float = 3.0, text: tuple[str, ...] = (), json: bool = False) -> None:
    """The whole road on this machine, no download: tokenizer, training, a completion.

    Args:
        out: Folder of the run. An unfinished run in it is continued.
        minutes: Time to spend on training.
        text: Files or folders to learn from. Default: the sources of Python's standard library.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.serve.quickstart import run_quickstart

    _answer(run_quickstart(out, minutes, text), json)


def tokenizer_train(paths: Paths, /, vocab_size: int, out: str, json: bool = False) -> None:
    """Train a byte-level BPE on files and save it as a Hugging Face tokenizer folder.

    Args:
        paths: Files, folders or globs with UTF-8 text.
        vocab_size: Tokens in all, the 256 bytes and the special tokens included.
        out: Folder to write.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.serve.quickstart import make_tokenizer

    _answer(make_tokenizer(paths, vocab_size, out), json)


def train(arguments: list[str]) -> None:
    """Train by a recipe; continues what the recipe's `out` already holds."""
    from puna.train.recipe import Recipe

    if not arguments or {"-h", "--help"} & set(arguments):
        rows = [(f"--{key}", default, text) for key, default, text in describe(Recipe)]
        print(f"usage: puna train RECIPE.toml [--section.key value ...] [--json]\n\n{train.__doc__}\n")
        print(table(rows, ("key", "default", "meaning")))
        return
    json = "--json" in arguments
    words = [word for word in arguments if word != "--json"]
    if words[0].startswith("--"):
        raise PunaError(f"the recipe comes first, got {words[0]}", "puna train RECIPE.toml --section.key value")
    from puna.train.loop import train as run_training

    _answer(run_training(words[0], parse_overrides(words[1:])), json)


def generate(
    model: Model,
    /,
    prompt: str | None = None,
    prompt_ids: str | None = None,
    n: int = 1,
    sampling: Flat[Sampling] = Sampling(),
    logprobs: bool = False,
    dtype: DType = "float32",
    device: str = "auto",
    json: bool = False,
) -> None:
    """Complete a prompt, once; the text streams to stdout.

    Args:
        model: A Hugging Face folder or preset:NAME.
        prompt: Text to continue.
        prompt_ids: Token ids to continue, as 1,2,3 (instead of a prompt).
        n: Answers.
        logprobs: Add log p of every token (with --json).
        dtype: Arithmetic.
        device: auto, cpu or cuda.
        json: Print one JSON object as the last line of stdout, and nothing else there.
    """
    from puna.serve.terminal import complete

    params = sampling.params(n=n, logprobs=0 if logprobs else None)
    _answer(complete(model, _prompt(prompt, prompt_ids), params, dtype, device, quiet=json), json)


def chat(
    model: Model,
    /,
    system: str = "",
    sampling: Flat[Sampling] = Sampling(max_tokens=512, temperature=0.7, top_p=0.95),
    dtype: DType = "float32",
    device: str = "auto",
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
    from puna.serve.terminal import talk

    _answer(talk(model, system, sampling.params(), dtype, device), json)


def info(model: Model, /, seq_len: int = 0, json: bool = False) -> None:
    """A model's card: parameters, FLOPs and KV bytes per token, files, checks.

    Args:
        model: A Hugging Face folder, a step folder of a run, or preset:NAME.
        seq_len: Sequence length for the FLOP count; 0: the model's context, 8,192 at most.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.serve.card import model_card, print_card

    card = model_card(model, seq_len)
    if not json:
        print_card(card)
    _answer(card, json)


VERBS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "tokenizer train": tokenizer_train,
    "train": train,
    "generate": generate,
    "chat": chat,
    "info": info,
}


def _prompt(text: str | None, ids: str | None) -> str | list[int]:
    if (text is None) == (ids is None):
        raise PunaError("give either --prompt or --prompt-ids", '--prompt "def main():" or --prompt-ids 1,2,3')
    if text is not None:
        return text
    try:
        return [int(part) for part in (ids or "").split(",")]
    except ValueError as error:
        raise PunaError(f"--prompt-ids {ids!r} is not a list of numbers", "write it as 1,2,3") from error


def _answer(payload: dict[str, Any], json: bool) -> None:
    sys.stdout.flush()
    if json:
        emit_json(payload)
