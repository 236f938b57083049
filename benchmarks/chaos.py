"""Kills a job of four ranks again and again, at random moments, and looks at what comes of it.

`python benchmarks/chaos.py [--kills N] [--seed S] [--result FILE] [--only MESH]` runs a tiny model on dp_shard 2 x tp 2
and on pp 2 x dp_shard 2 under torchrun --max-restarts, saving in the background every second step. SIGKILL hits in turn
one rank, a rank in the middle of a save, all ranks, torchrun itself (which is then started again). Once the disk is
full, and once the store that holds the saves answers nobody. A run that ends before its kills are used up is looked
at, and another begins. At the end of each: the losses of every step and the bytes of the weights are those of an
undisturbed run, and every save is whole. Ranks are forked, not started anew (tests/train/launch_checks.py), so that
most of the time goes into training, dying and coming back, not into importing torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fault_proxy import FaultProxy
from puna.base import files
from puna.weights.checkpoint import list_steps, verify
from puna.weights.folder import load_model
from puna.weights.manifest import read_manifest
from train.launch_checks import Job, losses, send, until, write_inputs, write_recipe

RANKS, STEPS = 4, 30
MESHES: dict[str, dict[str, Any]] = {"dp_shard 2 x tp 2": {"tp": 2}, "pp 2 x dp_shard 2": {"pp": 2}}
KINDS = ("one rank", "in a save", "one rank", "in a save", "all ranks", "torchrun")
OPTIONS = ["--standalone", f"--nproc_per_node={RANKS}", "--max-restarts=1000"]
# What a kill waits for, and how many seconds after it at most; the others come at any time, also while ranks start.
MOMENTS = {"in a save": (".step-*.tmp/.shared-*", 0.02), "one rank": ("step-*", 2.0)}
PATIENCE = 120.0  # seconds


class Victim:
    """A job that is started again when torchrun itself has ended, as a cluster does."""

    def __init__(
        self, folder: Path, name: str, mesh: dict[str, Any], checkpoint: dict[str, Any] | None = None, **env: str
    ):
        self.run, self._env = folder / name, env
        saving = {"every": 2, "grace": 5.0, **checkpoint}
        changes = {
            "train": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 1},
            "parallel": mesh,
            "checkpoint": saving,
        }
        self._words = ["train", str(write_recipe(folder, name, **changes))]
        self._log, self.launches, self.restarts = folder / "logs" / name, 0, 0
        self._start()

    def _start(self) -> None:
        self.launches += 1
        self.job = Job(self._log.with_name(f"{self._log.name}-{self.launches}"), OPTIONS, self._words, **self._env)

    @property
    def running(self) -> bool:
        return bool(self.job.processes())

    def kill(self, kind: str, draw: random.Random) -> bool:
        """False where the run ended first."""
        if not self._wait_for_ranks():
            return False
        pattern, pause = MOMENTS.get(kind, ("", 5.0))
        old = set(self.run.glob(pattern)) if pattern else set()  # a save that an earlier kill has cut is no new one
        arrived = until(lambda: not pattern or set(self.run.glob(pattern)) - old or not self.running, PATIENCE)
        assert arrived, f"no {pattern} after {PATIENCE:.0f} s"
        if until(lambda: not self.running, draw.random() * pause):
            return False
        ranks = self.job.ranks()
        victims = {"all ranks": list(ranks.values()), "torchrun": [self.job.agent]}
        for pid in victims.get(kind, [ranks[draw.randrange(RANKS)]]):
            send(pid, signal.SIGKILL)
        if kind == "torchrun":
            assert until(lambda: not self.running, 60), "ranks outlived their torchrun"
            self._end_and_start()
        return True

    def finish(self) -> None:
        """Let it run to its end."""
        code = self.job.wait(PATIENCE)
        assert code == 0, f"exit code {code}\n{self.job.err[-4000:]}"
        self.restarts += self.job.starts(RANKS) - 1

    def _end_and_start(self) -> None:
        self.restarts += self.job.starts(RANKS)
        self.job.end()
        self._start()

    def _wait_for_ranks(self) -> bool:
        """Until torchrun has started all ranks, after a kill once more."""
        ranks = lambda: set(self.job.ranks().values()) & set(self.job.processes())  # noqa: E731
        arrived = until(lambda: len(ranks()) == RANKS or not self.running, PATIENCE)
        assert arrived, f"no ranks after {PATIENCE:.0f} s\n{self.job.err[-4000:]}"
        return self.running


class Chaos:
    """`kills` kills on one mesh; `counts` by kind, `rounds` runs that came to their end."""

    def __init__(self, folder: Path, mesh: dict[str, Any], kills: int, seed: int):
        self.folder, self._mesh, self._kills, self._draw = folder, mesh, kills, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.rounds = self.restarts = self.launches = 0
        write_inputs(folder)
        self.calm = self._end(Victim(folder, "calm", mesh, {}))

    def run(self) -> None:
        while sum(self.counts.values()) < self._kills:
            victim = Victim(self.folder, f"round-{self.rounds}", self._mesh, {})
            try:
                while sum(self.counts.values()) < self._kills:
                    kind = KINDS[sum(self.counts.values()) % len(KINDS)]
                    if not victim.kill(kind, self._draw):
                        break
                    self.counts[kind] += 1
                    print(f"{sum(self.counts.values())}: {kind}, step {max(losses(victim.run), default=0)}", flush=True)
                self._compare(self._end(victim))
            finally:
                victim.job.end()

    def run_full_disk(self) -> None:
        """A tiny disk, which grows once it was full."""
        disk = self.folder / "disk"
        disk.mkdir()
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            print("no full disk: this needs the right to mount")
            return
        try:
            for name in ("text", "tokenizer"):
                (disk / name).symlink_to(self.folder / name)
            victim = Victim(disk, "run", self._mesh, {})
            mend = ["mount", "-o", "remount,size=64m", str(disk)]
            self._suffer(victim, "full disk", "the disk is full", lambda: subprocess.run(mend, check=True))
        finally:
            subprocess.run(["umount", "-l", disk], check=False)

    def run_lost_store(self) -> None:
        """Saves in a bucket whose server hangs up on everybody for a while."""
        from moto.moto_server.threaded_moto_server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        address = "http://{}:{}".format(*server.get_host_and_port())
        urllib.request.urlopen(urllib.request.Request(f"{address}/chaos", method="PUT"), timeout=30).close()
        proxy = FaultProxy(address)
        env = {"AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": "AKIDPUNATEST", "AWS_SECRET_ACCESS_KEY": "secret",
               "AWS_REGION": "us-east-1", "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1", "PUNA_STORE_TIMEOUT": "5",
               "PUNA_CACHE": str(self.folder / "cache")}  # fmt: skip
        os.environ |= env  # here the saves are looked at
        victim = Victim(self.folder, "store", self._mesh, {"folder": "s3://chaos/run", "every": 5}, **env)
        try:
            until(lambda: len(list_steps("s3://chaos/run")) > 1 or not victim.running, PATIENCE)
            for kind in ("get", "put", "list", "head", "delete", "post"):
                proxy.always("reset", kind)
            self._suffer(victim, "lost store", "s3://chaos", proxy.calm)
        finally:
            proxy.close()
            server.stop()

    def _suffer(self, victim: Victim, kind: str, says: str, mend: Callable[[], Any]) -> None:
        try:
            told = until(lambda: says in "".join(_errors(victim.job)) or not victim.running, PATIENCE)
            assert told, f"no word of the {kind}\n{victim.job.err[-4000:]}"
            assert victim.running, f"it did not notice the {kind}"
            mend()
            self.counts[kind] += 1
            self._compare(self._end(victim))
            print(f"{kind}: {_errors(victim.job)[0]}", flush=True)
        finally:
            victim.job.end()

    def _end(self, victim: Victim) -> Path:
        victim.finish()
        self.restarts += victim.restarts
        self.launches += victim.launches
        return victim.run

    def _compare(self, run: Path) -> None:
        """As if nothing had happened."""
        assert losses(run) == losses(self.calm), "losses differ"
        saves: list[str | Path] = [*list_steps(run)] or [*list_steps("s3://chaos/run")]
        assert [verify(save) for save in saves] == [[], []], "a save is damaged"
        assert not list(run.glob(".step-*")), "half a save is left"
        for name in (name for name in read_manifest(saves[-1]) if not name.startswith("state/")):
            assert files.read_file(files.join(saves[-1], name)) == (self.calm / "latest" / name).read_bytes(), name
        load_model(str(saves[-1]))
        self.rounds += 1


def _errors(job: Job) -> list[str]:
    return [line for line in job.err.splitlines() if line.startswith("error: ")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=MESHES, help="one mesh, without the full disk and the lost store")
    parser.add_argument("--result", default=str(Path(__file__).with_name("results") / "chaos.json"))
    choice = parser.parse_args()
    meshes = {choice.only: MESHES[choice.only]} if choice.only else MESHES
    report: dict[str, Any] = {"ranks": RANKS, "steps": STEPS, "seed": choice.seed, "meshes": {}}
    for number, (name, mesh) in enumerate(meshes.items()):
        started, kills = time.monotonic(), choice.kills // len(meshes) + (number < choice.kills % len(meshes))
        with tempfile.TemporaryDirectory(prefix="puna-chaos-", ignore_cleanup_errors=True) as folder:
            chaos = Chaos(Path(folder) / "in", mesh, kills, choice.seed + number)
            chaos.run()
            if not choice.only and number == 0:
                chaos.run_full_disk()
                chaos.run_lost_store()
        report["meshes"][name] = {"kills": dict(chaos.counts), "restarts": chaos.restarts, "launches": chaos.launches,
                                  "rounds": chaos.rounds, "seconds": round(time.monotonic() - started, 1)}  # fmt: skip
        print(name, report["meshes"][name], flush=True)
        Path(choice.result).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
