from __future__ import annotations

import tomllib
from dataclasses import dataclass, field

import pytest

from puna.base.config import build, describe, knob, parse_overrides, read_toml, to_toml
from puna.base.console import PunaError


@dataclass(frozen=True)
class Inner:
    rate: float = knob(0.5, "a rate")
    betas: tuple[float, float] = knob((0.9, 0.95), "two numbers")


@dataclass(frozen=True)
class Outer:
    name: str = knob("x", "a name")
    steps: int = knob(3, "a count")
    fast: bool = knob(False, "a switch")
    paths: tuple[str, ...] = knob((), "names")
    inner: Inner = field(default_factory=Inner)


def test_toml_then_command_line() -> None:
    made = build(Outer, {"steps": 5, "inner": {"rate": 1}}, {"inner.rate": "2e-3", "fast": "true", "paths": "a,b"})
    assert made == Outer(steps=5, fast=True, paths=("a", "b"), inner=Inner(rate=2e-3))


@pytest.mark.parametrize(
    ("tables", "message", "hint"),
    [
        ({"setps": 1}, "unknown key 'setps'", "'steps'"),
        ({"inner": {"rat": 1}}, "unknown key 'inner.rat'", "'inner.rate'"),
        ({"steps": "many"}, "'steps' must be a whole number, got 'many'", "steps = 100"),
        ({"steps": 1.5}, "whole number", ""),
        ({"steps": True}, "whole number", ""),
        ({"fast": "maybe"}, "true or false", ""),
        ({"name": 3}, "'name' must be text", ""),
        ({"inner": {"betas": [1.0]}}, "takes 2 values, got 1", ""),
        ({"inner": 3}, "is a section", "[inner]"),
    ],
)
def test_wrong_recipes_name_the_way_out(tables: dict, message: str, hint: str) -> None:
    with pytest.raises(PunaError) as caught:
        build(Outer, tables)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_overrides() -> None:
    assert parse_overrides(["--a.b", "1", "--c-d=x"]) == {"a.b": "1", "c_d": "x"}
    assert parse_overrides(["--a", "-1"]) == {"a": "-1"}
    for wrong in (["a"], ["--a"], ["--a", "--b", "1"]):
        with pytest.raises(PunaError):
            parse_overrides(wrong)


def test_toml_round_trip() -> None:
    made = Outer(name='a "b" \\ é', paths=("x",), inner=Inner(rate=1e-7))
    assert build(Outer, tomllib.loads(to_toml(made))) == made


def test_describe_lists_every_knob() -> None:
    assert ("inner.betas", "0.9,0.95", "two numbers") in describe(Outer)


def test_missing_and_broken_files(tmp_path) -> None:
    with pytest.raises(PunaError, match="no recipe at"):
        read_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(PunaError, match="not a readable TOML"):
        read_toml(tmp_path / "bad.toml")


def test_an_empty_word_is_the_empty_list() -> None:
    assert build(Outer, {"paths": ["a"]}, {"paths": ""}).paths == ()
