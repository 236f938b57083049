"""The verb that makes models small."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Literal

import tyro

from puna.base.console import PunaError
from puna.cli.answer import answer
from puna.cli.models import Model

Format = Literal["auto", "compressed-tensors", "gptq", "gptq_v2", "awq", "puna"]


def quantize(
    model: Model,
    /,
    out: str,
    preset: str = "",
    weights: str = "",
    kv: str = "",
    calib: tuple[str, ...] = (),
    eval: tuple[str, ...] = (),
    override: tuple[str, ...] = (),
    target_bits: float = 0.0,
    samples: int = 0,
    seq_len: int = 0,
    eval_tokens: int = 8192,
    max_ppl_increase: str = "",
    format: Format = "auto",
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY VALUE")] = (),
    device: str = "auto",
    json: bool = False,
) -> None:
    """Quantize a model, layer by layer in bounded memory, and say in a report card what was lost.

    Presets: int8_wo, int4_wo, int4_hqq, int4_awq, int4_gptq, int3_gptq, int4_lorc, w8a8_sq, llm_int8, fp8, fp8_static.
    A run that was interrupted goes on at its layer. Under torchrun the calibration text is split over the ranks.

    Args:
        model: A Hugging Face folder.
        out: Folder to write; it must not exist.
        preset: Where to start; without one, what the model was trained for (quantization-aware training).
        weights: Number format: int8, int4_g128, int4_g32_asym, int3_g128, fp8, fp8_tensor, ...
        kv: KV cache: int8, fp8, or int8_head, fp8_head for a scale per head.
        calib: Files or folders with text, or chats (jsonl with messages). Default: Python's standard library.
        eval: Held-out text for the report. Default: a part of calib that is not calibrated on.
        override: Formats for some layers, as "*.down_proj=int8"; later ones win; none leaves a layer as it is.
        target_bits: Average bits per weight, scales included; layers get bits by measured sensitivity.
        samples: Calibration sequences; 0: six tokens for every input of the widest layer.
        seq_len: Tokens of each; 0: 512, or the model's context.
        eval_tokens: Held-out tokens for the report; 0: none, and nothing is compared.
        max_ppl_increase: Largest increase of perplexity, as 1%; a worse result is kept aside and ends with exit code 2.
        format: Layout of the files; auto: compressed-tensors (vLLM, transformers) where it can hold the result.
        set: Other keys of the config: rounding, rescale, alpha, clip, act_order, damping, low_rank, activations, ...
        device: auto, cpu or cuda.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.serve.quantize import Request, choose_config, run_quantize

    if len(set) % 2:
        raise PunaError(
            f"--set takes pairs of key and value, got {len(set)} words", "--set damping 0.05 act_order false"
        )
    changes = {"weights": weights, "kv": kv, "overrides": override, "target_bits": target_bits, "samples": samples,
               "seq_len": seq_len}  # fmt: skip
    given = {key: value for key, value in changes.items() if value} | dict(zip(set[::2], set[1::2], strict=True))
    config = choose_config(model, preset, given)
    request = Request(
        model,
        out,
        config,
        calib,
        eval,
        eval_tokens,
        max_ppl_increase,
        format,
        device,
        shlex.join(["puna", *sys.argv[1:]]),
    )
    answer(run_quantize(request, quiet=json), json)
