"""ops/packed_triton.py: the GPU kernels, run by triton's interpreter on a CPU, equal `QuantizedWeight.product`.

bf16 inputs cannot be checked here: the interpreter of triton 3.6 multiplies their bits as whole numbers. fp16 stands for
them. The interpreter must be asked for before triton is imported, so all cases run in one process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

if __name__ != "__main__":
    pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

CASES = [
    "int4_g32", "int4_g128_asym", "int4_g64 act-order", "int4_g64 int8", "int4", "int8", "int8_asym", "int8_g32_asym", "int8 int8",
    "int8 int8_static", "int8 outliers", "fp8", "fp8 fp8", "fp8_tensor fp8_static", "fp8_b32", "int4_g32 half", "int8 half",
]  # fmt: skip


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The largest error of every case, relative to the largest number."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=240)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_equals_its_twin(errors, case):
    assert errors[case] < (1e-3 if "half" in case else 2e-6)


def main() -> None:
    import torch

    from puna.ops import packed_triton
    from puna.ops.formats.activations import quantize_activation
    from puna.ops.formats.layer import QuantizedWeight
    from puna.ops.formats.packed import pack, round_to_nearest
    from puna.ops.formats.scheme import FLOAT8_TENSOR, FLOAT8_TOKEN, INT8_TOKEN, Scheme
    from puna.ops.packed_kernels import store
    from puna.quant.config import parse_format

    torch.manual_seed(0)
    inputs_as = {
        "int8": INT8_TOKEN, "fp8": FLOAT8_TOKEN, "int8_static": Scheme(granularity="tensor"), "fp8_static": FLOAT8_TENSOR,
        "outliers": INT8_TOKEN,
    }  # fmt: skip

    def error(case: str) -> float:
        name, _, more = case.partition(" ")
        outputs, inputs = (96, 256) if name not in ("int8", "int4", "fp8") else (70, 203)
        packed = round_to_nearest(torch.randn(outputs, inputs), parse_format(name), torch.float16)
        if more == "act-order":
            order = torch.randperm(inputs)
            group = (torch.arange(inputs) // packed.scheme.group_size)[order].int()
            packed = pack(packed.codes()[:, order].contiguous(), packed.scheme, packed.scales, packed.zeros, group)
        activations = inputs_as.get(more)
        scale = torch.tensor([0.03]) if more.endswith("static") else None
        weight = QuantizedWeight(packed, activations, scale, 2.5 if more == "outliers" else 0.0)
        stored, bias = store(packed), torch.randn(outputs)
        assert packed_triton.serves(stored.packed)
        kernel = packed_triton.Triton(stored.packed, stored.order_D, weight, bias)
        worst = 0.0
        for rows in (1, 19, 40):
            x = torch.randn(rows, inputs).to(torch.float16 if more == "half" else torch.float32)
            y, expected = kernel(x, x.dtype).float(), weight.product(x, bias).float()
            worst = max(worst, ((y - expected).abs().max() / expected.abs().max()).item())
        if more == "int8":  # sums of whole numbers are whole
            codes, _ = quantize_activation(x, INT8_TOKEN)
            ones = torch.ones(len(codes)), round_to_nearest(torch.ones(outputs, inputs), Scheme())
            sums = packed_triton.integer_product(codes, ones[0], ones[1], None, torch.float32) / ones[1].scales.T
            assert torch.equal(
                sums.round(), codes.sum(1, keepdim=True).float().expand(-1, outputs) * ones[1].data[0, 0]
            )
        return worst

    print(json.dumps({case: error(case) for case in CASES}))


if __name__ == "__main__":
    main()
