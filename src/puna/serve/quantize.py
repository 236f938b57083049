"""`puna quantize`: a model folder in, a smaller one out, and a report card that says what it cost.

What can be refused is refused before the long work: the model, the formats, the text, the disk. Then the walk, whose
finished blocks a writer keeps; then the folder, its reload, the report.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from torch import Tensor

from puna import __version__
from puna.base.console import PunaError, progress, say, size
from puna.base.hardware import available_memory, describe, keep_freed_memory, parse_dtype
from puna.base.storage import read_json, write_json
from puna.model.spec import Spec
from puna.ops.formats.scheme import Scheme
from puna.quant.calibration import Sequences
from puna.quant.config import CONFIG_FILE, QuantConfig, hf_name
from puna.quant.figures import parse_increase
from puna.quant.page import report_page
from puna.quant.report import Quality, Report
from puna.quant.score import repaired
from puna.quant.steps import Stored
from puna.quant.streams import Stream
from puna.quant.walk import Job, Outcome, Tensors, Walk
from puna.serve.calibrate import read_sequences
from puna.serve.ranks import Ranks, open_ranks
from puna.serve.reload import check_reload
from puna.serve.speed import compare_speed
from puna.serve.stored import stored_quantization, weight_bytes
from puna.serve.target_bits import choose_bits
from puna.text.tokenizer import Tokenizer
from puna.weights.export import QuantizedWriter, check_new, check_space
from puna.weights.fetch import local_folder
from puna.weights.holding import check_format, linear_shapes, stored_bytes
from puna.weights.model_files import find_tokenizer
from puna.weights.quantization import COMPRESSED, OWN, LayerFormat, layer_format
from puna.weights.reader import WeightReader

CARDS = ("quant_report.json", "quant_report.html")
_TOKENS_PER_INPUT = 6  # calibration tokens for every input of the widest layer: enough for a Hessian of full rank
_LEAST_TOKENS = 12288


@dataclass(frozen=True)
class Request:
    """What `puna quantize` was asked for."""

    model: str
    out: str
    config: QuantConfig
    calib: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    eval_tokens: int = 8192
    max_ppl_increase: str = ""
    format: str = "auto"
    device: str = "cpu"
    command: str = ""


def choose_config(model: str, preset: str, changes: Mapping[str, Any]) -> QuantConfig:
    """The config of a preset, else what the model was trained for, with some fields changed (text is converted)."""
    if preset:
        table = QuantConfig.preset(preset).to_dict()
    elif (Path(model) / CONFIG_FILE).exists():
        table = read_json(Path(model) / CONFIG_FILE)["config"]
    elif "weights" in changes:
        table = {}
    else:
        raise PunaError("no preset was named, and the model was not trained for one", "add --preset int4_gptq")
    return QuantConfig.of(table | dict(changes))


def quantize(model: str | Path, config: QuantConfig, out: str | Path, **more: Any) -> dict[str, Any]:
    """Quantize a model folder into the folder `out`; the report's figures. `more`: fields of `Request`.

    Raises PunaError for what cannot be, and for a result worse than `max_ppl_increase` allows.
    """
    return run_quantize(Request(str(model), str(out), config, **more), quiet=True)


def run_quantize(request: Request, quiet: bool = False) -> dict[str, Any]:
    """Do it; the report's figures. Raises PunaError for what cannot be, and for a result worse than was allowed."""
    limit = parse_increase(request.max_ppl_increase) if request.max_ppl_increase else None
    if limit is not None and not request.eval_tokens:
        raise PunaError(
            f"a largest increase of {limit:.3%} was given, and 0 tokens to measure it on", "leave out --eval-tokens 0"
        )
    keep_freed_memory()  # every batch allocates the same tensors: a fifth of a walk's time on a CPU
    with open_ranks(request.device) as ranks:
        plan = make_plan(request, ranks)
        if ranks.rank:
            ranks.agree("writer", "ready")
            run_walk(plan, ranks, lambda part, tensors: None)
            return {}
        with _writer(request, plan) as writer:
            ranks.agree("writer", "ready")
            outcome = run_walk(plan, ranks, writer.add)
            report = make_report(request, plan, outcome, writer.stage(outcome.kv, _provenance(request, plan)))
            verdict = report.verdict(limit)
            folder = Path(request.out) if verdict.passed else _aside(Path(request.out))
            report = replace(report, out=str(folder), paths=[str(folder), *(str(folder / name) for name in CARDS)])
            writer.finish(outcome.kv, _provenance(request, plan), folder)
        write_json(folder / CARDS[0], report.to_json())
        report_page(report, folder / CARDS[1], verdict)
    if not quiet:
        print(report.text(verdict))
    if not verdict.passed:
        raise PunaError(
            f"the result was set aside in {folder}: {verdict.message}",
            "give the worst layers of its report an --override, or try another --preset",
        )
    return report.to_json()


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the walk. work: where the walk keeps its streams and state."""

    reader: WeightReader
    tokenizer: Tokenizer | None
    config: QuantConfig
    text: Sequences | None
    work: Path
    warnings: list[str]
    format: str

    @property
    def stored(self) -> Stored:
        """What scales and norms are written in: 16 bits as the model's, fp16 wherever the format has nothing else."""
        if self.format not in (COMPRESSED, OWN):
            return Stored(torch.float16, torch.float16, self.dtype)
        return Stored(torch.bfloat16 if self.dtype is torch.bfloat16 else torch.float16, norms=self.dtype)

    @property
    def spec(self) -> Spec:
        return self.reader.spec

    @property
    def dtype(self) -> torch.dtype:
        """What stays unquantized is stored in."""
        return parse_dtype(self.spec.dtype)


def make_plan(request: Request, ranks: Ranks) -> Plan:
    """Open everything, refuse what cannot be. Errors: `PunaError`."""
    out = Path(request.out)
    check_new(out)
    reader = WeightReader(request.model)
    if (there := stored_quantization(local_folder(request.model, state=False), reader.spec)) is not None:
        raise PunaError(
            f"{request.model} is quantized already ({there['method']}: {', '.join(there['formats'])})",
            f"puna convert {request.model} --to hf --out DIR dequantizes it; the original weights are better",
        )
    config = complete(request.config, reader.spec)
    forms = check_layers(config, reader.spec, choose_format(request))
    warnings = check_format(choose_format(request), forms, reader.spec, config.kv_scheme)
    if ranks.size > 1 and not config.needs_calibration:
        raise PunaError(f"{ranks.size} ranks, and no calibration text to split", "run this preset in one process")
    tokenizer = find_tokenizer(local_folder(request.model, state=False))
    text = None
    if config.needs_calibration or request.eval_tokens:
        config = replace(config, samples=-(-config.samples // ranks.size) * ranks.size)
        text = read_sequences(tokenizer, config, request.calib, request.evaluation, request.eval_tokens)
        warnings = [*warnings, *text.warnings]
    _check_disk(request, forms, reader.spec, text)
    work = out.with_name(f"{out.name}.partial") / f"walk-{ranks.rank}"
    plan = Plan(reader, tokenizer, config, text, work, warnings, choose_format(request))
    ranks.agree("quantization", json.dumps(_identity(plan)))
    return _with_chosen_bits(request, plan) if config.target_bits else plan


def _with_chosen_bits(request: Request, plan: Plan) -> Plan:
    assert plan.text is not None
    format = choose_format(request)
    config = choose_bits(request.model, plan.config, plan.spec, format, plan.text.calibration_ST)
    notes = check_format(format, check_layers(config, plan.spec, format), plan.spec, config.kv_scheme)
    warnings = [*notes, *(warning for warning in plan.warnings if warning not in notes)]
    return replace(plan, config=config, warnings=warnings)


def complete(config: QuantConfig, spec: Spec) -> QuantConfig:
    """The config with the numbers filled in that follow from the model."""
    seq_len = config.seq_len or min(512, spec.max_len)
    if seq_len > spec.max_len:
        raise PunaError(f"seq_len is {seq_len}, the model's context {spec.max_len}", f"use at most {spec.max_len}")
    widest = max(spec.hidden_size, spec.intermediate_size, spec.num_attention_heads * spec.head_dim)
    tokens = max(_LEAST_TOKENS, _TOKENS_PER_INPUT * widest)
    full = replace(config, seq_len=seq_len, samples=config.samples or -(-tokens // seq_len))
    if config.rounding == "gptq" and full.samples * seq_len < widest:
        raise PunaError(
            f"{full.samples} calibration sequences of {seq_len} tokens are fewer than the {widest} inputs of the "
            "widest layer: gptq would fit their noise",
            f"use --samples {-(-2 * widest // seq_len)} or more, or leave it out",
        )
    return full


def choose_format(request: Request) -> str:
    """The layout of the files: `auto` is compressed-tensors, or our own for what only we can hold."""
    own = request.config.low_rank or request.config.outlier_threshold
    return request.format if request.format != "auto" else OWN if own else COMPRESSED


def check_layers(config: QuantConfig, spec: Spec, format: str) -> dict[str, LayerFormat | None]:
    """How every linear layer will be stored. Errors: `PunaError` for groups that do not divide, for a tied head."""
    shapes = linear_shapes(spec)
    if "lm_head" not in shapes and config.format_of("lm_head") != "none":
        raise PunaError(
            "the head is the embedding (tie_word_embeddings): it cannot be quantized alone",
            "leave lm_head out of the overrides; the embedding stays as it is",
        )
    unused = [f"{pattern}={text}" for pattern, text in config.pairs() if not _names_any(pattern, shapes)]
    if unused:
        raise PunaError(f"override {unused[0]} names no layer", f"layers are called {', '.join(list(shapes)[:7])}")
    found: dict[str, LayerFormat | None] = {}
    for layer, shape in shapes.items():
        scheme = config.scheme_of(layer)
        if scheme is not None:
            _check_groups(layer, scheme, shape)
        found[layer] = (
            None
            if scheme is None
            else layer_format(
                format, scheme, config.activation_scheme, False, config.outlier_threshold, min(config.low_rank, *shape)
            )
        )
    if not any(found.values()) and config.kv == "none":
        raise PunaError("no layer would be quantized", "weights or an override must name a format, such as int8")
    return found


def run_walk(plan: Plan, ranks: Ranks, keep: Callable[[str, Tensors], None]) -> Outcome:
    """The walk of this rank, with progress. Calibration text is split over the ranks, rank 0 judges."""
    text = plan.text
    if text is not None and ranks.size > 1:
        judged = slice(None) if ranks.rank == 0 else slice(0, 0)
        bytes_ST = None if text.bytes_ST is None else text.bytes_ST[judged]
        mine = text.calibration_ST[ranks.rank :: ranks.size]
        text = Sequences(mine, text.evaluation_ST[judged], text.targets_ST[judged], bytes_ST)
    _same_job(plan)
    read = functools.partial(_whole, plan.reader)
    job = Job(plan.spec, plan.config, read, text, plan.work, ranks.device, ranks.reduce, plan.stored)
    walk = Walk(job)
    total = sum(rows * columns for rows, columns in linear_shapes(plan.spec).values()) * plan.dtype.itemsize
    if walk.layer:
        say(f"going on at layer {walk.layer} of {plan.spec.num_hidden_layers}")
    with progress(total, "quantizing", total * walk.layer // plan.spec.num_hidden_layers) as advance:
        return walk.run(keep, advance)


def make_report(request: Request, plan: Plan, outcome: Outcome, folder: Path) -> Report:
    """The card of a finished folder, not yet in its place."""
    config, spec = plan.config, plan.spec
    report = Report(
        request.model, request.out, config.to_dict(), choose_format(request), outcome.rows,
        parameters=spec.num_params(), seconds=dict(outcome.seconds), warnings=list(plan.warnings),
        calibration={} if plan.text is None else plan.text.provenance, hardware=describe(), command=request.command,
        version=__version__, date=datetime.now(UTC).isoformat(timespec="seconds"),
        size_before=weight_bytes(local_folder(request.model, state=False)), size_after=weight_bytes(folder),
    )  # fmt: skip
    if outcome.after is not None and outcome.rounded is not None and outcome.after.tokens:
        report.before, report.after = Quality.of_original(outcome.after), Quality.of(outcome.after)
        if outcome.after is not outcome.rounded:
            report.rounding, report.repaired = Quality.of(outcome.rounded), repaired(outcome.rounded, outcome.after)
    if outcome.last_logits is not None and plan.text is not None:
        started = time.perf_counter()
        report.reload = check_reload(folder, plan.text.evaluation_ST[0], outcome.last_logits)
        report.seconds["reload"] = time.perf_counter() - started
    _measure_speed(request, plan, report, folder)
    report.peak_memory = getrusage(RUSAGE_SELF).ru_maxrss * 1024
    return report


def _measure_speed(request: Request, plan: Plan, report: Report, folder: Path) -> None:
    needed = int(1.3 * (4 * plan.spec.num_params() + report.size_after))
    if needed > available_memory():
        report.warnings.append(f"speed was not measured: both models need {size(needed)} of memory at once")
        return
    started = time.perf_counter()
    (report.speed_before, report.speed_after), names = compare_speed([request.model, str(folder)])
    report.seconds["speed"] = time.perf_counter() - started
    report.layers = [replace(layer, kernel=names.get(layer.name, "")) for layer in report.layers]


def _writer(request: Request, plan: Plan) -> QuantizedWriter:
    return QuantizedWriter(
        Path(request.out), plan.spec, plan.tokenizer, choose_format(request), plan.config.to_dict(), plan.dtype
    )


def _provenance(request: Request, plan: Plan) -> dict[str, Any]:
    calibration = {} if plan.text is None else plan.text.provenance
    return {"source": request.model, "calibration": calibration, "puna": __version__, "command": request.command}


def _same_job(plan: Plan) -> None:
    """Refuse to go on with what another job left; a new one leaves its mark."""
    plan.work.mkdir(parents=True, exist_ok=True)
    mark, identity = plan.work / "job.json", json.loads(json.dumps(_identity(plan)))
    if not mark.exists():
        write_json(mark, identity)
    elif read_json(mark) != identity:
        raise PunaError(
            f"{plan.work.parent} is of an interrupted run on another model or other text",
            f"give the same options to go on with it, or remove {plan.work.parent} to begin anew",
        )


def _identity(plan: Plan) -> dict[str, Any]:
    """What must be the same for ranks of one job, and for a run that goes on."""
    text = {} if plan.text is None else plan.text.provenance
    digests = {key: text.get(key) for key in ("calibration_sha256", "evaluation_sha256")}
    return {"config": plan.config.to_dict(), "model": plan.spec.to_config(), **digests}


def _check_disk(request: Request, forms: Mapping[str, LayerFormat | None], spec: Spec, text: Sequences | None) -> None:
    """Refuse a disk that is too small for the streams and the result."""
    streams = 0
    if text is not None:
        for ids, copies in ((text.calibration_ST, 1), (text.evaluation_ST, 3)):
            streams += copies * Stream.bytes_on_disk(len(ids), request.config.seq_len or ids.shape[1], spec.hidden_size)
    check_space(Path(request.out), stored_bytes(forms, spec, parse_dtype(spec.dtype).itemsize), streams)


def _check_groups(layer: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    if not scheme.group_size or shape[1] % scheme.group_size == 0:
        return
    fitting = [group for group in (128, 64, 32, 16) if shape[1] % group == 0]
    ways = [f'--weights "int{scheme.bits}_g{group}"' for group in fitting[:1]] + [f'--override "{layer}=int8"']
    raise PunaError(f"groups of {scheme.group_size} do not divide the {shape[1]} inputs of {layer}", " or ".join(ways))


def _names_any(pattern: str, layers: Iterable[str]) -> bool:
    return pattern == "lm_head" or any(
        fnmatchcase(name, pattern) for layer in layers for name in (layer, hf_name(layer))
    )


def _whole(reader: WeightReader, name: str) -> Tensor:
    weight = reader.weight(name)
    assert isinstance(weight, Tensor)
    return weight


def _aside(out: Path) -> Path:
    """Where a result that is not good enough goes: OUT.rejected, or the next free number behind it."""
    names = (out.with_name(f"{out.name}.rejected{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())
