"""A decode step in one native call against the eager Transformer: tok/s, and the share of the memory's speed.

    python benchmarks/native_step.py                     # 134M and 1.1B in int4 groups of 32, batch 1, 8, 32
    python benchmarks/native_step.py --models 134M --batches 1 --activations int8 --rounds 20

Random weights and random keys and values in the pages, context 512. Bytes of a step are those of all weights and of the
keys and values that are read; the memory's speed is measured by summing a GiB. Contenders take turns, the best of all
rounds counts: on a shared machine the rest is somebody else's.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
from torch import Tensor

from puna.engine.native_step import NativeStep, why_not
from puna.model.linear import Linear, QuantizedLinear
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed, round_to_nearest
from puna.ops.paged import PagedCausal, Pages
from puna.quant.config import parse_format

SHAPES = {
    "tiny": Spec(vocab_size=4096, hidden_size=256, num_hidden_layers=4, intermediate_size=704, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=64),
    "134M": Spec(vocab_size=32000, hidden_size=768, num_hidden_layers=12, intermediate_size=2048,
                 num_attention_heads=12, num_key_value_heads=12, head_dim=64),
    "1.1B": Spec(vocab_size=32000, hidden_size=2048, num_hidden_layers=22, intermediate_size=5632,
                 num_attention_heads=32, num_key_value_heads=4, head_dim=64),
}  # fmt: skip
PAGE = 16


def random_model(spec: Spec, form: str, activations: str = "exact") -> Transformer:
    """Every layer has memory of its own, as a loaded model has; layers of one shape hold the same numbers."""
    with torch.device("meta"):
        model = Transformer(spec)
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    made: dict[tuple[int, int], QuantizedWeight] = {}
    for name, module in list(model.named_modules()):
        if type(module) is Linear and form not in ("fp32", "bf16"):
            parent, _, leaf = name.rpartition(".")
            shape = (module.weight.shape[0], module.weight.shape[1])
            if shape not in made:
                packed = round_to_nearest(torch.randn(shape) * shape[1] ** -0.5, parse_format(form), torch.float16)
                made[shape] = QuantizedWeight(packed)
            setattr(model.get_submodule(parent), leaf, quantized(made[shape], activations))
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        value = torch.ones(parameter.shape, dtype=dtype)
        if not name.endswith("norm.weight"):
            value.normal_(std=parameter.shape[-1] ** -0.5)
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
    return model


def quantized(weight: QuantizedWeight, activations: str) -> QuantizedLinear:
    def copied(packed: Packed) -> Packed:
        return dataclasses.replace(packed, data=packed.data.clone(), scales=packed.scales.clone())

    layer = QuantizedLinear(dataclasses.replace(weight, packed=copied(weight.packed)))
    if activations == "int8":
        layer.rechoose(activations)
    return layer


def filled_pages(spec: Spec, sequences: int, context: int, dtype: torch.dtype) -> Pages:
    shape = (spec.num_hidden_layers, 1 + sequences * -(-context // PAGE), spec.num_key_value_heads, PAGE, spec.head_dim)
    keys, values = (torch.randn(shape[1:]).expand(shape).to(dtype).contiguous() for _ in range(2))
    return Pages(keys, values)


def decode_rows(pages: Pages, sequences: int, context: int, scattered: bool) -> PagedCausal:
    """One new token of each sequence at position context - 1."""
    ids = torch.randperm(pages.num_pages - 1) if scattered else torch.arange(pages.num_pages - 1)
    tables = (ids + 1).view(sequences, -1).int().contiguous()
    last = context - 1
    slots = tables[:, last // PAGE].long() * PAGE + last % PAGE
    starts, lengths = torch.arange(sequences + 1).int(), torch.full((sequences,), context).int()
    return PagedCausal(pages, slots, starts, lengths, tables, 2048)


def bytes_of_step(model: Transformer, spec: Spec, pages: Pages, sequences: int, context: int) -> int:
    weights = sum(p.nbytes for name, p in model.named_parameters() if name != "embed")
    weights += sum(m.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    return weights + sequences * context * spec.kv_bytes_per_token(pages.keys.element_size())


def memory_speed() -> float:
    """Bytes per second of a sum over a GiB, the best of five."""
    x = torch.ones(1 << 28)
    return x.nbytes / best({"sum": x.sum}, 5)["sum"]


def best(contenders: dict, rounds: int) -> dict[str, float]:  # type: ignore[type-arg]
    """Seconds of the fastest call of each, taken in turn."""
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


@torch.inference_mode()
def measure(name: str, form: str, batches: list[int], given: argparse.Namespace, speed: float) -> None:
    spec = SHAPES[name]
    model = random_model(spec, form, given.activations)
    for batch in batches:
        pages = filled_pages(spec, batch, given.context, getattr(torch, given.cache))
        step = NativeStep.of(model, pages)
        assert step is not None, why_not(model, pages)
        tokens, positions = torch.arange(batch), torch.full((batch,), given.context - 1)
        rows = torch.arange(batch)
        in_order, scattered = (decode_rows(pages, batch, given.context, s) for s in (False, True))

        def eager(attend: PagedCausal = in_order) -> Tensor:
            return model.logits(model(tokens, positions, attend))  # noqa: B023

        contenders = {
            "native": lambda: step(tokens, positions, in_order, rows),  # noqa: B023
            "scattered": lambda: step(tokens, positions, scattered, rows),  # noqa: B023
        }
        if not given.alone:
            contenders["eager"] = eager
        seconds = best(contenders, given.rounds)
        share = bytes_of_step(model, spec, pages, batch, given.context) / seconds["native"] / speed
        figures = "  ".join(f"{who} {batch / s:7.1f} tok/s" for who, s in seconds.items())
        print(f"{name} {form} batch {batch:2d}: {figures}  {share:.0%} of memory speed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["134M", "1.1B"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--form", default="int4_g32", help="fp32, bf16, int4_g32, int8, ...")
    parser.add_argument("--activations", default="exact", choices=("exact", "int8"))
    parser.add_argument("--cache", default="float32", help="float32, bfloat16, float16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--alone", action="store_true", help="without the eager Transformer")
    given = parser.parse_args()
    speed = memory_speed()
    print(f"{torch.get_num_threads()} threads, memory {speed / 1e9:.1f} GB/s")
    print(f"context {given.context}, {given.cache} cache, {given.activations} activations", flush=True)
    for name in given.models:
        measure(name, given.form, given.batches, given, speed)


if __name__ == "__main__":
    main()
