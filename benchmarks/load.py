"""From a fresh process to the first token: `puna bench load` against transformers, and against reading the files.

    python benchmarks/load.py                    # 134M in fp32, bf16, Q4_0; 5 rounds
    python benchmarks/load.py --models 1.1B --rounds 3

Seconds to load (imports are told apart, the files are in page cache), the ratio to reading the files in the same
process, and for transformers `from_pretrained` of the same folder. transformers maps files and copies nothing where the
dtype is the file's; pages are then read by the first forward, so its first token is what to compare with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import RESULTS, about

from engine import SHAPES, make_files
from puna.base.console import table
from puna.serve import bench

CASES = {"fp32 from bf16": ("folder", "float32"), "bf16": ("folder", "bfloat16"), "Q4_0": ("Q4_0.gguf", "float32")}
NAMES = ("import", "read", "load", "first_token")
_TRANSFORMERS = """
import json, sys, time
marks = [time.perf_counter()]
import torch
from transformers import AutoModelForCausalLM
marks.append(time.perf_counter())
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
marks.append(time.perf_counter())
model.generate(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), max_new_tokens=1, do_sample=False, pad_token_id=0)
marks.append(time.perf_counter())
print(json.dumps({"import": marks[1] - marks[0], "load": marks[2] - marks[1], "first_token": marks[3] - marks[1]}))
"""


def ours(path: Path, dtype: str) -> dict[str, float]:
    """One round: the first of the two processes brings the files into the page cache."""
    found = bench.load(bench.Subject(str(path), dtype, "cpu"), 1)["rows"][0]
    return {name: found[name] for name in NAMES} | {"ratio": found["ratio"]}


def theirs(path: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-c", _TRANSFORMERS, str(path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, files: Path, rounds: int) -> list[dict]:
    make_files(model, files, {file for file, _ in CASES.values()})
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for case, (file, dtype) in CASES.items():
            found.setdefault((case, "puna"), []).append(ours(files / file, dtype))
            if file == "folder":
                found.setdefault((case, "transformers"), []).append(theirs(files / file, dtype))
    return [
        {"case": f"{model} {case}", "who": who, **{n: statistics.median(r[n] for r in runs) for n in runs[0]}}
        for (case, who), runs in found.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=["134M"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows = []
    for model in given.models:
        with tempfile.TemporaryDirectory() as scratch:
            rows += measure(model, Path(scratch), given.rounds)
    shown = [(r["case"], r["who"], *(f"{r[n]:.2f}" if n in r else "-" for n in (*NAMES, "ratio"))) for r in rows]
    print(table(shown, ("case", "who", "import s", "read s", "load s", "first token s", "load / read")))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "load.json").write_text(json.dumps({**about("load"), "rows": rows}, indent=2) + "\n")
