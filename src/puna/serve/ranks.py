"""The processes of a job without a mesh: alone, or under torchrun, each with its share of the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from puna.base.hardware import pick_device
from puna.parallel.degrees import Degrees
from puna.parallel.launch import Meeting
from puna.parallel.world import Settings, World, choose_device

_PATIENCE = 3600.0  # seconds: a rank may judge, or measure speed, while the others wait for it


@dataclass(frozen=True)
class Ranks:
    """This process among its neighbours."""

    meeting: Meeting
    device: torch.device

    @property
    def rank(self) -> int:
        return self.meeting.place.rank

    @property
    def size(self) -> int:
        return self.meeting.place.size

    def agree(self, name: str, value: str) -> None:
        """Refuse to go on where ranks do not have the same value."""
        self.meeting.agree(name, value, "start every rank with the same options and files")

    def reduce(self, tensor: Tensor, how: Literal["sum", "max", "cat"]) -> Tensor:
        """The sum or the largest over all ranks, or their rows one after another; alike everywhere."""
        if self.size == 1:
            return tensor
        if how == "cat":
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(parts, tensor.contiguous())
            return torch.cat(parts)
        joined = tensor.clone()
        dist.all_reduce(joined, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return joined


@contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """All processes of this job; inside, one's failure ends all."""
    meeting = Meeting()
    with meeting.together():
        chosen = choose_device(pick_device(device).type, meeting.place)
        settings = Settings(first_timeout=_PATIENCE, timeout=_PATIENCE)
        world = World(meeting, Degrees(dp_shard=meeting.place.size), chosen, settings, needs_mesh=False)
        yield Ranks(meeting, chosen)
        world.close()
