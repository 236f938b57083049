"""Verbs about a model that is there: its card, another format."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from puna.cli.answer import answer

Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]


def info(model: Model, /, seq_len: int = 0, verify: bool = False, json: bool = False) -> None:
    """A model's card: parameters, FLOPs and KV bytes per token, files, checks.

    Args:
        model: A Hugging Face folder, a step folder of a run, or preset:NAME.
        seq_len: Sequence length for the FLOP count; 0: the model's context, 8,192 at most.
        verify: Instead of the card: compare every file of a run's save with the checksums it was sealed with.
        json: Print one JSON object as the last line of stdout.
    """
    if verify:
        from puna.serve.check import check_save

        found = check_save(model)
        if not json:
            print(f"{model}: {found['files']} files, all as saved")
        answer(found, json)
        return
    from puna.serve.card import model_card, print_card

    card = model_card(model, seq_len)
    if not json:
        print_card(card)
    answer(card, json)


def convert(
    source: Annotated[str, tyro.conf.arg(metavar="SRC")],
    /,
    to: Literal["hf", "compressed-tensors", "gptq", "gptq_v2", "awq", "gguf", "meta"],
    out: str,
    type: str = "Q4_K_M",
    imatrix: str = "",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    no_tokenizer: bool = False,
    json: bool = False,
) -> None:
    """Bring a model into another format, without rounding it anew, and read the result back.

    Packed codes are moved as they are between compressed-tensors, GPTQ and AWQ; hf, meta and gguf get plain weights
    (gguf rounds them to its type). What is there is never overwritten.

    Args:
        source: A model folder (plain or quantized), Meta's folder, or a .gguf file.
        to: Format to write.
        out: Folder to write, or FILE.gguf; it must not exist.
        type: Of a gguf file: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, ...
        imatrix: Importance matrix of llama.cpp for a gguf file.
        dtype: Of plain numbers; auto: the source's, float32 for dequantized ones.
        no_tokenizer: Leave the tokenizer out.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.serve.convert import Conversion, print_conversion, run_convert

    found = run_convert(Conversion(source, to, out, type, imatrix, dtype, not no_tokenizer))
    if not json:
        print_conversion(found)
    answer(found, json)
