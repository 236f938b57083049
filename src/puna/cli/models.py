"""Verbs about a model that is there: one completion, a talk, its card, another format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

from puna.base.console import PunaError
from puna.cli.answer import answer
from puna.engine.request import SamplingParams

Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]
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
    answer(complete(model, _prompt(prompt, prompt_ids), params, dtype, device, quiet=json), json)


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

    answer(talk(model, system, sampling.params(), dtype, device), json)


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


def _prompt(text: str | None, ids: str | None) -> str | list[int]:
    if (text is None) == (ids is None):
        raise PunaError("give either --prompt or --prompt-ids", '--prompt "def main():" or --prompt-ids 1,2,3')
    if text is not None:
        return text
    try:
        return [int(part) for part in (ids or "").split(",")]
    except ValueError as error:
        raise PunaError(f"--prompt-ids {ids!r} is not a list of numbers", "write it as 1,2,3") from error
