"""From the recipe's [model] section to the shape of a model: for training and for planning, so without torch."""

from __future__ import annotations

import dataclasses

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.text.tokenizer import Tokenizer
from puna.train.recipe import ModelSection


def choose_spec(section: ModelSection, tokenizer: Tokenizer | None, seq_len: int) -> Spec:
    """The preset with the recipe's changes and the tokenizer's ids (none yet while only planning)."""
    spec = Spec.preset(section.preset)
    given = {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if getattr(section, f.name)}
    rope = {k: given.pop(k) for k in ("max_position_embeddings", "rope_theta") if k in given}
    shape = {k: v for k, v in given.items() if k not in ("path", "preset")}
    if "tie_word_embeddings" in shape:
        shape["tie_word_embeddings"] = _parse_tied(section.tie_word_embeddings)
    if {"hidden_size", "num_attention_heads"} & shape.keys() and "head_dim" not in shape:
        shape["head_dim"] = _head_dim(
            shape.get("hidden_size", spec.hidden_size), shape.get("num_attention_heads", spec.num_attention_heads)
        )
    if "num_hidden_layers" in shape:
        shape["sliding_windows"] = ()  # one entry per layer; no preset has a window
    if tokenizer is not None:
        shape |= _from_tokenizer(tokenizer, shape.get("vocab_size", tokenizer.vocab_size))
    rope.setdefault("max_position_embeddings", max(spec.max_len, seq_len))
    return spec.replace(**shape, rope=dataclasses.replace(spec.rope, **rope))


def vocab_error(tokenizer_size: int, model_size: int) -> PunaError:
    return PunaError(
        f"the tokenizer has {tokenizer_size} tokens, the model's vocabulary only {model_size}",
        f"use --model.vocab_size {tokenizer_size} or the tokenizer that belongs to the model",
    )


def _from_tokenizer(tokenizer: Tokenizer, vocab: int) -> dict[str, object]:
    if vocab < tokenizer.vocab_size:
        raise vocab_error(tokenizer.vocab_size, vocab)
    return {
        "vocab_size": vocab,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_ids": tuple(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }


def _head_dim(width: int, heads: int) -> int:
    if width % heads:
        raise PunaError(
            f"hidden_size {width} is not divisible by num_attention_heads {heads}",
            f"use a multiple of {heads}, or set model.head_dim",
        )
    return width // heads


def _parse_tied(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise PunaError(f"model.tie_word_embeddings is {text!r}", 'use "true" or "false"')
    return text.lower() == "true"
