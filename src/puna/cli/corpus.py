"""Verbs from text to token shards, and what shards are turned into and checked by."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from puna.cli.answer import answer

Paths = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH...")]
Shards = Annotated[str, tyro.conf.arg(metavar="SHARDS")]


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

    answer(make_tokenizer(paths, vocab_size, out, special), json)


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
    answer(figures, json)


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

    answer(import_tokens(source, Tokenizer.load(tokenizer), out, format, dtype, shard_tokens), json)


def shards_export(
    shards: Shards,
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

    answer((export_megatron if to == "megatron" else export_nanogpt)(shards, out), json)


def shards_verify(shards: Shards, /, tokenizer: str = "", json: bool = False) -> None:
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
    answer(card, json)
