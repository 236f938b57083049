"""The report card of a quantization: what was lost, where, what it cost, and whether that is good enough.

Plain data that goes to JSON and back; `text()` is for a terminal, `page.report_page` draws it. What was not measured is
None, and is then left out: never a zero that looks like a result.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from puna.base.console import duration, size, table
from puna.quant.figures import Layer, Quality, Reload, Speed, Suggestion, Verdict, from_plain, suggestion, to_plain
from puna.quant.score import Estimate, Repaired

WORST = 5
WORST_HEADER = ("layer", "format", "bits", "rounding", "after", "suggestion", "costs")
NOTES_SHOWN = 5
OVERRIDES_SHOWN = 3


@dataclass
class Report:
    """Everything the card says. Sizes in bytes, times in seconds; before, rounding and after need evaluation text."""

    model: str
    out: str
    config: dict[str, Any]  # QuantConfig.to_dict()
    format: str  # of the files: compressed-tensors, gptq, awq, gguf
    layers: list[Layer] = field(default_factory=list)
    before: Quality | None = None
    rounding: Quality | None = None  # None too where rounding is all there was
    after: Quality | None = None
    repaired: Repaired | None = None
    parameters: int = 0
    size_before: int = 0
    size_after: int = 0
    peak_memory: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    speed_before: Speed | None = None
    speed_after: Speed | None = None
    calibration: dict[str, Any] = field(default_factory=dict)  # Sequences.provenance
    reload: Reload | None = None
    warnings: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)  # written
    hardware: str = ""
    command: str = ""
    version: str = ""
    date: str = ""  # ISO 8601

    def __post_init__(self) -> None:
        self.config, self.calibration = to_plain(self.config), to_plain(self.calibration)  # as JSON gives them back

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized layers, scales and all; None where there are none."""
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.bits_per_weight * layer.weights for layer in self.layers) / weights if weights else None

    @property
    def bits_per_parameter(self) -> float | None:
        """Of the whole model as it lies on disk, embeddings too."""
        return 8 * self.size_after / self.parameters if self.parameters and self.size_after else None

    def worst(self, number: int = WORST) -> list[Suggestion]:
        """Layers with the largest relative output error, worst first, and the next better format for each."""
        measured = [layer for layer in self.layers if not layer.error < 0]
        # A NaN is worse than any number.
        measured.sort(key=lambda layer: -math.inf if math.isnan(layer.error) else -layer.error)
        return [suggestion(layer, self.format) for layer in measured[:number]]

    def verdict(self, max_increase: float | None = None) -> Verdict:
        """Passed? `max_increase`: of perplexity, relative (see `parse_increase`); None: anything finite passes.

        What cannot be judged does not pass: a limit without evaluation text, a perplexity that is no number.
        """
        if self.reload is not None and not self.reload.passed:
            return Verdict(False, f"the files do not give back what was computed: {self.reload}")
        if self.after is None or self.before is None or self.after.increase is None:
            return Verdict(max_increase is None, "perplexity was not measured: there was no evaluation text")
        increase = self.after.increase
        before, after = (f"{quality.perplexity.value:.4g}" for quality in (self.before, self.after))
        change = f"perplexity {before} -> {after}, {increase.percent(signed=True)}"
        if not math.isfinite(increase.value):
            return Verdict(False, f"{change}: the quantized model gives no numbers")
        if max_increase is None:
            return Verdict(True, change)
        if increase.value > max_increase:
            return Verdict(False, f"{change}; at most +{100 * max_increase:g}% was allowed")
        close = ", by less than twice the error" if increase.value + 2 * (increase.error or 0) > max_increase else ""
        return Verdict(True, f"{change}; within the +{100 * max_increase:g}% that was allowed{close}")

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are none become null. `derived` holds what follows from the rest."""
        worst = [{"name": s.layer.name, "override": s.override, "more_bytes": s.more_bytes} for s in self.worst()]
        speeds = {"before": self.speed_before, "after": self.speed_after}
        derived = {
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": self.bits_per_parameter,
            "share_of_bandwidth": {name: speed and speed.share for name, speed in speeds.items()},
            "reload_passed": self.reload and self.reload.passed,
            "worst": worst,
        }
        return {**to_plain(self), "derived": to_plain(derived)}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Report:
        """The report that `to_json` came from."""
        return from_plain(Report, plain)

    def text(self, verdict: Verdict | None = None) -> str:
        """For a terminal: what was lost, the worst layers, what it cost, the files and the next command.

        After a `verdict` that is not passed there is no next command: `PunaError`'s hint tells the way out.
        """
        parts = [f"{self.model} -> {self.out}", f"{describe(self.config)}; {self.formats()}; {self.format}", ""]
        parts += [table(comparison(self), ("", *columns(self))), ""]
        if self.worst():
            parts += [table(worst_rows(self), WORST_HEADER, "largest output errors"), ""]
        parts += [f"{name}: {line}" for name, line in facts(self)]
        parts += [f"warning: {warning}" for warning in self.warnings]
        parts += [verdict.message] if verdict is not None else []
        parts += [f"wrote {path}" for path in self.paths]
        parts += [f"next: puna chat {shlex.quote(self.out)}"] if verdict is None or verdict.passed else []
        return "\n".join(parts)

    def formats(self) -> str:
        """`28 layers int4_g128, 4 int8`."""
        found = Counter(layer.format for layer in self.layers).most_common()
        return ", ".join(f"{n} {'layers ' if not i else ''}{name}" for i, (name, n) in enumerate(found)) or "no layers"


def columns(report: Report) -> list[str]:
    """The variants there are figures of."""
    return ["before", *(["plain rounding"] if report.rounding else []), "after"]


def comparison(report: Report) -> list[list[str]]:
    """Rows of the main table: a name, then a text per column; rows without any figure are left out."""
    variants = [report.before, *([report.rounding] if report.rounding else []), report.after]
    middle = [""] * (len(variants) - 2)

    def row(name: str, of: Callable[[Quality], object]) -> list[str]:
        return [name, *("" if variant is None else _shown(of(variant)) for variant in variants)]

    def ends(name: str, first: object, last: object) -> list[str]:
        return [name, _shown(first), *middle, _shown(last)]

    mended = report.repaired
    bits = 8 * report.size_before / report.parameters if report.parameters and report.size_before else None
    rows = [
        row("perplexity", lambda q: q.perplexity),
        row("its increase", lambda q: q.increase and q.increase.percent(signed=True)),
        row("bits/byte", lambda q: q.bits_per_byte),
        row("KL from before, nats/token", lambda q: q.kl),
        row("same top-1 token", lambda q: q.top1 and q.top1.percent()),
        ends("damage repaired, nll", None, mended and _share(mended.nll)),
        ends("damage repaired, KL", None, mended and _share(mended.kl)),
        ends("bits/weight, quantized layers", None, report.bits_per_weight),
        ends("bits/weight, whole model", bits, report.bits_per_parameter),
        ends("size", *(nbytes and size(nbytes) for nbytes in (report.size_before, report.size_after))),
        ends("tokens/s, one request", report.speed_before, report.speed_after),
    ]
    return [cells for cells in rows if any(cells[1:])]


def worst_rows(report: Report) -> list[list[str]]:
    """The worst layers as cells under WORST_HEADER."""
    return [
        [
            s.layer.name,
            s.layer.format,
            f"{s.layer.bits_per_weight:.2f}",
            _error(s.layer.error_rounded),
            _error(s.layer.error),
            s.override or "-",
            f"+{size(s.more_bytes)}" if s.override else "-",
        ]
        for s in report.worst()
    ]


def layer_rows(report: Report) -> tuple[list[list[str]], tuple[str, ...]]:
    """(rows, header) of the table of all layers."""
    header = ("layer", "format", "weights", "bits", "rounding", "after", "kernel", "note")
    rows = [
        [layer.name, layer.format, f"{layer.weights:,}", f"{layer.bits_per_weight:.2f}", _error(layer.error_rounded),
         _error(layer.error), layer.kernel, layer.note]
        for layer in report.layers
    ]  # fmt: skip
    return rows, header


def facts(report: Report) -> list[tuple[str, str]]:
    """(name, one line): where the figures come from and what they cost; only what is known."""
    phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in report.seconds.items())
    kernels = Counter(layer.kernel for layer in report.layers if layer.kernel).most_common()
    notes = [f"{layer.name}: {layer.note}" for layer in report.layers if layer.note]
    more = len(notes) - NOTES_SHOWN
    found = [
        *text_facts(report.calibration),
        ("time", f"{duration(sum(report.seconds.values()))} ({phases})" if phases else ""),
        ("peak memory", size(report.peak_memory) if report.peak_memory else ""),
        ("reload check", _shown(report.reload)),
        ("kernels", ", ".join(f"{name} ({number} layers)" for name, number in kernels)),
        *(("note", note) for note in notes[:NOTES_SHOWN]),
        ("notes", f"{more} more in the report's files" if more > 0 else ""),
        ("machine", report.hardware),
        ("command", report.command),
        ("made by", " ".join(word for word in (report.version and f"puna {report.version}", report.date) if word)),
    ]
    return [(name, line) for name, line in found if line]


def text_facts(calibration: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where calibration and evaluation text come from, and that they are disjoint."""
    if not calibration:
        return []
    c, length = calibration, calibration["seq_len"]
    origin = f"{c['documents']:,} documents, {c['template']}, seed {c['seed']}"
    learned = f"{c['samples']:,} x {length:,} tokens of {origin}; ids sha256 {c['calibration_sha256'][:12]}"
    if not c["evaluation_tokens"]:
        return [("calibration", learned)]
    judged = f"{c['evaluation_tokens'] // length:,} x {length:,} tokens, {'bos first' if c['bos'] else 'no bos'}, "
    judged += f"{c['scored_tokens']:,} scored" + (f" ({c['scored_bytes']:,} bytes)" if c["scored_bytes"] else "")
    judged += f"; ids sha256 {c['evaluation_sha256'][:12]}"
    shared = f"{c['shared_tokens']:,} evaluation tokens lie in runs of {c['window_tokens']} that calibration has too"
    disjoint = f"checked by hash: no document in both; {shared}" + (
        "; they are not scored" if c["shared_tokens"] else ""
    )
    known = [("calibration", learned), ("evaluation", judged), ("disjoint", disjoint)]
    return known if c["samples"] else known[1:2]


# Fields of a configuration, in the order of the work, and how their values are told; {} is the value.
_TOLD = {
    "weights": "{}", "rescale": "{}", "clip": "clip", "rounding": "{}", "low_rank": "low rank {}",
    "activations": "activations {}", "outlier_threshold": "outliers from {:g}", "kv": "kv {}",
    "target_bits": "target bits {:g}",
}  # fmt: skip


def describe(config: Mapping[str, Any]) -> str:
    """A configuration in one line: `int4_g128, gptq, kv int8`; what is switched off goes without saying."""
    used = {name: config[name] for name in _TOLD if config.get(name) not in (None, 0, "none", "nearest")}
    words = [_TOLD[name].format(value) for name, value in used.items()]
    overrides = config.get("overrides") or ()
    few = [f"override {override}" for override in overrides]
    return ", ".join(words + (few if len(few) <= OVERRIDES_SHOWN else [f"{len(few)} overrides"]))


def _shown(found: object) -> str:
    return "" if found is None or found == 0 else f"{found:.2f}" if isinstance(found, float) else str(found)


def _share(found: Estimate | None) -> str:
    return "no damage to tell from chance" if found is None else found.percent()


def _error(value: float) -> str:
    return "-" if value < 0 else f"{value:.4f}" if value < 1e3 else f"{value:.1e}"
