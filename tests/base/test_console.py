from __future__ import annotations

import math

from puna.base import console


def test_units() -> None:
    assert console.count(1_234_567) == "1.23M"
    assert console.count(999) == "999"
    assert console.size(1536) == "1.50 KiB"
    assert console.duration(3.21) == "3.2s"
    assert console.duration(75) == "1m15s"
    assert console.duration(7260) == "2h01m"


def test_table_aligns_numbers_right() -> None:
    text = console.table([("a", "1"), ("long", "22")], ("name", "n"))
    assert text.splitlines() == ["name   n", "----  --", "a      1", "long  22"]


def test_curve_falls_from_the_first_to_the_last_column() -> None:
    lines = console.curve([math.exp(-i / 8) for i in range(40)], width=20, height=4).splitlines()
    assert len(lines) == 4
    assert lines[0].strip().startswith("1.00")
    assert lines[0].split("|")[1][0] != "⠀"
    assert lines[-1].split("|")[1][-1] != "⠀"
    assert "too few" in console.curve([1.0])
    assert console.curve([1.0, math.nan, 2.0])
