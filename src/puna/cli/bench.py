"""`puna bench`: measured tables of how fast a model is here, beside what this machine allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puna.base.console import PunaError, duration, size, table
from puna.cli.answer import answer
from puna.cli.generation import DType, Flat, Model
from puna.engine.options import EngineOptions

_ENGINE = EngineOptions()


def bench_decode(
    model: Model,
    /,
    batch: str = "1,8,32",
    context: int = 512,
    tokens: int = 32,
    rounds: int = 3,
    quantize: str = "none",
    dtype: DType = "float32",
    device: str = "auto",
    engine: Flat[EngineOptions] = _ENGINE,
    json: bool = False,
) -> None:
    """Decoding speed per batch: tokens/s, bytes read, and the share of the memory's measured speed.

    Args:
        model: A Hugging Face folder, a GGUF file or preset:NAME (random weights).
        batch: Sequences at a time, as 1,8,32.
        context: Tokens before the first measured one.
        tokens: Steps of a round.
        rounds: Rounds; the table shows the median, and the spread.
        quantize: Round the linear layers in memory, as int8, or int4_g32,lm_head=int8 with the head.
        dtype: Arithmetic.
        device: auto, cpu or cuda.
        json: Print one JSON object as the last line of stdout, and nothing else there.
    """
    from puna.serve import bench

    subject = bench.Subject(model, dtype, device, quantize, engine)
    found = bench.decode(subject, _numbers("--batch", batch), context, tokens, rounds)
    rows = [
        (str(r["batch"]), _rate(r), _spread(r), f"{r['ms_per_step']:.2f}", f"{r['host_share']:.0%}",
         size(r["weight_bytes"]), size(r["kv_bytes"]), f"{r['bytes_per_second'] / 1e9:.1f}",
         _share(r["bandwidth_share"]))
        for r in found["rows"]
    ]  # fmt: skip
    header = ("batch", "tok/s", "spread", "ms/step", "host", "weights", "KV", "GB/s", "of memory")
    _report(found | bench.about(subject), rows, header, json)


def bench_prefill(
    model: Model,
    /,
    lengths: str = "128,512,2048",
    rounds: int = 3,
    quantize: str = "none",
    dtype: DType = "float32",
    device: str = "auto",
    engine: Flat[EngineOptions] = _ENGINE,
    json: bool = False,
) -> None:
    """Speed of reading prompts per length: tokens/s, FLOP/s, and the share of a large matrix product's.

    Args:
        model: A Hugging Face folder, a GGUF file or preset:NAME (random weights).
        lengths: Tokens of a prompt, as 128,512,2048; those beyond the context are left out.
        rounds: Prompts per length; the table shows the median, and the spread.
        quantize: Round the linear layers in memory, to int4_g32 or int8 for example.
        dtype: Arithmetic.
        device: auto, cpu or cuda.
        json: Print one JSON object as the last line of stdout, and nothing else there.
    """
    from puna.serve import bench

    subject = bench.Subject(model, dtype, device, quantize, engine)
    found = bench.prefill(subject, _numbers("--lengths", lengths), rounds)
    rows = [
        (str(r["tokens"]), _rate(r), _spread(r), f"{r['ms']:.1f}", f"{r['flops'] / 1e9:.0f}", _share(r["matmul_share"]))
        for r in found["rows"]
    ]
    header = ("prompt", "tok/s", "spread", "ms", "GFLOP/s", "of matmul")
    _report(found | bench.about(subject), rows, header, json)


def bench_load(
    model: Model,
    /,
    rounds: int = 3,
    dtype: DType = "float32",
    device: str = "auto",
    engine: Flat[EngineOptions] = _ENGINE,
    json: bool = False,
) -> None:
    """Seconds from a fresh process to the first token, beside reading the weight files from the page cache.

    Args:
        model: A Hugging Face folder or a GGUF file.
        rounds: Fresh processes; the table shows medians.
        dtype: Arithmetic; one that differs from the files' means that every number is converted.
        device: auto, cpu or cuda.
        json: Print one JSON object as the last line of stdout, and nothing else there.
    """
    from puna.serve import bench

    subject = bench.Subject(model, dtype, device, "none", engine)
    found = bench.load(subject, rounds)
    rows = [
        (size(found["file_bytes"]), *(f"{r[name]:.3f}" for name in ("import", "read", "load", "first_token")),
         f"{r['ratio']:.2f}")
        for r in found["rows"]
    ]  # fmt: skip
    header = ("files", "import s", "read s", "load s", "first token s", "load / read")
    _report(found | bench.about(subject), rows, header, json)


def bench_serve(
    model: Model,
    /,
    requests: int = 64,
    concurrency: int = 32,
    scale: float = 0.0,
    seed: int = 0,
    quantize: str = "none",
    dtype: DType = "float32",
    device: str = "auto",
    engine: Flat[EngineOptions] = _ENGINE,
    json: bool = False,
) -> None:
    """A closed loop of users on the engine: tokens/s, time to the first token and between tokens, preemptions.

    Args:
        model: A Hugging Face folder, a GGUF file or preset:NAME (random weights).
        requests: Requests in all.
        concurrency: Users; each asks again as soon as it is answered.
        scale: Lengths, as a share of Azure's conversations (half of them above 1020 tokens in, 129 out); 0: what fits.
        seed: Of prompts and lengths.
        quantize: Round the linear layers in memory, to int4_g32 or int8 for example.
        dtype: Arithmetic.
        device: auto, cpu or cuda.
        json: Print one JSON object as the last line of stdout, and nothing else there.
    """
    from puna.serve import bench, traffic

    subject = bench.Subject(model, dtype, device, quantize, engine)
    found = traffic.serve(subject, traffic.Traffic(requests, concurrency, scale, seed))
    rows = [
        (f"{r['requests']} by {r['concurrency']}", duration(r["seconds"]), str(r["prompt_tokens"]),
         str(r["output_tokens"]), f"{r['rate']:.1f}", _waits(r["ttft_ms"]), _waits(r["between_tokens_ms"]),
         str(r["preemptions"]), f"{r['host_us_per_running']:.0f}")
        for r in found["rows"]
    ]  # fmt: skip
    waits = "ms p50/p90/p99"
    header = (
        "requests", "time", "in", "out", "out tok/s", f"first token {waits}", f"between {waits}", "preemptions",
        "host us per running",
    )  # fmt: skip
    _report(found | bench.about(subject), rows, header, json)


def _report(found: dict[str, Any], rows: Sequence[Sequence[str]], header: Sequence[str], json: bool) -> None:
    if not json:
        print(table(rows, header))
        print(f"\n{found['machine']}; commit {found['commit'] or 'unknown'}")
        if "path" in found:
            print(f"computed by: {found['path']}" + _kernels(found["kernels"]))
        if found.get("bandwidth"):
            print(f"memory here: {found['bandwidth'] / 1e9:.1f} GB/s, measured")
        if "matmul_flops" in found:
            print(f"matrix product here: {found['matmul_flops'] / 1e9:.0f} GFLOP/s in {found['dtype']}, measured")
        print(f"command: {found['command']}")
    answer(found, json)


def _kernels(kernels: dict[str, int]) -> str:
    return "".join(f"; {number} layers by {name}" for name, number in kernels.items())


def _rate(row: dict[str, Any]) -> str:
    return f"{row['rate']:.1f}"


def _spread(row: dict[str, Any]) -> str:
    return f"{row['lowest']:.1f}-{row['highest']:.1f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _waits(waits: dict[str, float] | None) -> str:
    return "-" if waits is None else "/".join(f"{waits[name]:.1f}" for name in ("p50", "p90", "p99"))


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise PunaError(f"{name} {text!r} is not a list of numbers", "write it as 1,8,32") from error
