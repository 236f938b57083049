"""A report with a figure in every field, for the tests of its text and its page."""

from __future__ import annotations

import dataclasses
from typing import Any

from puna.quant.config import QuantConfig
from puna.quant.figures import Layer, Quality, Reload, Speed
from puna.quant.report import Report
from puna.quant.score import Estimate, Repaired

KINDS = ("attn.q_proj", "attn.o_proj", "mlp.down_proj")
CALIBRATION = {
    "files": ["a.txt"],
    "documents": 412,
    "repeated_documents": 3,
    "evaluation_files": None,
    "template": "plain text",
    "samples": 128,
    "seq_len": 512,
    "seed": 7,
    "bos": True,
    "calibration_tokens": 65536,
    "calibration_sha256": "ab" * 32,
    "evaluation_tokens": 32768,
    "evaluation_sha256": "cd" * 32,
    "scored_tokens": 32651,
    "scored_bytes": 130321,
    "window_tokens": 15,
    "shared_tokens": 68,
    "vocab_sha256": "ef" * 32,
}


def layers() -> list[Layer]:
    """Three blocks; block 2's down_proj is the worst, block 1's output projection has eight bits."""
    found = []
    for block in range(3):
        for place, kind in enumerate(KINDS):
            eight = (block, kind) == (1, "attn.o_proj")
            error = 0.01 * (1 + block + 3 * place) / (20 if eight else 1)
            found.append(
                Layer(
                    f"layers.{block}.{kind}",
                    "int8" if eight else "int4_g128",
                    1 << 20,
                    8.0 if eight else 4.125,
                    1.5 * error,
                    error,
                    "damping raised to 0.1" if block == 0 and place == 2 else "",
                    "int8 (native)" if eight else "int4 (torch)",
                )
            )
    return found


def sample_report(**changes: Any) -> Report:
    """The report, with some fields changed."""
    config = QuantConfig.preset("int4_gptq", overrides=("layers.1.attn.o_proj=int8",), kv="int8", samples=128)
    before = Quality(Estimate(27.65, 0.30), Estimate(1.031, 0.011))
    rounding = Quality(Estimate(30.49, 0.35), Estimate(1.062, 0.012), Estimate(0.1027, 0.0041), Estimate(0.0921, 0.003),
                       Estimate(0.8123, 0.0031), (0.05, 0.08, 0.09, 0.3))  # fmt: skip
    after = Quality(Estimate(29.39, 0.33), Estimate(1.049, 0.0115), Estimate(0.0629, 0.0032), Estimate(0.0512, 0.002),
                    Estimate(0.8765, 0.0029), (0.03, 0.05, 0.06, 0.08))  # fmt: skip
    report = Report(
        "models/opt", "out/opt int4", config.to_dict(), "compressed-tensors", layers(), before, rounding, after,
        Repaired(Estimate(0.3873, 0.021), Estimate(0.4441, 0.013)), 10_000_000, 20_000_000, 6_400_000, 3 << 30,
        {"calibration": 61.0, "gptq": 512.5}, Speed(41.0, 20e6, 1e9), Speed(99.0, 6.4e6, 1e9), CALIBRATION,
        Reload(3.1e-6, 1e-4), ["the cache's scales were clipped"], ["out/opt int4/quant_report.json"],
        "2 cores, an EPYC", "puna quantize models/opt --preset int4_gptq", "0.1.0", "2026-11-21T19:00:00+00:00",
    )  # fmt: skip
    return dataclasses.replace(report, **changes)
