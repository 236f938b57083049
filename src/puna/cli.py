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
        arguments = _gather_keys(arguments) if verb == "plan" else arguments
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


def tokenizer_train(
    paths: Paths, /, vocab_size: int, out: str, special: tuple[str, ...] = (), json: bool = False
) -> None:
    """Train a byte-level BPE on files and save it as a Hugging Face tokenizer folder.

    Args:
        paths: Files, folders or globs with UTF-8 text.
        vocab_size: Tokens in all, the 256 bytes and the special tokens included.
        out: Folder to write.
        special: Special tokens beside the usual five, such as "<|fim_prefix|>" "<|fim_suffix|>" "<|fim_middle|>".
        json: Print one JSON object as the last line of stdout.
    """
    from puna.serve.quickstart import make_tokenizer

    _answer(make_tokenizer(paths, vocab_size, out, special), json)


def tokenize(
    paths: Paths,
    /,
    tokenizer: str,
    out: str,
    workers: int = 0,
    shard_tokens: int = 2**24,
    text_field: str = "text",
    tag: bool = False,
    tag_field: str = "",
    dedup: Literal["none", "exact", "near"] = "none",
    val_fraction: float = 0.0,
    strict: bool = False,
    json: bool = False,
) -> None:
    """Turn text into token shards for training, on all cores; after a kill the same command goes on.

    Args:
        paths: .txt, .md, source files, .jsonl, .parquet, also .gz and .zst; folders, quoted globs, s3:// gs:// az://.
        tokenizer: Tokenizer folder (or a model's folder).
        out: Folder or s3:// prefix of the shards. What an interrupted run finished there is kept.
        workers: Processes; 0: one per usable core. The shards do not depend on it.
        shard_tokens: Tokens after which a shard ends; 16,777,216 tokens are 32 MiB (64 MiB above 65,536 ids).
        text_field: Field of a jsonl or parquet row that holds its text; dots lead into objects: meta.body.
        tag: Put each document's domain before its text: the host of its url, else its source, else its folder.
        tag_field: Field whose value is the domain instead; a URL gives its host.
        dedup: Leave out exact duplicates, or those that share about 3/4 of their 7-token shingles as well (MinHash).
        val_fraction: Share of the documents that goes to OUT/validation, chosen by a hash of their tokens.
        strict: Refuse invalid UTF-8 and broken lines instead of counting them.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.corpus.tokenize import tokenize_corpus

    figures = tokenize_corpus(
        paths,
        tokenizer,
        out,
        workers=workers,
        shard_tokens=shard_tokens,
        text_field=text_field,
        tag=tag,
        tag_field=tag_field,
        dedup=dedup,
        val_fraction=val_fraction,
        strict=strict,
    )
    _answer(figures, json)


def shards_import(
    source: Annotated[str, tyro.conf.arg(metavar="SRC")],
    /,
    tokenizer: str,
    out: str,
    format: Literal["auto", "megatron", "nanogpt"] = "auto",
    dtype: Literal["auto", "uint16", "uint32"] = "auto",
    shard_tokens: int = 2**24,
    json: bool = False,
) -> None:
    """Turn token files of Megatron-LM (.bin and .idx) or nanoGPT (.bin) into token shards.

    Args:
        source: A .bin file, or the prefix of a .bin and .idx; nanoGPT's with or without llm.c's header.
        tokenizer: Folder of the tokenizer that the file was made with.
        out: Folder or s3:// prefix of the shards; it must be empty.
        format: auto is megatron where an .idx lies beside the .bin.
        dtype: Of a nanoGPT file without a header; auto: uint16 for vocabularies up to 65,536 tokens.
        shard_tokens: Tokens after which a shard ends.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.corpus.interchange import import_tokens
    from puna.text.tokenizer import Tokenizer

    _answer(import_tokens(source, Tokenizer.load(tokenizer), out, format, dtype, shard_tokens), json)


def shards_export(
    shards: Annotated[str, tyro.conf.arg(metavar="SHARDS")],
    /,
    to: Literal["megatron", "nanogpt"],
    out: str,
    json: bool = False,
) -> None:
    """Write token shards as files of Megatron-LM or nanoGPT; every shard is checked on the way.

    Args:
        shards: Folder or s3:// prefix of shards.
        to: megatron: OUT.bin and OUT.idx; nanogpt: one .bin, in which only eos shows where a document ends.
        out: Prefix (megatron) or file (nanogpt) to write; it must not exist.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.corpus.interchange import export_megatron, export_nanogpt

    _answer((export_megatron if to == "megatron" else export_nanogpt)(shards, out), json)


def shards_verify(
    shards: Annotated[str, tyro.conf.arg(metavar="SHARDS")], /, tokenizer: str = "", json: bool = False
) -> None:
    """Check every file of a shard folder, name what is damaged, and show what it holds.

    Args:
        shards: Folder or s3:// prefix of shards.
        tokenizer: Tokenizer folder; the shards must be of its vocabulary.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.corpus.verify import print_shards, verify_shards
    from puna.text.tokenizer import Tokenizer

    card = verify_shards(shards, Tokenizer.load(tokenizer) if tokenizer else None)
    if not json:
        print_shards(card)
    _answer(card, json)


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


def plan(
    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE.toml")], /, gpus: int = 0, gpu: str = "h100",
    tokens: float = 0.0, price: float = 0.0, storage: float = 2.0, search: bool = False, picture: str = "",
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY VALUE")] = (), json: bool = False,
) -> None:  # fmt: skip
    """Say what a recipe needs on GPUs, how fast it runs, what it costs and what to change; starts nothing.

    Any key of the recipe can be changed as in training: --parallel.tp 8 --train.activation_checkpointing full.

    Args:
        recipe: A training recipe.
        gpus: How many; 0: the product of the recipe's degrees.
        gpu: h100, h100-500w, h200, a100-80, b200 or mi300x.
        tokens: Tokens to train on, such as 15e12; 0: the recipe's steps.
        price: Dollars per GPU and hour.
        storage: Rate at which a node writes checkpoints, in GB/s.
        search: Propose the fastest meshes that fit, over all ways to cut this many GPUs.
        picture: File for the pipeline schedule and memory per rank (.png, .svg).
        set: Keys of the recipe; --section.key value is the same.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.serve.plan import Budget, make_plan, print_plan

    changed = parse_overrides([f"--{key}={value}" for key, value in zip(set[::2], set[1::2], strict=True)])
    report = make_plan(recipe, changed, gpus, gpu, Budget(tokens, price, storage), search, picture)
    if not json:
        print_plan(report)
    _answer(report, json)


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
    "tokenize": tokenize,
    "shards import": shards_import,
    "shards export": shards_export,
    "shards verify": shards_verify,
    "train": train,
    "plan": plan,
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
