"""From the words of a command line to its verb: one function per verb, and the overview of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import tyro

from puna.base.console import PunaError, table
from puna.cli.bench import bench_decode, bench_load, bench_prefill, bench_serve
from puna.cli.corpus import shards_export, shards_import, shards_verify, tokenize, tokenizer_train
from puna.cli.generation import chat, generate
from puna.cli.models import convert, info
from puna.cli.quantize import quantize
from puna.cli.training import plan, quickstart, train

VERBS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "tokenizer train": tokenizer_train,
    "tokenize": tokenize,
    "shards import": shards_import,
    "shards export": shards_export,
    "shards verify": shards_verify,
    "train": train,
    "plan": plan,
    "quantize": quantize,
    "convert": convert,
    "generate": generate,
    "chat": chat,
    "bench decode": bench_decode,
    "bench prefill": bench_prefill,
    "bench load": bench_load,
    "bench serve": bench_serve,
    "info": info,
}


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
        arguments = _gather_keys(arguments) if verb == "plan" else _join_repeats(arguments)
        tyro.cli(VERBS[verb], prog=f"puna {verb}", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


def _gather_keys(arguments: list[str]) -> list[str]:
    """--section.key value (or =value) anywhere -> one `--set section.key value ...` at the end."""
    rest, keys = [], []
    words = iter(arguments)
    for word in words:
        if word.startswith("--") and "." in word.partition("=")[0]:
            key, equals, value = word[2:].partition("=")
            keys += [key, value if equals else next(words, "")]
        else:
            rest.append(word)
    return [*rest, "--set", *keys] if keys else rest


def _join_repeats(arguments: list[str]) -> list[str]:
    """--override a --json --override b -> --json --override a b: a list may be given in several pieces."""
    rest: list[str] = []
    lists: dict[str, list[str]] = {}
    words = list(arguments)
    while words:
        flag, equals, value = words[0].partition("=")
        if flag not in _LISTS:
            rest.append(words.pop(0))
            continue
        del words[0]
        values = lists.setdefault(flag, [])
        values += [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
    return [*rest, *(word for flag, values in lists.items() for word in (flag, *values))]


_LISTS = ("--override", "--calib", "--eval", "--set")


def _overview() -> str:
    rows = [(f"puna {verb}", (handler.__doc__ or "").splitlines()[0]) for verb, handler in VERBS.items()]
    return (
        "Llama-family language models, from raw text to served tokens.\n\n"
        + table(rows)
        + "\n\nMODEL is a Hugging Face folder or preset:NAME. `puna VERB --help` says more; every verb takes --json."
    )
