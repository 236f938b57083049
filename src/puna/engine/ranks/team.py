"""Several processes that answer as one: rank 0 schedules and draws, the others compute their part of every step.

Rank 0 tells the others what comes (a kind and its arrays), then all compute it, with sums among them; logits of each
rank's words are gathered on rank 0. The others do nothing else: `follow` is their whole life.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from puna.base.console import PunaError
from puna.base.hardware import dtype_name
from puna.engine.batch import Batch
from puna.engine.options import EngineOptions
from puna.engine.ranks.shard import Part, load_part, local_kv_heads
from puna.engine.runner import Runner
from puna.model.linear import use_activations
from puna.model.transformer import Transformer
from puna.ops.paged import Pages
from puna.parallel.plan import bounds

IDLE = 3650 * 86400.0  # seconds: a server may wait long for its next request; dead ranks are noticed otherwise
_START = 300.0  # seconds in which workers must have loaded their part


class Team:
    """The ranks that hold a model together. On rank 0: `lead`. On the others: `follow`, until rank 0 says `stop`."""

    def __init__(self, part: Part, workers: Sequence[subprocess.Popen[bytes]] = ()):
        self.part, self._workers, self._stopped = part, list(workers), False

    @property
    def size(self) -> int:
        return self.part.size

    @staticmethod
    def spawn(path: str, dtype: torch.dtype, size: int, patience: float = _START) -> Team:
        """Start `size - 1` workers on this machine, for a program that is itself one process, such as a server."""
        store = dist.TCPStore("127.0.0.1", 0, size, True, timedelta(seconds=patience), wait_for_workers=False)
        command = [
            sys.executable,
            "-m",
            "puna.engine.ranks.worker",
            path,
            dtype_name(dtype),
            str(size),
            str(store.port),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // size))}
        workers = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(1, size)]
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
        try:
            _wait_for(store, workers, patience)
            dist.init_process_group("gloo", store=store, rank=0, world_size=size, timeout=timedelta(seconds=IDLE))
        except BaseException:
            for worker in workers:
                worker.kill()
            raise
        return Team(Part(0, size), workers)

    def stop(self) -> None:
        """Rank 0: the others end. Once is enough."""
        if self._stopped:
            return
        self._stopped = True
        self.tell("stop", None)
        for worker in self._workers:
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()
        if self._workers:
            dist.destroy_process_group()

    def check(self) -> None:
        """Errors: PunaError when a worker has died: its part of the weights is gone."""
        for rank, worker in enumerate(self._workers, 1):
            if (code := worker.poll()) is not None:
                raise PunaError(
                    f"worker {rank} of {self.size} has ended with code {code}", "look at its messages above"
                )

    def tell(self, kind: str, payload: Any) -> None:
        """Rank 0 to all: what comes next."""
        self.check()
        data = torch.frombuffer(bytearray(pickle.dumps((kind, payload), protocol=5)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(data)]), 0, group=self.part.group)
        dist.broadcast(data, 0, group=self.part.group)

    def hear(self) -> tuple[str, Any]:
        """The others: what rank 0 tells next. (Pickles come from rank 0 of this job alone.)"""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, 0, group=self.part.group)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self.part.group)
        kind, payload = pickle.loads(data.numpy().tobytes())
        return kind, payload


class TeamRunner(Runner):
    """A rank's part of every step; logits of all words come together on rank 0."""

    def __init__(self, model: Transformer, pages: Pages, max_len: int, team: Team):
        super().__init__(model, pages, max_len, native=False)
        self._team = team
        self.path = f"layer by layer on {team.size} ranks"

    def _score(self, rows_R: np.ndarray) -> Tensor:
        part, vocab = self._team.part, self.model.spec.vocab_size
        mine_RV = super()._score(rows_R)
        step = bounds(vocab, 0, part.size)[1]  # the widest part; a narrower last one is padded
        padded_RV = mine_RV.new_zeros(len(mine_RV), step)
        padded_RV[:, : mine_RV.shape[1]] = mine_RV
        parts = [torch.empty_like(padded_RV) for _ in range(part.size)]
        dist.all_gather(parts, padded_RV, group=part.group)
        return torch.cat(parts, 1)[:, :vocab]


class LeadingRunner(TeamRunner):
    """Rank 0's: tells the others before it computes."""

    def run(self, batch: Batch) -> Tensor:
        self._team.tell("run", batch)
        return super().run(batch)

    def hidden(self, batch: Batch) -> None:
        self._team.tell("hidden", batch)
        super().hidden(batch)

    def logits(self, rows_R: np.ndarray) -> Tensor:
        self._team.tell("logits", rows_R)
        return super().logits(rows_R)

    def documents(self, documents: Sequence[Sequence[int]]) -> Tensor:
        self._team.tell("documents", [list(ids) for ids in documents])
        return super().documents(documents)


def lead(team: Team, model: Transformer, pages: Pages, max_len: int, options: EngineOptions) -> LeadingRunner:
    """Rank 0's runner, once the others have made the same pages."""
    shape = {"num_pages": pages.num_pages, "page_size": pages.page_size, "dtype": pages.keys.dtype, "max_len": max_len}
    team.tell("pages", shape | {"activations": options.activations})
    return LeadingRunner(model, pages, max_len, team)


def follow(team: Team, model: Transformer) -> None:
    """The life of every rank but 0: compute what rank 0 says, until it says stop."""
    runner: TeamRunner | None = None
    while True:
        kind, payload = team.hear()
        if kind == "stop":
            return
        if kind == "pages":
            runner = _prepare(team, model, **payload)
        else:
            assert runner is not None
            getattr(runner, kind)(payload)


def join(path: str, dtype: torch.dtype, size: int, port: int, rank: int) -> None:
    """What a spawned worker does from its first to its last moment."""
    store = dist.TCPStore("127.0.0.1", port, size, False, timedelta(seconds=_START))
    part = Part(rank, size)
    model = load_part(path, dtype, torch.device("cpu"), part)
    store.set(f"ready/{rank}", "")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=IDLE))
    follow(Team(part), model)


def _prepare(
    team: Team, model: Transformer, num_pages: int, page_size: int, dtype: torch.dtype, max_len: int, activations: str
) -> TeamRunner:
    if activations != "exact":
        use_activations(model, activations)
    spec, scales = model.spec, getattr(model, "kv_scales", None)
    scales = scales if scales is not None and dtype in (torch.int8, torch.float8_e4m3fn) else None
    pages = Pages.of(
        spec.num_hidden_layers, local_kv_heads(model), spec.head_dim, num_pages, page_size, dtype,
        model.embed.device, scales,
    )  # fmt: skip
    return TeamRunner(model, pages, max_len, team)


def _wait_for(store: dist.TCPStore, workers: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Until every worker has loaded its part; one that ends before says so here, instead of a silent wait."""
    deadline = time.monotonic() + patience
    while not store.check([f"ready/{rank}" for rank in range(1, len(workers) + 1)]):
        for rank, worker in enumerate(workers, 1):
            if worker.poll() is not None:
                raise PunaError(f"worker {rank} has ended with code {worker.returncode}", "see its messages above")
        if time.monotonic() > deadline:
            raise PunaError(f"the workers were not ready within {patience:.0f} s", "see their messages above")
        time.sleep(0.05)
