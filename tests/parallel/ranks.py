"""Runs functions on several ranks of this machine and reports what each found: one launch for many checks.

torch is imported once and the ranks are forked from that process, which saves most of a launch. They meet over a file, not
a port. `run` is for tests; as a program: `ranks.py MODULE.py REPORT.json`, where MODULE has WORLDS = {ranks: [functions]}.
A module with OWN_GROUPS = True starts its process groups itself; RANK and WORLD_SIZE are in the environment. None between two
functions starts new ranks: torch remembers some groups of a process beyond their end.
A function that returns is 'ok' and may return numbers; a raised exception is reported; a hang ends with the time-out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 240


def run(module: Path, timeout: int = TIMEOUT) -> dict[str, dict[str, Any]]:
    """{'check@ranks': {'ok': bool, 'error': text, 'result': numbers of rank 0}} of every check of `module`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        process = subprocess.Popen(
            [sys.executable, __file__, str(module), str(report)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            raise AssertionError(f"no answer within {timeout} s:\n{output[-4000:]}") from None
        assert report.exists(), output[-4000:]
        return json.loads(report.read_text())


def _rank(rank: int, world: int, checks: list[Any], folder: str, own_groups: bool) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    if not own_groups:
        store = dist.FileStore(f"{folder}/store-{world}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for check in checks:
        begun = time.perf_counter()
        try:
            entry = {"ok": True, "error": "", "result": check()}
        except Exception:
            entry = {"ok": False, "error": f"rank {rank}: {traceback.format_exc()}", "result": None}
        found[f"{check.__name__}@{world}"] = {**entry, "seconds": round(time.perf_counter() - begun, 2)}
        Path(f"{folder}/{world}-{rank}.json").write_text(json.dumps(found))
    if not own_groups:
        dist.barrier()
    os._exit(0)  # without the destructors of a forked interpreter


def _main(module: Path, report: Path) -> None:
    import torch.multiprocessing as multiprocessing

    place = importlib.util.spec_from_file_location(module.stem, module)
    loaded = importlib.util.module_from_spec(place)
    sys.modules[module.stem] = loaded  # dataclasses look their module up
    place.loader.exec_module(loaded)
    merged: dict[str, Any] = {}
    own = getattr(loaded, "OWN_GROUPS", False)
    for world, checks in loaded.WORLDS.items():
        for launch in _launches(checks):
            folder = tempfile.mkdtemp()
            context = multiprocessing.get_context("fork")
            ranks = [
                context.Process(target=_rank, args=(r, world, launch, folder, own), daemon=True) for r in range(world)
            ]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            _merge(merged, world, [f"{check.__name__}@{world}" for check in launch], folder)
    report.write_text(json.dumps(merged))


def _launches(checks: list[Any]) -> list[list[Any]]:
    found: list[list[Any]] = [[]]
    for check in checks:
        if check is None:
            found.append([])
        else:
            found[-1].append(check)
    return found


def _merge(merged: dict[str, Any], world: int, names: list[str], folder: str) -> None:
    files = [Path(f"{folder}/{world}-{rank}.json") for rank in range(world)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    missing = {"ok": False, "error": "a rank died or hung before it", "result": None}
    for name in names:
        entries = [rank.get(name, missing) for rank in found]
        errors = [entry["error"] for entry in entries if not entry["ok"]]
        merged[name] = {**entries[0], "ok": not errors, "error": "\n".join(errors)}


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
