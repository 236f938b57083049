"""Which tensor goes into which weight file, and which rank writes it: planned alike on every rank, without talking.

Files hold neighbours in the model's order and about the same number of bytes, so that many ranks write side by side
(parallel writers as in FastPersist, Wang et al. 2024, arXiv:2406.13768, section 4.2), each to files of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

LARGEST = 5 * 10**9  # bytes of a file; what Hugging Face's hub asks for
SMALLEST = 256 * 2**20  # below that a second writer gains less than a second file costs


@dataclass(frozen=True)
class WeightFile:
    """A file to be written by rank `owner`, with these parameters (our names) in this order."""

    name: str
    owner: int
    parameters: tuple[str, ...]


def plan_files(
    sizes: Mapping[str, int],
    holders: Mapping[str, Sequence[int]] | None = None,
    largest: int = LARGEST,
    smallest: int = SMALLEST,
) -> list[WeightFile]:
    """Files for tensors of these bytes, in the mapping's order. `holders`: the ranks that have (a part of) each.

    A file's tensors share their holders (under a pipeline each stage writes its own), one of whom is the owner: the
    first rank for the first file, and so on, evenly spread. A tensor larger than `largest` has a file of its own.
    """
    parts: list[tuple[int, tuple[str, ...]]] = []
    for ranks, group in groupby(sizes, lambda name: tuple(holders[name]) if holders else (0,)):
        names = list(group)
        cut = _cut({name: sizes[name] for name in names}, len(ranks), largest, smallest)
        parts += [(ranks[number * len(ranks) // len(cut)], part) for number, part in enumerate(cut)]
    if len(parts) == 1:
        return [WeightFile("model.safetensors", *parts[0])]
    return [WeightFile(f"model-{i:05d}-of-{len(parts):05d}.safetensors", *part) for i, part in enumerate(parts, 1)]


def index_of(files: Iterable[WeightFile], disk_names: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, object]:
    """The payload of model.safetensors.index.json."""
    where = {disk_names[name]: file.name for file in files for name in file.parameters}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}


def queues(files: Iterable[WeightFile]) -> dict[int, list[str]]:
    """What each owner writes, in its order: {rank: parameters}."""
    found: dict[int, list[str]] = {}
    for file in files:
        found.setdefault(file.owner, []).extend(file.parameters)
    return found


def _cut(sizes: Mapping[str, int], writers: int, largest: int, smallest: int) -> list[tuple[str, ...]]:
    """Neighbours in as few even parts as fit under `largest`, but one for each writer if these are not too small."""
    total = sum(sizes.values())
    number = max(1, -(-total // largest), min(writers, total // smallest))
    while True:
        parts = _even_parts(sizes, number, total)
        if all(len(part) == 1 or sum(sizes[name] for name in part) <= largest for part in parts):
            return parts
        number += 1


def _even_parts(sizes: Mapping[str, int], number: int, total: int) -> list[tuple[str, ...]]:
    """A tensor goes to the part that its middle byte falls into; parts that no middle falls into are left out."""
    parts: dict[int, list[str]] = {}
    before = 0
    for name, size in sizes.items():
        parts.setdefault((2 * before + size) * number // (2 * max(1, total)), []).append(name)
        before += size
    return [tuple(part) for part in parts.values()]
