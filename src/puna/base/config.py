"""Recipes: frozen dataclasses filled from TOML, then from `--section.key value`. An unknown key names the nearest.

A section is a dataclass, its fields are made by `knob(default, help)`, and types are checked: nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from puna.base.console import PunaError

S = TypeVar("S")


def knob(default: Any, help: str) -> Any:
    """A dataclass field with its one-line documentation (shown by `puna train --help`)."""
    if isinstance(default, (list, dict)):
        raise TypeError("defaults must be immutable; use a tuple")
    return dataclasses.field(default=default, metadata={"help": help})


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; a missing or broken one is a PunaError with the line."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PunaError(f"no recipe at {path}", "give the path of a .toml file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise PunaError(f"{path} is not a readable TOML file: {error}", "see https://toml.io for the syntax") from error


def build(cls: type[S], tables: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> S:
    """An instance of the recipe `cls` from nested tables, with dotted `overrides` ('optim.lr': 1e-3) on top."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tables.items()}
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.rpartition(".")
        target = merged.setdefault(section, {}) if section else merged
        if not isinstance(target, dict):
            raise PunaError(f"{section!r} is a single value, not a section", _known(cls))
        target[key] = value
    return _fill(cls, merged, "")


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """['--optim.lr', '1e-3', '--data.shuffle=false'] -> {'optim.lr': '1e-3', 'data.shuffle': 'false'}."""
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise PunaError(f"unexpected argument {word!r}", "overrides look like --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise PunaError(f"{word} has no value", f"write {word} VALUE")
            value = rest.pop(0)
        found[key.replace("-", "_")] = value
    return found


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, help) of every knob, section by section."""
    rows = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.default_factory):
            rows += describe(f.default_factory, f"{prefix}{f.name}.")
        else:
            default = "" if f.default is dataclasses.MISSING else _show(f.default)
            rows.append((prefix + f.name, default, f.metadata.get("help", "")))
    return rows


def as_dict(recipe: Any) -> dict[str, Any]:
    """Nested plain values of a recipe, as JSON and TOML hold them."""
    return dataclasses.asdict(recipe)


def to_toml(recipe: Any) -> str:
    """A recipe as TOML with every key, so that a run can be read and repeated."""
    values = as_dict(recipe)
    top = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for name, section in values.items():
        if isinstance(section, dict):
            top += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items())]
    return "\n".join(top) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # TOML spells booleans, numbers and basic strings as JSON does


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _fill(cls: type[S], table: Mapping[str, Any], prefix: str) -> S:
    hints = get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise PunaError(f"unknown key {prefix + key!r}", _nearest(prefix + key, cls, prefix))
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in table.items()})


def _nearest(dotted: str, cls: type, prefix: str) -> str:
    names = [prefix + f.name for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(dotted, names, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"


def _known(cls: type) -> str:
    return "keys: " + ", ".join(f.name for f in dataclasses.fields(cls))


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value`, from TOML (typed) or from the command line (text), as the type `hint`."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise PunaError(f"{key!r} is a section, not a value ({value!r} given)", f"write [{key}] and keys below it")
        return _fill(hint, value, f"{key}.")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        return _convert_tuple(hint, value, key)
    kind = type(value)
    if hint is bool and str(value).lower() in ("true", "false") and kind in (bool, str):
        return str(value).lower() == "true"
    if hint is int and kind in (int, str, float):
        return _integer(value, key)
    if hint is float and kind in (int, float, str):
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and kind is str:
        return value
    raise PunaError(f"{key!r} must be {_type_name(hint)}, got {value!r}", f"write {key} = {_example(hint)}")


def _convert_tuple(hint: Any, value: Any, key: str) -> tuple[Any, ...]:
    items = [part for part in value.split(",") if value] if isinstance(value, str) else value  # "" is the empty list
    if not isinstance(items, Sequence):
        raise PunaError(
            f"{key!r} must be a list, got {value!r}", "write it as [a, b] in TOML or a,b on the command line"
        )
    args = get_args(hint)
    if args[-1] is not Ellipsis and len(items) != len(args):
        raise PunaError(f"{key!r} takes {len(args)} values, got {len(items)}", "write exactly that many")
    return tuple(_convert(args[0], item, key) for item in items)


def _integer(value: int | str | float, key: str) -> int:
    try:
        number = float(str(value).replace("_", ""))  # 1e6 and 1_000_000 are both whole numbers
    except ValueError:
        number = 0.5
    if isinstance(value, bool) or number != int(number):
        raise PunaError(f"{key!r} must be a whole number, got {value!r}", f"write {key} = 100")
    return int(number)


def _type_name(hint: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))


def _example(hint: Any) -> str:
    return {bool: "true", int: "100", float: "0.001", str: '"text"'}.get(hint, "...")
