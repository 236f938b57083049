"""The processes of a job without a mesh: alone, or under torchrun, each with its share of the text."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

from puna.base.hardware import pick_device
from puna.parallel.degrees import Degrees
from puna.parallel.launch import Meeting, Place
from puna.parallel.world import Settings, World, choose_device


class Ranks:
    """This process among its neighbours; a context, in which one rank's failure ends all."""

    def __init__(self, device: str):
        self._name = device

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.meeting = Meeting()
            stack.enter_context(self.meeting.together())
            place: Place = self.meeting.place
            self.rank, self.size = place.rank, place.size
            self.device = choose_device(pick_device(self._name).type, place)
            settings = Settings(timeout=1800.0, flight=Path("flight"))
            self._world = World(self.meeting, Degrees(dp_shard=place.size), self.device, settings, needs_mesh=False)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._stack:
            if error[0] is None:
                self._world.close()
            else:
                self._stack.__exit__(*error)

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
