"""How long a quantization takes and what memory it needs, phase by phase, on random models of real shapes.

python benchmarks/quantize.py                     # 100M: int8_wo and int4_gptq; writes results/quantize.json
python benchmarks/quantize.py --eight-b           # two layers of an 8B: the peak of memory, which layers do not add to
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from side_by_side import RESULTS, about

from puna.base.console import table
from puna.corpus.in_memory import STANDARD_LIBRARY, read_documents
from puna.model.spec import Spec
from puna.text.tokenizer import Tokenizer
from puna.text.train_tokenizer import train_bpe
from puna.weights.folder import empty_model, save_model

SHAPES = {
    "100M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
             "head_dim": 64, "intermediate_size": 2304},
    "8B, two layers": {"hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32,
                       "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336},
}  # fmt: skip
VOCAB = 8192


def make_model(shape: str, folder: Path) -> Path:
    """A random model in bf16 with a tokenizer of Python's own library."""
    tokenizer: Tokenizer = train_bpe((d.text for d in read_documents([STANDARD_LIBRARY])), VOCAB)
    spec = Spec.preset("debug").replace(vocab_size=tokenizer.vocab_size, sliding_windows=(), **SHAPES[shape])
    model = empty_model(spec, torch.bfloat16, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(0))
    return save_model(model, folder / "model", tokenizer)


def quantize(model: Path, out: Path, preset: str, *more: str) -> dict:
    """The report of a `puna quantize` in a process of its own."""
    words = ["quantize", str(model), "--out", str(out), "--preset", preset, "--json", *more]
    done = subprocess.run([sys.executable, "-m", "puna", *words], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict = json.loads(done.stdout.splitlines()[-1])
    return report


def row(shape: str, preset: str, report: dict) -> dict:
    seconds = report["seconds"]
    rounding = sum(seconds.get(name, 0.0) for name in ("reading", "rounding", "gptq"))
    method = sum(seconds.get(name, 0.0) for name in ("reading", "forward", "rounding", "gptq", "writing"))
    weights = sum(layer["weights"] for layer in report["layers"])
    return {
        "model": shape,
        "preset": preset,
        "quantizing_s": round(method, 1),
        "report_s": round(sum(seconds.values()) - method, 1),
        "rounding_mb_per_s_fp32": round(4 * weights / rounding / 1e6),
        "with_writing_mb_per_s": round(4 * weights / (rounding + seconds["writing"]) / 1e6),
        "peak_gib": round(report["peak_memory"] / 2**30, 2),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "calibration_tokens": report["calibration"].get("calibration_tokens"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eight-b", action="store_true")
    parser.add_argument("--folder", default=None, help="where models are written; default: a temporary folder")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        shape = "8B, two layers" if options.eight_b else "100M"
        model = make_model(shape, folder)
        runs = (
            [("int4_gptq", ["--samples", "28", "--eval-tokens", "1024"])]
            if options.eight_b
            else [("int8_wo", []), ("int4_gptq", [])]
        )
        for preset, more in runs:
            report = quantize(model, folder / preset, preset, *more)
            rows.append(row(shape, preset, report))
            print(json.dumps(rows[-1]), flush=True)
    names = ["model", "preset", "quantizing_s", "report_s", "rounding_mb_per_s_fp32", "peak_gib"]
    print(table([[str(found[name]) for name in names] for found in rows], names))
    target = RESULTS / ("quantize_8b.json" if options.eight_b else "quantize.json")
    target.write_text(json.dumps({**about(target.stem), "rows": rows}, indent=2) + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
