"""How fast a model is on this machine, measured through the engine itself: decoding, prompts, loading.

Every figure stands beside what bounds it, measured in the same process: reading memory, multiplying matrices, reading
files. Figures are plain values (seconds, bytes, tokens), ready for JSON; `puna bench` makes tables of them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from puna.base.console import PunaError, say
from puna.base.hardware import describe, pick_device
from puna.engine.batch import Batch
from puna.engine.engine import Engine
from puna.engine.llm import LLM
from puna.engine.options import EngineOptions
from puna.engine.request import SamplingParams
from puna.model.linear import Linear, QuantizedLinear
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import round_to_nearest
from puna.quant.config import QuantConfig
from puna.serve.speed import memory_bandwidth, read_per_token
from puna.weights.fetch import local_folder
from puna.weights.folder import load_model

_LOAD_TIMEOUT = 1800.0
_MATMUL = 2048  # rows, columns and depth of the matrix product that is the ceiling of prompts


@dataclass(frozen=True)
class Subject:
    """What is measured. quantize: a format for the linear layers ('int4_g32', 'int4_g32,lm_head=int8'), or 'none'."""

    model: str
    dtype: str = "float32"
    device: str = "auto"
    quantize: str = "none"
    options: EngineOptions = field(default_factory=EngineOptions)


def about(subject: Subject) -> dict[str, Any]:
    """What every report says of itself: machine, commit, command, and what was measured."""
    return {
        "machine": describe(),
        "commit": commit(),
        "command": " ".join(["puna", *sys.argv[1:]]),
        "model": subject.model,
        "dtype": subject.dtype,
        "quantize": subject.quantize,
        "options": asdict(subject.options),
    }


def commit() -> str | None:
    """The commit of this checkout, with '+' where files differ from it; None for an installed package."""
    here = str(Path(__file__).parent)
    try:
        run = [
            subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=20)
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if run[0].returncode else run[0].stdout.strip() + ("+" if run[1].stdout else "")


# --- the model under test ---------------------------------------------------------------------------------------------


def open_engine(subject: Subject) -> tuple[Engine, Watched]:
    """The engine of a model, its linear layers rounded as asked, and the watch on its runner. Errors: as `LLM`."""
    device = pick_device(subject.device)
    folder = subject.model if subject.model.startswith("preset:") else str(local_folder(subject.model, state=False))
    model = load_model(folder, subject.dtype, device)
    if subject.quantize != "none":
        _quantize(model, subject.quantize)
    engine = LLM.of(model, None, subject.options).engine
    watched = Watched(engine.runner)
    engine.runner = watched  # type: ignore[assignment]
    say(f"{subject.model}, {subject.dtype}: {engine.card()}")
    return engine, watched


def kernels(model: Transformer) -> dict[str, int]:
    """Who computes the quantized layers, and how many of them."""
    return dict(Counter(m.kernel for m in model.modules() if isinstance(m, QuantizedLinear)))


def _quantize(model: Transformer, text: str) -> None:
    """Round the linear layers to nearest, in memory; what the format leaves alone stays plain."""
    form, *overrides = text.split(",")
    config = QuantConfig(weights=form, overrides=tuple(overrides))
    for name, layer in list(model.named_modules()):
        scheme = config.scheme_of(name) if type(layer) is Linear else None
        if scheme is None:
            continue
        packed = round_to_nearest(layer.weight.detach().float(), scheme, torch.float16)
        parent, _, leaf = name.rpartition(".")
        quantized = QuantizedLinear(QuantizedWeight(packed), layer.bias, model.embed.dtype)
        setattr(model.get_submodule(parent), leaf, quantized)


class Watched:
    """A runner with a clock: `seconds` spent in it. The rest of a step is the host's."""

    def __init__(self, runner: Any):
        self._runner, self.seconds = runner, 0.0

    def run(self, batch: Batch) -> torch.Tensor:
        """As the runner's own."""
        started = time.perf_counter()
        try:
            logits: torch.Tensor = self._runner.run(batch)
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            return logits
        finally:
            self.seconds += time.perf_counter() - started

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(subject: Subject, batches: Sequence[int], context: int, steps: int, rounds: int) -> dict[str, Any]:
    """Tokens per second behind prompts of `context` tokens, per batch; each of `rounds` begins at the same place.

    Bytes of a step are those of the weights and of the keys and values it reads. Errors: PunaError for a batch or a
    context beyond the engine's.
    """
    _at_least_one(("--tokens", steps), ("--rounds", rounds), ("--context", context), *(("--batch", b) for b in batches))
    engine, watched = open_engine(subject)
    _check_decode(engine, batches, context, steps)
    speed = memory_bandwidth() if engine.pages.keys.is_cpu else None
    rows = []
    for batch in batches:
        prompts = random_prompts(engine.spec, [context] * batch, seed=batch)
        found = [_decode_round(engine, watched, prompts, steps) for _ in range(rounds + 1)][1:]  # the first warms up
        rows.append(_decode_row(engine, found, batch, context + steps / 2, speed))
    return {"rows": rows, **said(engine), "context": context, "steps": steps, "bandwidth": speed}


def _check_decode(engine: Engine, batches: Sequence[int], context: int, steps: int) -> None:
    options, limit = engine.options, engine.max_model_len
    ahead = max(batches) * context // options.max_num_batched_tokens + 2  # the first run on while others begin
    per_step = 1 + (options.max_drafts if engine.speculation else 0)
    need = context + (steps + ahead) * per_step
    if need > limit:
        raise PunaError(
            f"{steps} steps behind {context} tokens need a context of {need}, the engine's is {limit}",
            f"lower --context by {need - limit} or more, or --tokens",
        )
    if max(batches) > options.max_num_seqs:
        raise PunaError(
            f"a batch of {max(batches)}, but max_num_seqs is {options.max_num_seqs}", "raise --max-num-seqs"
        )


def _decode_round(engine: Engine, watched: Watched, prompts: list[list[int]], steps: int) -> dict[str, float]:
    requests = [engine.add(prompt, greedy(None)) for prompt in prompts]
    try:
        waiting = set(requests)
        while waiting:
            waiting -= {news.request_id for news in engine.step()}
        drawn, watched.seconds, started = engine.scheduler.num_drawn_tokens, 0.0, time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = time.perf_counter() - started
        if engine.scheduler.num_running < len(prompts):
            raise PunaError(
                f"the KV cache is too small for {len(prompts)} sequences of this length", "raise --kv-memory"
            )
        drawn = engine.scheduler.num_drawn_tokens - drawn
        return {
            "tokens": drawn,
            "step": seconds / steps,
            "rate": drawn / seconds,
            "host": 1 - watched.seconds / seconds,
        }
    finally:
        for request in requests:
            engine.abort(request)
        while engine.has_work:
            engine.step()


def _decode_row(
    engine: Engine, rounds: list[dict[str, float]], batch: int, length: float, speed: float | None
) -> dict[str, Any]:
    spec, pages = engine.spec, engine.pages
    seen = sum(min(length, window or length) for window in spec.sliding_windows) / spec.num_hidden_layers
    weights, kv = read_per_token(engine.model), int(batch * seen * pages.bytes_per_token)
    step = median(each["step"] for each in rounds)
    return {
        "batch": batch,
        **_rates([each["rate"] for each in rounds]),
        "ms_per_step": 1e3 * step,
        "host_share": median(each["host"] for each in rounds),
        "weight_bytes": weights,
        "kv_bytes": kv,
        "bytes_per_second": (weights + kv) / step,
        "bandwidth_share": None if speed is None else (weights + kv) / step / speed,
    }


# --- prompts ----------------------------------------------------------------------------------------------------------


def prefill(subject: Subject, lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Prompt tokens per second to the first token of an answer, per length; those beyond the context are left out.

    Errors: PunaError where none is left.
    """
    _at_least_one(("--rounds", rounds), *(("--lengths", length) for length in lengths))
    engine, _ = open_engine(subject)
    fitting = [length for length in lengths if length < engine.max_model_len]
    if not fitting:
        raise PunaError(
            f"prompts of {min(lengths)} tokens do not fit: the context is {engine.max_model_len}", "lower --lengths"
        )
    if len(fitting) < len(lengths):
        say(f"prompts of {engine.max_model_len} tokens or more do not fit the context: left out")
    ceiling = _matmul_speed(engine.model.embed)
    rows = []
    for length in fitting:
        prompts = random_prompts(engine.spec, [length] * (rounds + 1), seed=length)
        seconds = [answer_one(engine, prompt) for prompt in prompts][1:]
        flops = _prefill_flops(engine.spec, length) / median(seconds)
        rows.append(
            {
                "tokens": length,
                **_rates([length / each for each in seconds]),
                "ms": 1e3 * median(seconds),
                "flops": flops,
                "matmul_share": flops / ceiling,
            }
        )
    return {"rows": rows, **said(engine), "matmul_flops": ceiling}


def answer_one(engine: Engine, prompt: list[int]) -> float:
    """Seconds from asking to the first token, nothing else running."""
    started = time.perf_counter()
    engine.add(prompt, greedy(1))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started


def _prefill_flops(spec: Spec, tokens: int) -> float:
    """Of a prompt: every layer for every token, causal attention, the head once."""
    head = spec.vocab_size * spec.hidden_size
    attention = 2 * spec.num_hidden_layers * spec.num_attention_heads * spec.head_dim * tokens * tokens
    return 2 * (spec.active_matmul_params() - head) * tokens + attention + 2 * head


def _matmul_speed(like: torch.Tensor) -> float:
    """FLOP/s of a large product in the model's dtype on its device: the best of a few."""
    square = torch.ones(_MATMUL, _MATMUL, dtype=like.dtype, device=like.device)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(square, square).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * _MATMUL**3 / best


# --- loading ----------------------------------------------------------------------------------------------------------


_LOADING = """
import sys, time
started = time.perf_counter()
from puna.serve import bench
imported = time.perf_counter() - started
bench.load_here(sys.argv[1], imported)
"""


def load(subject: Subject, rounds: int) -> dict[str, Any]:
    """Seconds to import, to load and to the first token, each round in a process of its own; files are in page cache.

    `ratio` is loading over reading the weight files into fresh memory in that process. Errors: PunaError for a preset.
    """
    _at_least_one(("--rounds", rounds))
    files = _weight_files(subject.model)
    told = json.dumps({**asdict(subject), "model": str(local_folder(subject.model, state=False))})
    found = [_load_once(told) for _ in range(rounds + 1)][1:]  # the first brings the files into the page cache
    row = {name: median(each[name] for each in found) for name in found[0]}
    ratios = [each["load"] / each["read"] for each in found]
    row |= {"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {"rows": [row], "file_bytes": sum(file.stat().st_size for file in files)}


def load_here(told: str, imported: float) -> None:
    """One round of `load` in this process: its seconds as JSON on stdout. Files are read twice, the second counts."""
    given = json.loads(told)
    subject = Subject(**{**given, "options": EngineOptions(**given["options"])})
    files = _weight_files(subject.model)
    read = [_read(files) for _ in range(2)][1]
    started = time.perf_counter()
    engine, _ = open_engine(subject)
    loaded = time.perf_counter() - started
    answer_one(engine, random_prompts(engine.spec, [8], seed=0)[0])
    first = time.perf_counter() - started
    print(json.dumps({"import": imported, "read": read, "load": loaded, "first_token": first}))


def _load_once(told: str) -> dict[str, float]:
    command = [sys.executable, "-c", _LOADING, told]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LOAD_TIMEOUT, env=dict(os.environ))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise PunaError(f"the model did not load: {last}", "`puna generate` on the same model says more")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _weight_files(model: str) -> list[Path]:
    if model.startswith("preset:"):
        raise PunaError(f"{model} has no files to load", "give a model folder or a GGUF file")
    place = Path(local_folder(model, state=False))
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise PunaError(f"no weights at {place}", "give a folder with *.safetensors, or a .gguf file")
    return files


def _read(files: Iterable[Path]) -> float:
    started = time.perf_counter()
    for file in files:
        file.read_bytes()
    return time.perf_counter() - started


# --- figures ----------------------------------------------------------------------------------------------------------


def greedy(max_tokens: int | None) -> SamplingParams:
    """The likeliest token, that many times; nobody reads the text."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def random_prompts(spec: Spec, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Random tokens: no two prompts begin alike, so the prefix cache saves nothing but what is asked again."""
    random = np.random.default_rng(seed)
    return [random.integers(0, spec.vocab_size, length).tolist() for length in lengths]


def _rates(rates: Sequence[float]) -> dict[str, float]:
    return {"rate": median(rates), "lowest": min(rates), "highest": max(rates)}


def said(engine: Engine) -> dict[str, Any]:
    """Who computed."""
    return {"path": engine.runner.path, "kernels": kernels(engine.model), "parameters": engine.spec.num_params()}


def _at_least_one(*given: tuple[str, int]) -> None:
    for name, number in given:
        if number < 1:
            raise PunaError(f"{name} {number} measures nothing", "use 1 or more")
