"""Two contenders in one run: each in a process of its own, turn by turn, so that a noisy machine disturbs both alike.

A worker prints one number per measurement (higher is better); the table shows medians and the ratio with its spread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from puna.base.console import table
from puna.base.hardware import describe

RESULTS = Path(__file__).parent / "results"


def measure(script: str, arguments: list[str]) -> float:
    """Run `script` as a worker; the last line of its stdout is the figure."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, script, "--worker", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def compare(script: str, cases: list[list[str]], ours: str, peer: str, rounds: int, unit: str) -> list[dict]:
    """Alternate ours and peer for every case; returns one row of figures per case."""
    rows = []
    for case in cases:
        figures: dict[str, list[float]] = {ours: [], peer: []}
        for number in range(rounds):
            for who in (ours, peer) if number % 2 == 0 else (peer, ours):
                figures[who].append(measure(script, [who, *case]))
        ratios = [a / b for a, b in zip(figures[ours], figures[peer], strict=True)]
        row = {"case": " ".join(case), ours: statistics.median(figures[ours]), peer: statistics.median(figures[peer]),
               "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}  # fmt: skip
        rows.append(row)
        print(f"{row['case']:24s} {ours} {row[ours]:.1f} {unit}, {peer} {row[peer]:.1f}, ratio {row['ratio']:.2f} "
              f"({row['low']:.2f}-{row['high']:.2f})", file=sys.stderr, flush=True)  # fmt: skip
    return rows


def report(name: str, rows: list[dict], ours: str, peer: str, unit: str) -> None:
    """Print a Markdown-ready table and keep the figures under results/."""
    shown = [
        (r["case"], f"{r[ours]:.1f}", f"{r[peer]:.1f}", f"{r['ratio']:.2f}", f"{r['low']:.2f}-{r['high']:.2f}")
        for r in rows
    ]
    print(table(shown, ("case", f"{ours} {unit}", f"{peer} {unit}", "ratio", "spread")))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**about(name), "rows": rows}, indent=2) + "\n")


def about(name: str) -> dict:
    """What every result file says of itself."""
    return {"benchmark": name, "date": str(date.today()), "machine": describe(), "command": " ".join(sys.argv)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", help="only the cases that begin with these words")
    return parser.parse_args()


def shape(name: str) -> dict:
    """config.json of a benchmark model: about 10M, 100M (with a Llama-2 vocabulary)."""
    common = {
        "model_type": "llama",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    sizes = {
        "10M": {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
                "num_key_value_heads": 4, "intermediate_size": 768, "tie_word_embeddings": False},
        "100M": {"vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "num_key_value_heads": 4, "intermediate_size": 2048, "tie_word_embeddings": True},
    }  # fmt: skip
    return common | sizes[name]
