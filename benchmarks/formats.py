"""How fast weights turn into each number format and back, in MB/s of fp32; llama.cpp's own speed where it is there.

    python benchmarks/formats.py              # best of 5 rounds on a matrix of 4096 x 4096; writes results/formats.json
    python benchmarks/formats.py --rows 1024 --rounds 3

Best of many rounds, because other processes on the machine only ever add time. llama.cpp's column (one thread of its C
code) needs the xllamacpp wheel.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from side_by_side import RESULTS, about
from torch import Tensor

from puna.base.console import table
from puna.ops.formats.awq import from_awq, to_awq
from puna.ops.formats.compressed import from_compressed, to_compressed
from puna.ops.formats.gguf import TYPES, dequantize_gguf, quantize_gguf
from puna.ops.formats.gptq import from_gptq, to_gptq
from puna.ops.formats.packed import Packed, round_to_nearest
from puna.ops.formats.scheme import FLOAT8, FLOAT8_TENSOR, INT4, INT8, Scheme

WIDTH = 4096
SCHEMES = {
    "int8 per channel": INT8,
    "int4 groups of 128": INT4,
    "int4 groups of 32": Scheme(4, "int", True, "group", 32),
    "int4 asymmetric, groups of 128": Scheme(4, "int", False, "group", 128),
    "int3 groups of 128": Scheme(3, "int", True, "group", 128),
    "float8 per channel": FLOAT8,
    "float8 per tensor": FLOAT8_TENSOR,
}


def speed(weight: Tensor, rounds: int, run: Callable[[], object]) -> float:
    """MB of fp32 weights per second of the fastest round."""
    seconds = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds = min(seconds, time.perf_counter() - start)
    return weight.numel() * 4 / seconds / 1e6


def rounding_rows(weight: Tensor, rounds: int) -> list[dict]:
    rows = []
    for name, scheme in SCHEMES.items():
        packed = round_to_nearest(weight, scheme, torch.float16)
        rows.append({
            "format": name,
            "quantize": speed(weight, rounds, lambda s=scheme: round_to_nearest(weight, s, torch.float16)),
            "dequantize": speed(weight, rounds, packed.dequantize),
        })  # fmt: skip
    return rows


def layout_rows(weight: Tensor, rounds: int) -> list[dict]:
    """Only the packing: from the canonical form to the layout, and back."""
    packed = round_to_nearest(weight, INT4, torch.float16)
    layouts: dict[str, tuple[Callable[[Packed], dict], Callable[[dict], Packed]]] = {
        "compressed-tensors int4": (to_compressed, lambda tensors: from_compressed(tensors, INT4)),
        "GPTQ int4": (to_gptq, lambda tensors: from_gptq(tensors, 4, 128)),
        "AWQ int4": (to_awq, from_awq),
    }
    rows = []
    for name, (write, read) in layouts.items():
        tensors = write(packed)
        rows.append({
            "format": f"{name} (layout only)",
            "quantize": speed(weight, rounds, lambda w=write: w(packed)),
            "dequantize": speed(weight, rounds, lambda r=read, t=tensors: r(t)),
        })  # fmt: skip
    return rows


def gguf_rows(weight: Tensor, rounds: int) -> list[dict]:
    rows = []
    for name in TYPES:
        data = quantize_gguf(weight, name)
        row = {
            "format": f"GGUF {name}",
            "quantize": speed(weight, rounds, lambda n=name: quantize_gguf(weight, n)),
            "dequantize": speed(weight, rounds, lambda n=name, d=data: dequantize_gguf(d, n)),
            "relative_error": ((dequantize_gguf(data, name) - weight).square().mean().sqrt() / weight.std()).item(),
        }
        if llama := llama_cpp(weight, name):
            row["llama_cpp_one_thread"] = speed(weight, rounds, llama)
        rows.append(row)
    return rows


def llama_cpp(weight: Tensor, name: str) -> Callable[[], object] | None:
    """ggml's quantizer from the xllamacpp wheel, if it is installed."""
    found = find_spec("xllamacpp")
    if found is None or not name.startswith("Q"):
        return None
    assert found.submodule_search_locations
    library = ctypes.CDLL(str(next(Path(found.submodule_search_locations[0]).glob("*.so"))))
    run, kind = library.ggml_quantize_chunk, TYPES[name]
    run.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    out = torch.empty(weight.shape[0], WIDTH // kind.weights * kind.bytes, dtype=torch.uint8)
    return lambda: run(kind.number, weight.data_ptr(), out.data_ptr(), 0, weight.shape[0], WIDTH, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    weight = torch.randn(options.rows, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02
    rows: list[dict] = []
    for part in (rounding_rows, layout_rows, gguf_rows):
        rows += part(weight, options.rounds)
    columns = ("quantize", "dequantize", "llama_cpp_one_thread")
    shown = [(r["format"], *(f"{r[c]:.0f}" if c in r else "" for c in columns)) for r in rows]
    print(table(shown, ("MB/s of fp32", "quantize", "dequantize", "llama.cpp, 1 thread")))
    RESULTS.mkdir(exist_ok=True)
    written = RESULTS / "formats.json"
    payload = {
        **about("formats"),
        "threads": torch.get_num_threads(),
        "shape": list(weight.shape),
        "unit": "MB/s of fp32",
    }
    written.write_text(json.dumps({**payload, "rows": rows}, indent=2) + "\n")
    print(written, file=sys.stderr)


if __name__ == "__main__":
    main()
