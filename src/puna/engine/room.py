"""How much memory the KV cache may take, and what fits into it: decided before the first request, with numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from puna.base.console import PunaError, size
from puna.base.hardware import DTYPES, available_memory
from puna.engine.options import EngineOptions
from puna.engine.ranks.shard import local_kv_heads
from puna.model.transformer import Transformer
from puna.ops.formats.kv import KVScales
from puna.ops.paged import Pages

_SHARE = 0.5  # of the free memory, unless told otherwise: activations, logits and other programs need the rest


@dataclass(frozen=True)
class Room:
    """`num_pages` pages (the scratch page included) for sequences of up to `max_model_len` tokens."""

    num_pages: int
    max_model_len: int


def make_pages(model: Transformer, options: EngineOptions, neighbours: int = 1) -> tuple[Pages, int]:
    """The pages and the longest sequence. `neighbours` share this machine's memory.

    Errors: PunaError for scales of another model, or too little memory.
    """
    spec, scales = model.spec, None
    if options.kv == "auto" and (scales := getattr(model, "kv_scales", None)) is not None:
        check_scales(scales, spec.num_hidden_layers, local_kv_heads(model))
        scales = scales.to(model.embed.device)
    dtype = DTYPES.get(options.kv, model.embed.dtype)
    heads = local_kv_heads(model)
    probe = Pages.of(spec.num_hidden_layers, heads, spec.head_dim, 1, options.page_size, dtype, "cpu", scales)
    room = plan_room(options, spec.max_len, probe.bytes_per_token, _free_memory(model.embed.device) // neighbours)
    try:
        pages = Pages.of(
            spec.num_hidden_layers, heads, spec.head_dim, room.num_pages, options.page_size, dtype,
            model.embed.device, scales,
        )  # fmt: skip
    except (RuntimeError, MemoryError) as error:
        need = room.num_pages * options.page_size * probe.bytes_per_token
        raise PunaError(f"no memory for a KV cache of {size(need)}", "lower kv_memory or max_num_seqs") from error
    return pages, room.max_model_len


def plan_room(options: EngineOptions, context: int, bytes_per_token: int, free: int) -> Room:
    """From the model's `context` and `free` bytes of memory.

    What is asked for must hold one sequence of max_model_len. Where nothing is asked for, max_model_len gives way.
    """
    if options.max_model_len > context:
        raise PunaError(
            f"max_model_len {options.max_model_len} is above the model's context of {context}", f"use up to {context}"
        )
    page_bytes = bytes_per_token * options.page_size
    budget = int(options.kv_memory * 2**30) if options.kv_memory else int(free * _SHARE)
    longest = options.max_model_len or context
    fits = max(0, budget // page_bytes - 1) * options.page_size  # one page is scratch
    if fits < longest:
        if options.max_model_len or options.kv_memory or fits < options.page_size:
            raise PunaError(
                f"the KV cache may take {size(budget)}, which is {fits} tokens of {size(bytes_per_token)}; one "
                f"sequence of max_model_len {longest} needs {size((longest + options.page_size) * bytes_per_token)}",
                f"use max_model_len {fits} or less, more kv_memory, or a model quantized with --kv int8",
            )
        longest = fits
    most = options.max_num_seqs * -(-longest // options.page_size)
    return Room(min(budget // page_bytes, most + 1), longest)


def check_scales(scales: KVScales, layers: int, heads: int) -> None:
    """Refuse scales of another model."""
    if len(scales.keys) != layers or scales.heads not in (None, heads):
        raise PunaError(
            f"the KV cache has scales for {len(scales.keys)} layers"
            f"{f' of {scales.heads} heads' if scales.heads else ''}, the model has {layers} of {heads}",
            "the folder mixes files of two models; quantize it again with --kv",
        )


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
