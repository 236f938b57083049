"""Pipeline stages: a Transformer cut between layers, each part with the parameter names of the whole.

So tensor parallelism, FSDP2, checkpoints and the weights' seed treat a stage like the model: layer 7's query projection
is `layers.7.attn.q_proj.weight` wherever it is. Between stages travels the residual stream x_TD. Shapes: T tokens,
D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.model.attention import Attend
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.rope import cos_sin
from puna.parallel.degrees import split_layers
from puna.parallel.schedules import rank_of


class Stage(Transformer):
    """Some layers of a Transformer; the embedding if it is the first stage, last norm and head if it is the last."""

    def __init__(self, spec: Spec, layers: range, first: bool, last: bool):
        super().__init__(spec)
        self.first, self.last = first, last
        # A dictionary, because a list would number the layers from 0.
        self.register_module("layers", nn.ModuleDict({str(layer): self.layers[layer] for layer in layers}))
        if not first:
            self.register_parameter("embed", None)
        if not last:
            self.register_module("norm", None)
            self.register_module("lm_head", None)

    def forward(self, x: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Tokens (T,) of the first stage or hidden states of the one before to hidden states (T, D).

        Positions are those of all tokens also where sequence parallelism has cut the hidden states: attention sees all.
        """
        x_TD = self.look_up(x, self.embed) if self.first else x
        inv_freq = self._inverse_frequencies(positions_T.device, attend.max_len)
        cos, sin = cos_sin(positions_T, inv_freq, self._rope_scale, x_TD.dtype)
        for block in self.layers.children():
            x_TD = block(x_TD, cos, sin, attend)
        return self.norm(x_TD) if self.last else x_TD


def make_stage(spec: Spec, layers: range, first: bool, last: bool) -> Stage:
    """One stage on meta: building it costs no memory, whatever the size of the model."""
    with torch.device("meta"):
        return Stage(spec, layers, first, last)


def make_stages(spec: Spec, schedule: str, rank: int, ranks: int, each: int) -> list[Stage]:
    """This pipeline rank's `each` stages on meta, in the order of the layers."""
    sizes = split_layers(spec.num_hidden_layers, ranks * each)
    found = []
    for index in owned_stages(schedule, rank, ranks, each):
        begin = sum(sizes[:index])
        layers = range(begin, begin + sizes[index])
        found.append(make_stage(spec, layers, index == 0, index == len(sizes) - 1))
    return found


def owned_stages(schedule: str, rank: int, ranks: int, each: int) -> list[int]:
    """Which of the `ranks` x `each` stages a pipeline rank owns, ascending."""
    return [stage for stage in range(ranks * each) if rank_of(schedule, stage, ranks) == rank]
