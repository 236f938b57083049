"""A plan as an image: the pipeline's schedule over time, and each rank's memory as a stacked bar. `page` makes HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.parallel.job import Job
from puna.parallel.machines import GIB, Machine
from puna.parallel.memory import Memory
from puna.parallel.schedules import Timeline, simulate
from puna.parallel.throughput import Throughput

# Of an action: fill for the first and the second chunk of a rank (the later ones repeat).
COLOURS = {
    "F": ("#4c78a8", "#9ecae9"),
    "B": ("#f58518", "#ffbf79"),
    "I": ("#f58518", "#ffbf79"),
    "W": ("#54a24b", "#a1d99b"),
}
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
PARTS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#eeca3b", "#ff9da6", "#72b7b2", "#d8d8d8", "#8c8c8c")
MOST_SHOWN = 24  # microbatches drawn; a longer step repeats its middle


def plan_png(path: str | Path, job: Job, gpu: Machine, memory: Sequence[Memory], speed: Throughput, title: str) -> Path:
    """Write the picture of a plan to `path` (its ending chooses the format: .png, .svg, .pdf) and return it."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    deep = job.degrees.pp > 1
    figure = Figure(figsize=(12, 4 + (1.5 + 0.3 * job.degrees.pp if deep else 0)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(
        2 if deep else 1, 1, squeeze=False, height_ratios=[0.5 + 0.1 * job.degrees.pp, 1] if deep else [1]
    )
    if deep:
        _draw_schedule(axes[0][0], job, speed)
    _draw_memory(axes[-1][0], gpu, memory)
    figure.savefig(path, dpi=110)
    return Path(path)


def drawn_timeline(job: Job, speed: Throughput) -> tuple[Timeline, str]:
    """The schedule of as many microbatches as a picture can show, and its caption."""
    ranks = job.degrees.pp
    shown = min(job.microbatches, max(MOST_SHOWN, 2 * ranks))
    shown -= shown % ranks if job.schedule == "interleaved" and shown < job.microbatches else 0
    line = simulate(job.schedule, ranks, shown, job.stages_per_rank, *vars(speed.times).values())
    part = "" if shown == job.microbatches else f"; {shown} of {job.microbatches} microbatches drawn"
    return line, f"{job.schedule}, stages per rank {job.stages_per_rank}: ranks wait {speed.bubble:.1%} of a step{part}"


def _draw_schedule(axis: Any, job: Job, speed: Throughput) -> None:
    """One row per pipeline rank, one box per chunk with its microbatch, white where a rank waits."""
    ranks = job.degrees.pp
    line, caption = drawn_timeline(job, speed)
    used: dict[str, Any] = {}
    for event in line.events:
        chunk = 0 if event.stage < ranks else 1
        colour = COLOURS[event.kind][chunk]
        box = axis.barh(
            event.rank, event.end - event.start, left=event.start, color=colour, edgecolor="white", height=0.9
        )
        label = NAMES[event.kind] + (", later chunk" if chunk else "")
        used.setdefault(label, box)
        if len(line.events) < 1200:
            centre = (event.start + event.end) / 2
            axis.text(centre, event.rank, str(event.microbatch), ha="center", va="center", fontsize=6, clip_on=True,
                      color="black" if chunk or event.kind != "F" else "white")  # fmt: skip
    axis.set(ylabel="pipeline rank", xlabel="seconds", xlim=(0, line.makespan), yticks=range(ranks))
    axis.invert_yaxis()
    axis.set_title(caption)
    axis.legend(used.values(), used.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def _draw_memory(axis: Any, gpu: Machine, memory: Sequence[Memory]) -> None:
    left = [0.0] * len(memory)
    ranks = range(len(memory))
    for colour, name in zip(PARTS, memory[0].parts(), strict=True):
        size = [found.parts()[name] / GIB for found in memory]
        if max(size) > 0:
            axis.barh(ranks, size, left=left, color=colour, label=name, height=0.8)
        left = [a + b for a, b in zip(left, size, strict=True)]
    axis.axvline(gpu.memory / GIB, color="#d62728", linestyle="--", label=f"{gpu.name}: {gpu.memory / GIB:.0f} GiB")
    for rank, total in enumerate(left):
        axis.text(total, rank, f" {total:.1f}", va="center", fontsize=8)
    axis.set(xlabel="GiB per GPU", ylabel="pipeline rank", yticks=ranks, xlim=(0, 1.12 * max(*left, gpu.memory / GIB)))
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
