"""How many samples each shard makes: from the manifest where it says so, else from the document offsets, once."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from puna.base.console import PunaError, status
from puna.base.storage import read_json, write_json
from puna.data.cut import Cut
from puna.data.reader import ShardReader

FEW = 8  # shards that are counted in no time: nothing is kept, nothing said


def count_samples(reader: ShardReader, cut: Cut, cache: Path) -> list[int]:
    """Samples of every shard. What had to be counted is kept in `cache`, under a name made of corpus and cut."""
    known = [cut.count(info) for info in reader.manifest.shards]
    if None not in known:
        return [number for number in known if number is not None]
    numbers = range(len(known))
    if len(known) <= FEW:
        return [cut.count_starts(reader.starts(number), number) for number in numbers]
    question = f"{reader.manifest.fingerprint()} {cut!r}"
    answer = cache / "counts" / f"{hashlib.sha256(question.encode()).hexdigest()}.json"
    if answer.exists():
        counts = _read(answer)
        if len(counts) == len(known):
            return counts
    with status(f"counting the samples of {len(known)} shards of {reader.name} (once)"), ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda number: cut.count_starts(reader.starts(number), number), numbers))
    write_json(answer, counts)
    return counts


def _read(path: Path) -> list[int]:
    """What was kept; a damaged file counts as none."""
    try:
        found = read_json(path)
    except PunaError:
        return []
    return found if isinstance(found, list) and all(isinstance(n, int) for n in found) else []
