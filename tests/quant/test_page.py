"""The report card as HTML: whole, alone, and safe to open whatever a model is called."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest

from puna.quant.figures import Layer, Quality, Verdict
from puna.quant.page import report_page
from puna.quant.report import Report
from puna.quant.score import Estimate
from quant.sample_report import layers, sample_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that tags close in order; gathers text, tool tips and attributes."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.marks: list[tuple[str, dict]] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.marks.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.marks.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.marks if name == tag]


def _page(tmp_path, report: Report, verdict: Verdict | None = None) -> Page:
    path = report_page(report, tmp_path / "quant_report.html", verdict)
    assert path == tmp_path / "quant_report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_every_figure_is_on_the_page(tmp_path) -> None:
    report = sample_report()
    page = _page(tmp_path, report, report.verdict(0.01))
    for words in (
        "Quantization of models/opt",
        "perplexity 27.65 -> 29.39, +6.29 ± 0.32%; at most +1% was allowed",
        "warning: the cache's scales were clipped",
        "27.65 ± 0.30",
        "30.49 ± 0.35",
        "29.39 ± 0.33",
        "1.049 ± 0.011",
        "87.65 ± 0.29%",
        "38.7 ± 2.1%",
        "44.4 ± 1.3%",
        "+10.270%",
        "0.0512",
        "19.07 MiB",
        "6.10 MiB",
        "32.0%",
        "99 (63% of bandwidth)",
        '--override "layers.2.mlp.down_proj=int8"',
        "layers.0.attn.q_proj, int4_g128: 0.01",
        "layers.1.attn.o_proj: int8, 8.00 bits per weight",
        "int4_g128 (4.12 bits)",
        "after: 1 sequences, KL 0.03 to 0.032",
        "128 x 512 tokens of 412 documents",
        "passed, max |dlogit| 3.1e-06",
        "damping raised to 0.1",
        '"rounding": "gptq"',
        '"evaluation_tokens": 32768',
        "All 9 layers",
    ):
        assert words in page.text, words
    for layer in report.layers:
        assert f"{layer.error_rounded:.4f}" in page.text


def test_it_needs_nothing_else(tmp_path) -> None:
    path = report_page(sample_report(), tmp_path / "card.html")
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img|javascript:", source)
    assert "prefers-color-scheme: dark" in source
    assert page.of("meta")[1]["content"].startswith("width=device-width")
    assert all(svg["aria-label"] for svg in page.of("svg"))
    assert [file.name for file in tmp_path.iterdir()] == ["card.html"]


def test_every_colour_is_known_in_light_and_in_dark(tmp_path) -> None:
    many = [Layer(f"layers.0.mlp.p{n}_proj", f"int{2 + n % 7}", 10, 4.0, 0.2, 0.1) for n in range(12)]
    for report in (sample_report(), sample_report(layers=many)):
        source = report_page(report, tmp_path / "card.html").read_text(encoding="utf-8")
        light, dark = source.split("@media (prefers-color-scheme: dark)")
        dark = dark.partition("} }")[0]
        for name in set(re.findall(r"var\(--([\w-]+)\)", source)) - {"of"}:
            assert f"--{name}: #" in light, name
            assert f"--{name}: #" in dark, name


def test_drawings_stay_inside_their_frames(tmp_path) -> None:
    wild = [dataclasses.replace(layer, error=layer.error * 10.0 ** (n - 4)) for n, layer in enumerate(layers())]
    better = Quality(Estimate(27.0, 0.3), None, Estimate(-0.02, 0.5), Estimate(1e-7, 1e-6), Estimate(0.99))
    for report in (sample_report(), sample_report(layers=wild), sample_report(after=better)):
        page = _page(tmp_path, report)
        width = None
        for tag, attributes in page.marks:
            if tag == "svg":
                _, top, width, height = map(float, attributes["viewbox"].split())
            for names, extent, low in ((("x", "x1", "x2", "cx"), width, 0), (("y", "y1", "y2", "cy"), None, None)):
                for name in names:
                    if width is None or name not in attributes:
                        continue
                    value = float(attributes[name])
                    start, end = (low, extent) if extent else (top, top + height)
                    assert start <= value <= end, (tag, attributes)
            if tag in ("rect",):
                assert float(attributes["width"]) > 0
                assert float(attributes["x"]) + float(attributes["width"]) <= width


def test_bars_have_the_lengths_of_their_values(tmp_path) -> None:
    page = _page(tmp_path, sample_report())
    boxes = [box for box in page.of("rect") if box["height"] == "22.0"]
    increase, kl, sizes = (boxes[place : place + 2] for place in (0, 2, 4))
    for (one, other), ratio in ((increase, 0.0629 / 0.1027), (kl, 0.0512 / 0.0921), (sizes, 6.4 / 20)):
        assert float(other["width"]) / float(one["width"]) == pytest.approx(ratio, rel=0.01)


def test_hostile_names_are_only_text(tmp_path) -> None:
    evil = '<script>alert("1")</script>&amp;\'"><img src=x onerror=alert(1)>'
    changes = {
        "model": evil,
        "out": evil,
        "config": {"weights": evil, "overrides": [evil]},
        "format": evil,
        "layers": [Layer(evil, evil, 10, 4.0, 0.2, 0.1, evil, evil), Layer(f"layers.0.{evil}", evil, 1, 4.0, 0.2, 0.1)],
        "warnings": [evil],
        "hardware": evil,
        "command": evil,
        "version": evil,
        "seconds": {evil: 1.0},
    }
    page = _page(tmp_path, sample_report(**changes), Verdict(False, evil))
    assert not page.of("script")
    assert not page.of("img")
    assert page.text.count("alert") > 10
    assert not any(name.startswith("on") for _, attributes in page.marks for name in attributes)


def test_a_report_of_almost_nothing(tmp_path) -> None:
    page = _page(tmp_path, Report("m", "o", {}, "gguf"))
    assert not page.of("svg")
    for words in ("None", "nan"):
        assert words not in page.text


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_is_not_drawn(tmp_path, number) -> None:
    lost = Estimate(number, number)
    broken = Quality(lost, None, lost, lost, lost, (number, number))
    layer = Layer("layers.0.attn.q_proj", "int4", 10, 4.0, number, number)
    page = _page(tmp_path, sample_report(after=broken, rounding=broken, layers=[layer, *layers()]))
    assert str(number) in page.text
    shapes = [mark for tag in ("rect", "line", "circle", "text") for mark in page.of(tag)]
    assert not re.search(r"\b(nan|inf)\b", str(shapes))
    assert len([box for box in page.of("rect") if box["height"] == "22.0"]) == 2  # the sizes
    assert len(page.of("circle")) == 18
