"""The engine against llama.cpp and transformers on this CPU: decoding, prompts, many requests at once.

    python benchmarks/engine.py                                        # 134M, all cases, 3 rounds
    python benchmarks/engine.py --models 1.1B --cases decode:int4-fast # the cases that begin so
    python benchmarks/engine.py --models tiny --rounds 1 --context 32 --tokens 4     # does it run?

Every figure comes from a process of its own; contenders take turns, so that a noisy machine disturbs all alike; the
ratio is of neighbours in time. Random weights, written once per run by puna: a bf16 folder, GGUF files in F16, Q8_0 and
Q4_0. puna reads the very same Q8_0 and Q4_0 files. `exact` rows compute with fp32 inputs, `fast` ones round the inputs
of products to int8 and keep keys and values in fp16, as llama.cpp does by default. Peers run with their defaults and as
many threads as there are cores.
Tokens per second: of all sequences together; `many` counts answers' tokens over the whole time, prompts included:
puna gets 32 requests at once, transformers takes 4 one by one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from side_by_side import compare, report

HERE = Path(__file__).parent
SHAPES = {"tiny": "preset:debug", "134M": "preset:bench_134m", "1.1B": "preset:tinyllama_1.1b"}
REQUESTS, ONE_BY_ONE, PROMPT, ANSWER = 32, 4, 128, 32  # of `many`


@dataclass(frozen=True)
class Side:
    """A file under the models' folder, and how it is computed."""

    file: str
    dtype: str = "float32"
    activations: str = "exact"
    kv: str = "auto"


OURS = {
    "int4-exact": Side("Q4_0.gguf"),
    "int4-fast": Side("Q4_0.gguf", activations="int8", kv="float16"),
    "int8-exact": Side("Q8_0.gguf"),
    "int8-fast": Side("Q8_0.gguf", activations="int8", kv="float16"),
    "bf16": Side("folder", "bfloat16"),
    "fp32": Side("folder"),
}
LLAMA_CPP = {
    "int4-exact": "Q4_0.gguf", "int4-fast": "Q4_0.gguf", "int8-exact": "Q8_0.gguf", "int8-fast": "Q8_0.gguf",
    "bf16": "F16.gguf",
}  # fmt: skip
CASES = {
    "llama.cpp": [
        *(f"decode:{name}:{batch}" for name in LLAMA_CPP for batch in (1, 8, 32)),
        *(f"prefill:{name}:1" for name in LLAMA_CPP),
    ],
    "transformers": [
        *(f"{what}:{name}:1" for what in ("decode", "prefill") for name in ("fp32", "bf16")),
        "many:fp32:32", "many:bf16:32", "many:int4-fast:32",
    ],
}  # fmt: skip


# --- the models -------------------------------------------------------------------------------------------------------


def make_files(model: str, folder: Path, wanted: set[str]) -> None:
    """What the cases need of folder, F16.gguf, Q8_0.gguf and Q4_0.gguf; files that are there stay."""
    from puna.weights.folder import load_model, save_model
    from puna.weights.gguf.model import save_gguf

    missing = sorted(name for name in wanted if not (folder / name).exists())
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = load_model(SHAPES[model], torch.bfloat16)
    weights = {name: parameter.detach() for name, parameter in source.named_parameters()}
    for name in missing:
        if name == "folder":
            save_model(source, folder / name)
        else:
            save_gguf(folder / name, source.spec, weights.__getitem__, None, name.removesuffix(".gguf"))


# --- workers: each prints tokens per second ---------------------------------------------------------------------------


def puna(what: str, side: Side, batch: int, files: Path, context: int, tokens: int) -> float:
    from puna.engine.options import EngineOptions
    from puna.serve import bench

    options = EngineOptions(activations=side.activations, kv=side.kv)
    subject = bench.Subject(str(files / side.file), side.dtype, "cpu", options=options)
    if what == "decode":
        return bench.decode(subject, [batch], context, tokens, 1)["rows"][0]["rate"]
    if what == "prefill":
        return bench.prefill(subject, [context], 1)["rows"][0]["rate"]
    engine, _ = bench.open_engine(subject)
    bench.answer_one(engine, [1] * 8)
    prompts = bench.random_prompts(engine.spec, [min(PROMPT, context)] * batch, 0)
    started = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt, bench.greedy(ANSWER))
    while engine.has_work:
        engine.step()
    return batch * ANSWER / (time.perf_counter() - started)


def llama_cpp(what: str, file: Path, batch: int, context: int, tokens: int) -> float:
    from llama_cpp_speed import decode_speed, prefill_speed

    threads = len(os.sched_getaffinity(0))
    if what == "decode":
        return decode_speed(str(file), batch, context, tokens, threads)
    return prefill_speed(str(file), context, threads)


def transformers(what: str, dtype: str, files: Path, context: int, tokens: int) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files / "folder", dtype=getattr(torch, dtype)).eval()

    def seconds(length: int, new: int, seed: int) -> float:
        ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return time.perf_counter() - started

    seconds(8, 2, 0)
    if what == "decode":
        return tokens / (seconds(context, 1 + tokens, 1) - seconds(context, 1, 2))
    if what == "prefill":
        seconds(context, 1, 1)
        return context / seconds(context, 1, 2)
    return ONE_BY_ONE * ANSWER / sum(seconds(min(PROMPT, context), ANSWER, seed) for seed in range(ONE_BY_ONE))


def worker(who: str, case: str, files: str, context: str, tokens: str) -> None:
    what, name, batch = case.split(":")
    shape = (int(context), int(tokens))
    if who == "puna":
        figure = puna(what, OURS[name], int(batch), Path(files), *shape)
    elif who == "llama.cpp":
        figure = llama_cpp(what, Path(files) / LLAMA_CPP[name], int(batch), *shape)
    else:
        figure = transformers(what, "bfloat16" if name == "bf16" else "float32", Path(files), *shape)
    print(figure)


# --- the run ----------------------------------------------------------------------------------------------------------


def chosen(peer: str, beginnings: list[str]) -> list[str]:
    return [case for case in CASES[peer] if not beginnings or case.startswith(tuple(beginnings))]


def run(model: str, given: argparse.Namespace, files: Path) -> None:
    cases = {peer: chosen(peer, given.cases) for peer in CASES if not given.peers or peer in given.peers}
    names = [case.split(":")[1] for found in cases.values() for case in found]
    wanted = {OURS[name].file for name in names} | {LLAMA_CPP[n] for n in names if n in LLAMA_CPP}
    make_files(model, files, wanted | ({"folder"} if cases.get("transformers") else set()))
    for peer, found in cases.items():
        if not found:
            continue
        tail = [str(files), str(given.context), str(given.tokens)]
        rows = compare(str(HERE / "engine.py"), [[c, *tail] for c in found], "puna", peer, given.rounds, "tok/s")
        rows = [
            {**row, "case": f"{model} {case}", "context": given.context} for row, case in zip(rows, found, strict=True)
        ]
        report(f"engine_{peer.replace('.', '_')}_{model}{given.suffix}", rows, "puna", peer, "tok/s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="*", default=["134M"], choices=list(SHAPES))
    parser.add_argument(
        "--cases", nargs="*", default=[], help="only those that begin so: decode:int4, prefill, many ..."
    )
    parser.add_argument("--peers", nargs="*", default=[], choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--files", help="keep the models here (else: a temporary folder)")
    parser.add_argument("--suffix", default="", help="of the result files' names")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.worker:
        worker(*given.worker)
    elif given.list:
        print("\n".join(f"{peer:13s} {case}" for peer in CASES for case in chosen(peer, given.cases)))
    else:
        for model in given.models:
            with tempfile.TemporaryDirectory() as scratch:
                run(model, given, (Path(given.files) if given.files else Path(scratch)) / model)


if __name__ == "__main__":
    sys.exit(main())
