"""What a rank has to write of one step, copied to host memory: all that a save costs the training itself.

The copies live in buffers that stay from save to save (pinned beside a GPU: then the copies run at the bus's full speed
and allocating them is paid once), so nothing here shares memory with what training changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

Box = tuple[slice, ...]


class Layout(Protocol):
    """How tensors are cut over ranks: the module puna.parallel.pieces, or `Whole`. See there for the meanings."""

    def pieces_of(self, parameter: Tensor, coordinate: Sequence[int] | None = None) -> Box: ...

    def in_copy_of(self, parameter: Tensor, owner: int) -> bool: ...

    def collect(
        self, wanted: Sequence[tuple[Tensor, int, Tensor]], group: ProcessGroup | None = None
    ) -> Tensor | None: ...


class Whole:
    """The Layout of one process: plain tensors, and nobody to talk to."""

    def pieces_of(self, parameter: Tensor, coordinate: Sequence[int] | None = None) -> Box:
        return tuple(slice(0, length) for length in parameter.shape)

    def in_copy_of(self, parameter: Tensor, owner: int) -> bool:
        return owner == 0

    def collect(self, wanted: Sequence[tuple[Tensor, int, Tensor]], group: ProcessGroup | None = None) -> Tensor | None:
        return wanted[0][2] if wanted else None


@dataclass(frozen=True)
class Piece:
    """A box of a tensor of this `shape` that begins at `offsets`; `data` is the box."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class Snapshot:
    """One step as this rank saw it. `weights`: this rank's parts, by name; `state`: pieces to write, by key."""

    weights: dict[str, Tensor]
    state: dict[str, Piece]


class HostMemory:
    """Makes snapshots; keeps their buffers. The snapshot before must be written before the next is taken."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(
        self,
        parameters: Mapping[str, Tensor],
        owners: Mapping[str, int],
        optimizer: torch.optim.Optimizer,
        rank: int,
    ) -> Snapshot:
        """Copy what this rank sends or writes: parts of the copy that each parameter's owner is in.

        `owners`: the rank that writes each parameter's file. Other copies (replicas) have the same numbers.
        """
        weights = {}
        for name, parameter in parameters.items():
            if self._layout.in_copy_of(parameter, owners[name]):
                weights[name] = self._copy(f"weight/{name}", parameter)
        state = self._state(parameters, owners, optimizer, rank) | self._random(rank)
        if any(parameter.is_cuda for parameter in parameters.values()):
            torch.cuda.synchronize()  # the copies were only queued
        return Snapshot(weights, state)

    def _state(
        self, parameters: Mapping[str, Tensor], owners: Mapping[str, int], optimizer: torch.optim.Optimizer, rank: int
    ) -> dict[str, Piece]:
        """Optimizer state as {'exp_avg/layers.0.attn.q_proj.weight': piece}: by parameter name, not by position."""
        pieces = {}
        for name, parameter in parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                mine = isinstance(tensor, DTensor) and self._layout.in_copy_of(tensor, owners[name])
                if mine or (not isinstance(tensor, DTensor) and owners[name] == rank):
                    pieces[f"{key}/{name}"] = self._piece(f"{key}/{name}", tensor)
        return {key: piece for key, piece in pieces.items() if piece.data.numel()}

    def _random(self, rank: int) -> dict[str, Piece]:
        """The default generators' states, by rank: ranks may draw different numbers."""
        states = {f"rng/cpu/{rank}": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states[f"rng/cuda/{rank}"] = torch.cuda.get_rng_state()
        return {key: Piece(tuple(state.shape), (0,), state.clone()) for key, state in states.items()}

    def _piece(self, key: str, tensor: Tensor) -> Piece:
        offsets = tuple(part.start for part in self._layout.pieces_of(tensor))
        return Piece(tuple(tensor.shape), offsets, self._copy(key, tensor))

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        part = tensor.detach()
        part = part.to_local() if isinstance(part, DTensor) else part
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (part.shape, part.dtype):
            pinned = part.is_cuda and part.numel() > 0
            buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned)
            self._buffers[key] = buffer
        return buffer.copy_(part, non_blocking=part.is_cuda)
