"""`puna plan`: what a recipe needs, how fast it runs and what to change, before a GPU is rented. Starts nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.base.config import build, read_toml
from puna.base.console import PunaError, count, duration, size, table
from puna.model.spec import Spec
from puna.parallel.degrees import Degrees, check_degrees, check_passes, microbatches, resolve, stages_per_rank
from puna.parallel.job import Job
from puna.parallel.machines import Machine, machine
from puna.parallel.memory import Memory, memory
from puna.parallel.page import plan_page
from puna.parallel.picture import plan_png
from puna.parallel.search import Candidate, Change, Make, changes, search
from puna.parallel.throughput import Throughput, throughput
from puna.text.tokenizer import Tokenizer
from puna.train.recipe import Recipe
from puna.train.shape import choose_spec

MFU = "6 N + 12 L H Q T FLOPs per token (PaLM, appendix B) over the dense bf16 peak"
STATE_BYTES = 12  # per parameter in a save: fp32 weights (the Hugging Face folder) and AdamW's two moments


@dataclass(frozen=True)
class Budget:
    """What the plan is priced for: tokens (0: the recipe's), $ per GPU hour, storage in GB/s per node."""

    tokens: float = 0.0
    price: float = 0.0
    storage: float = 2.0


def make_plan(
    recipe: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any],
    gpus: int,
    gpu: str,
    budget: Budget,
    best: bool = False,
    picture: str = "",
) -> dict[str, Any]:
    """The figures of a plan as plain values; `gpus` 0: as many as the degrees make. Raises PunaError for bad input."""
    tables = recipe if isinstance(recipe, Mapping) else read_toml(recipe)
    read, card = build(Recipe, tables, overrides), machine(gpu)
    _check(read, gpus, budget)
    spec = plan_spec(read)
    world = gpus or _product(read)
    degrees = resolve(read.parallel, world, spec, read.data.seq_len, read.train.batch_size)
    make = _maker(read, spec)
    job = make(degrees, 0, read.train.activation_checkpointing)
    ranks, speed = memory(job), throughput(job, card)
    report = _report(job, card, ranks, speed, budget.tokens or read.train.steps * job.tokens, budget)
    report["changes"] = [] if report["fits"] else [_change(found) for found in changes(job, card, make)]
    if best:
        report["search"] = [_candidate(found) for found in search(world, make, card)]
    if picture:
        title = f"{_name(spec)} on {world} x {card.name}: {degrees}, {speed.tokens_per_second:,.0f} tokens/s per GPU"
        report["picture"] = str(_draw(picture, job, card, ranks, speed, title, _figures(report)))
    return report


def plan_spec(recipe: Recipe) -> Spec:
    """The model's shape without its tensors: a folder's, or the preset with the recipe's changes."""
    if recipe.model.path:
        return Spec.load(recipe.model.path)
    tokenizer = Tokenizer.load(recipe.data.tokenizer) if recipe.data.tokenizer else None
    return choose_spec(recipe.model, tokenizer, recipe.data.seq_len)


def print_plan(report: dict[str, Any]) -> None:
    """The plan on stdout: what, memory, time, money, and what to change."""
    rows = _figures(report)
    if "picture" in report:
        rows.append(("picture", report["picture"]))
    print(table([(name.ljust(12), value) for name, value in rows], title=report["title"]))
    print("\n" + _memory_table(report["memory"]))
    print("\n" + _share_table(report["seconds"], report["traffic"]))
    if report["changes"]:
        print("\n" + _change_table(report["changes"]))
    if "search" in report:
        print("\n" + _search_table(report["search"]))


def _figures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the plan comes to, a line each."""
    return [
        ("model", report["model"]),
        ("mesh", f"{report['gpus']} x {report['gpu']}: {report['mesh']}"),
        ("step", f"{report['tokens_per_step']:,} tokens, microbatches {report['microbatches']}, {report['settings']}"),
        ("memory", f"{size(report['memory_peak'])} of {size(report['memory_limit'])} on the fullest rank: "
                   + ("fits" if report["fits"] else "DOES NOT FIT")),
        ("speed", f"{report['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU, {count(report['tokens_per_second'])} "
                  f"in all, {report['step_seconds']:.3g} s a step"),
        ("MFU", f"{report['mfu']:.1%} by {report['mfu_convention']}"),
        ("bubble", f"{report['bubble']:.1%} of a step"),
        ("run", f"{count(report['tokens'])} tokens: {_days(report['days'])}, {report['gpu_hours']:,.0f} GPU hours"
                + (f", ${report['cost']:,.0f}" if report["cost"] else "")),
        ("checkpoint", f"{size(report['checkpoint_bytes'])}, {duration(report['checkpoint_seconds'])} to write at "
                       f"{report['storage_gb_per_second']:g} GB/s per node"),
    ]  # fmt: skip


def _days(days: float) -> str:
    return f"{days:.3g} days" if days >= 2 else duration(days * 86400)


def _maker(recipe: Recipe, spec: Spec) -> Make:
    """Jobs of this recipe with other degrees, microbatches or checkpointing, each checked."""
    train, parallel, length = recipe.train, recipe.parallel, recipe.data.seq_len

    def make(degrees: Degrees, micro: int, mode: str) -> Job:
        check_degrees(parallel, degrees, spec, length, train.batch_size)
        check_passes(parallel, degrees, _dtype(train.dtype), mode, train.compile)
        section = dataclasses.replace(parallel, pp_microbatches=0) if micro else parallel
        number = microbatches(section, degrees, train.batch_size, micro or train.micro_batch_size)
        return Job(
            spec, degrees, length, train.batch_size, number, _dtype(train.dtype), parallel.zero, parallel.cpu_offload,
            parallel.sequence_parallel, parallel.pp_schedule, stages_per_rank(parallel) if degrees.pp > 1 else 1,
            parallel.cp_method, mode, train.compile, train.float8, parallel.async_tp,
        )  # fmt: skip

    return make


def _dtype(name: str) -> str:
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name)


def _check(recipe: Recipe, gpus: int, budget: Budget) -> None:
    at_least_one = {"train.steps": recipe.train.steps, "train.batch_size": recipe.train.batch_size,
                    "data.seq_len": recipe.data.seq_len}  # fmt: skip
    for key, value in at_least_one.items():
        if value < 1:
            raise PunaError(f"{key} is {value}", f"use --{key} 1 or more")
    for key, number in {"gpus": gpus, "tokens": budget.tokens, "price": budget.price}.items():
        if number < 0:
            raise PunaError(f"--{key} is {number}", f"use --{key} 0 or more")
    if budget.storage <= 0:
        raise PunaError(f"--storage is {budget.storage} GB/s", "use --storage 2")


def _product(recipe: Recipe) -> int:
    parallel = recipe.parallel
    return parallel.dp_replicate * max(1, parallel.dp_shard) * parallel.cp * parallel.tp * parallel.pp


def _name(spec: Spec) -> str:
    return f"{spec.model_type} {count(spec.num_params())}"


def _report(
    job: Job, gpu: Machine, ranks: list[Memory], speed: Throughput, tokens: float, budget: Budget
) -> dict[str, Any]:
    spec, world = job.spec, job.degrees.world
    fullest = max(found.total for found in ranks)
    hours = tokens / (speed.tokens_per_second * world) / 3600
    saved = STATE_BYTES * spec.num_params()
    nodes = -(-world // gpu.per_node)
    settings = [job.dtype, f"checkpointing {job.checkpointing}", f"zero {job.zero}"]
    settings += [name for name in ("compile", "float8", "cpu_offload") if getattr(job, name)]
    settings += [job.schedule] if job.degrees.pp > 1 else []
    return {
        "title": f"Plan for {_name(spec)} at {job.seq_len:,} tokens per sequence",
        "model": f"{_name(spec)} parameters, {spec.num_hidden_layers} layers, width {spec.hidden_size}",
        "parameters": spec.num_params(),
        "gpu": gpu.name,
        "gpu_source": gpu.source,
        "gpus": world,
        "mesh": str(job.degrees),
        "degrees": vars(job.degrees),
        "settings": ", ".join(settings),
        "microbatches": job.microbatches,
        "tokens_per_step": job.tokens,
        "memory": [
            found.parts() | {"total": found.total, "reserved": found.reserved, "host": found.host} for found in ranks
        ],
        "memory_peak": fullest,
        "memory_limit": gpu.memory,
        "fits": fullest <= gpu.memory,
        "tokens_per_second_per_gpu": speed.tokens_per_second,
        "tokens_per_second": speed.tokens_per_second * world,
        "step_seconds": speed.seconds,
        "seconds": speed.parts,
        "traffic": speed.traffic,
        "bubble": speed.bubble,
        "mfu": speed.mfu,
        "mfu_convention": MFU,
        "tokens": tokens,
        "days": hours / 24,
        "gpu_hours": hours * world,
        "price": budget.price,
        "cost": hours * world * budget.price,
        "checkpoint_bytes": saved,
        "checkpoint_seconds": saved / (budget.storage * 1e9 * nodes),
        "storage_gb_per_second": budget.storage,
    }


def _change(found: Change) -> dict[str, Any]:
    return {"flags": found.flags, "bytes": found.saved, "fits": found.fits,
            "tokens_per_second_per_gpu": found.tokens_per_second}  # fmt: skip


def _candidate(found: Candidate) -> dict[str, Any]:
    return {
        "mesh": str(found.job.degrees),
        "degrees": vars(found.job.degrees),
        "flags": found.flags,
        "microbatches": found.job.microbatches,
        "memory_peak": found.memory.total,
        "tokens_per_second_per_gpu": found.speed.tokens_per_second,
        "mfu": found.speed.mfu,
        "bubble": found.speed.bubble,
    }


def _draw(
    picture: str, job: Job, card: Machine, ranks: list[Memory], speed: Throughput, title: str,
    figures: list[tuple[str, str]],
) -> Path:  # fmt: skip
    """The picture, or a PunaError: its folder and its ending come from a person."""
    try:
        if Path(picture).suffix in (".html", ".htm"):
            return plan_page(picture, job, card, ranks, speed, title, figures)
        return plan_png(picture, job, card, ranks, speed, title)
    except (OSError, ValueError) as error:
        raise PunaError(
            f"cannot write {picture}: {error}", "give a path such as plan.html or plan.png in a folder that exists"
        ) from error


def _memory_table(ranks: list[dict[str, float]]) -> str:
    """One row per kind of use; the first, the fullest and the last pipeline rank where they differ."""
    fullest = max(range(len(ranks)), key=lambda rank: ranks[rank]["total"])
    shown = sorted({0, fullest, len(ranks) - 1})
    names = [name for name in ranks[0] if any(ranks[rank][name] for rank in shown)]
    rows = [(name, *(size(ranks[rank][name]) for rank in shown)) for name in names]
    return table(rows, ("memory per GPU", *(f"pp rank {rank}" for rank in shown)))


def _share_table(seconds: dict[str, float], traffic: dict[str, float]) -> str:
    total = sum(seconds.values())
    rows = [(name, f"{value:.3g}", f"{value / total:.1%}") for name, value in seconds.items() if value > total / 1000]
    sent = [(name, size(value)) for name, value in traffic.items() if value]
    body = table(rows, ("where a step goes", "seconds", "share"))
    return body + ("\n\n" + table(sent, ("sent per GPU and step", "bytes")) if sent else "")


def _change_table(found: list[dict[str, Any]]) -> str:
    rows = [(f"{c['tokens_per_second_per_gpu']:,.0f}", size(c["bytes"]), "yes" if c["fits"] else "no", c["flags"])
            for c in found]  # fmt: skip
    body = table(rows, ("tokens/s/GPU", "gives back", "fits then", "change"), "What to change")
    return (
        body if any(c["fits"] for c in found) else body + "\nNone is enough alone: --search tries all of them together"
    )


def _search_table(found: list[dict[str, Any]]) -> str:
    if not found:
        return "No mesh fits: use more GPUs, larger ones, a shorter data.seq_len or --parallel.cpu_offload true"
    rows = [
        (f"{c['tokens_per_second_per_gpu']:,.0f}", f"{c['mfu']:.1%}", size(c["memory_peak"]), c["flags"]) for c in found
    ]
    return table(rows, ("tokens/s/GPU", "MFU", "memory", "settings"), "Best meshes that fit")
