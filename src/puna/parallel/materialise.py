"""From a model on meta to weights on this rank: each whole tensor exists for a moment, one at a time.

Every rank draws the whole model's random numbers from the same generator and keeps its part: no communication, and the
weights are the single process's, whatever the mesh. Drawing costs about 1 s per 10^10 numbers on a GPU. A loader hands
in its own `fill` that reads the tensor from disk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from puna.model.transformer import Transformer
from puna.parallel.pieces import pieces_of


@torch.no_grad()
def materialise(
    model: nn.Module, device: torch.device, fill: Callable[[str, Tensor], None], offload: bool = False
) -> None:
    """Allocate this rank's parts and fill them. `fill(name, tensor)` writes one whole parameter, in `device` memory.

    Called in the order of `named_parameters`. Memory: the parts, plus one whole parameter. `offload`: parts lie on the
    CPU.
    """
    model.to_empty(device="cpu" if offload else device)
    for name, parameter in model.named_parameters():
        _fill_one(name, parameter, device, fill)


def _fill_one(name: str, parameter: Tensor, device: torch.device, fill: Callable[[str, Tensor], None]) -> None:
    # A function of its own, so that a whole tensor is gone before the next one is made.
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    fill(name, whole)
    assign(parameter, whole)


@torch.no_grad()
def init_weights(model: Transformer, device: torch.device, seed: int, offload: bool = False) -> None:
    """Allocate this rank's parts and give them the numbers of one process's `Transformer.init_weights` for this seed.

    A pipeline stage has some of the parameters: those of other stages are drawn, too, and forgotten.
    """
    model.to_empty(device="cpu" if offload else device)
    generator = torch.Generator(device).manual_seed(seed)
    mine = dict(model.named_parameters())
    with torch.device("meta"):
        whole_model = Transformer(model.spec)
    for name, shape in ((name, p.shape) for name, p in whole_model.named_parameters()):
        whole = torch.empty(shape, device=device)
        model.init_parameter(name, whole, generator)
        if name in mine:
            assign(mine[name], whole)
        del whole  # gone before the next one is made


@torch.no_grad()
def assign(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of a whole tensor into a parameter, plain or DTensor."""
    held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if held.numel():  # DTensor may give an empty part another shape
        held.copy_(whole[pieces_of(parameter)])
