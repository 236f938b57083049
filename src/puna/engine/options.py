"""How an engine is set up: its limits, its memory, its fast paths. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass

from puna.base.console import PunaError

KV_TYPES = ("auto", "none", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineOptions:
    """Limits and choices; the defaults suit one machine.

    Raises PunaError for numbers that make no engine.
    """

    max_num_seqs: int = 256
    """Answers that are worked on at the same time; more wait."""
    max_num_batched_tokens: int = 1024
    """Tokens computed in one step: long prompts go in pieces of this size."""
    max_model_len: int = 0
    """Longest prompt and answer together; 0: the model's context."""
    page_size: int = 16
    """Tokens of a page of the KV cache."""
    kv: str = "auto"
    """The cache's numbers: auto (as the folder says, else dtype), none (dtype), float32, bfloat16 or float16."""
    kv_memory: float = 0.0
    """GiB for the KV cache; 0: up to half of what is free, as much as max_num_seqs could ever need."""
    prefix_caching: bool = True
    """Keep the keys and values of prompts for later requests that begin alike."""
    speculate: str = "none"
    """Propose tokens ahead: none, ngram, suffix, or a draft model's folder. The answers stay the same."""
    max_drafts: int = 8
    """Most tokens proposed ahead."""
    activations: str = "exact"
    """exact, or int8: faster with quantized weights, inputs of every product are rounded."""
    native: bool = True
    """Use the native decode step where there is one."""
    compile: bool = False
    """Compile the blocks with torch.compile at the start (for GPUs; slower on a CPU)."""

    def __post_init__(self) -> None:
        check_kv(self.kv)
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "max_drafts"):
            if getattr(self, name) < 1:
                raise PunaError(f"{name} is {getattr(self, name)}", "use 1 or more")
        if self.max_model_len < 0 or self.kv_memory < 0:
            raise PunaError(
                f"max_model_len is {self.max_model_len} and kv_memory {self.kv_memory}", "0 chooses; else above 0"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise PunaError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}",
                "every running answer needs one token of each step",
            )
        if self.activations not in ("exact", "int8"):
            raise PunaError(f"activations is {self.activations!r}", "use exact or int8")


def check_kv(kv: str) -> None:
    """Refuse what is no way to keep a cache: scales of int8 come from calibration, so they cannot be asked for here."""
    if kv not in KV_TYPES:
        raise PunaError(f"kv is {kv!r}", f"use {', '.join(KV_TYPES)}; `puna quantize --kv int8` calibrates a cache")
