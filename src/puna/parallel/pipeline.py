"""Pipeline parallelism: PyTorch's schedules over this rank's stages, with a layout of documents per microbatch.

torch cuts one big tensor into microbatches. Ours differ in more than that: each has its own positions and its own
`attend`. So what torch cuts is the list of their numbers, and a hook before each stage looks the microbatch up.

Gradients are summed over microbatches, never averaged: the loss is already divided by the scored tokens of the whole
global batch. Under torch's stages FSDP2 keeps them whole on a rank and reduces them once, after its last microbatch: so
zero 2 is zero 1. With zero 3 blocks are cut again after a forward pass, but not after a backward pass: nearly the peak
memory of zero 2, and all weights gathered for every microbatch (a rank with 4 blocks, 4 microbatches: 21 all-gathers a
step, with zero 2 five). Prefer zero 2, as Llama 3 did (arXiv:2407.21783, section 3.3.2).

A rank that fails leaves its neighbours waiting until the process group's time-out. What can be seen beforehand (too few
microbatches, lengths that differ) is refused on every rank alike, before anything is sent.

Schedules: see `schedules`, which knows their bubbles and memory. Shapes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import GradientEdge
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from puna.base.console import PunaError
from puna.model.attention import Attend
from puna.parallel.replicas import reshard
from puna.parallel.schedules import SPLIT_BACKWARD, check_schedule, rank_of
from puna.parallel.stages import Stage, owned_stages

Microbatch = tuple[Tensor, Tensor, Attend]  # tokens_T, positions_T and who looks at whom

_SINGLE: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_MANY: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Pipeline:
    """This rank's stages, run in step with the other ranks of a 1-D mesh.

    `stages`: as `stages.make_stages` gives them, already parallelized. `dtype`: of hidden states between stages, which
    is the one FSDP2 computes in. `cut`: ranks over which their tokens are cut: tp under sequence parallelism, else 1.
    Every rank of the mesh calls the constructor and each method alike.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        mesh: DeviceMesh,
        schedule: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        cut: int = 1,
    ):
        self.group, self.rank, self.ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.name, self.device, self.dtype, self.cut = schedule, device, dtype, cut
        self.total = self.ranks * len(stages)
        self.splits_backward = schedule in SPLIT_BACKWARD and _autograd_splits()
        self.stages = dict(zip(owned_stages(schedule, self.rank, self.ranks, len(stages)), stages, strict=True))
        self._schedule: tuple[tuple[int, int], Any] | None = None
        self._microbatches: Sequence[Microbatch] = ()
        self._loss: Callable[[int, Tensor], Tensor] | None = None
        for stage in stages:
            _keep_whole(stage, schedule)
            # Before FSDP2's own hook, which then sees what it sees without a pipeline.
            stage.register_forward_pre_hook(self._look_up, with_kwargs=True, prepend=True)
        # NCCL wants every rank of a group in its first call; point-to-point calls have two.
        dist.all_reduce(torch.zeros(1, device=device), group=self.group)

    @property
    def has_first(self) -> bool:
        """This rank embeds tokens."""
        return 0 in self.stages

    @property
    def has_last(self) -> bool:
        """This rank has the head, and is the one whose `loss` and `score` are called. In V schedules it is rank 0."""
        return self.total - 1 in self.stages

    def parameters(self) -> list[nn.Parameter]:
        """Of all stages of this rank."""
        return [parameter for stage in self.stages.values() for parameter in stage.parameters()]

    def step(self, microbatches: Sequence[Microbatch], loss: Callable[[int, Tensor], Tensor]) -> None:
        """Forward and backward of all microbatches of an optimizer step; gradients are in `.grad` afterwards, reduced.

        `microbatches`: the same on every pipeline rank; all look at positions and `attend`, only the first at tokens.
        `loss(number, hidden_TD)` returns the scalar to differentiate; it is called where `has_last`. One call makes all
        of a step's gradients: another one may drop those that are there.
        Raises PunaError, on every rank, for lengths that differ or a number that the schedule cannot take.
        """
        self._check_cut(microbatches)
        schedule = self._scheduled(_common_length(microbatches), len(microbatches))
        numbers = torch.arange(len(microbatches))  # on the CPU: reading one waits for no GPU
        self._microbatches, self._loss = microbatches, loss
        try:
            schedule.step(number=numbers, target=numbers, return_outputs=False)
        finally:
            self._microbatches, self._loss = (), None

    @torch.no_grad()
    def forward(self, microbatches: Sequence[Microbatch], score: Callable[[int, Tensor], None]) -> None:
        """Hidden states after the last norm (T, D) of each microbatch, in order, to `score(number, hidden_TD)`.

        For validation: no gradients, any number of microbatches of any lengths, the same on every pipeline rank and as
        many on every data rank. Called where `has_last`. Ranks march in step: in tick t stage s runs microbatch t - s,
        then everything moves on by one stage in a single exchange. That cannot deadlock, whatever the order of stages.
        """
        self._check_cut(microbatches)
        arrived: dict[int, Tensor] = {}
        for tick in range(len(microbatches) + self.total - 1):
            made: dict[int, Tensor] = {}
            for index, stage in self.stages.items():
                if 0 <= (number := tick - index) < len(microbatches):
                    tokens_T, positions_T, attend = microbatches[number]
                    made[index] = stage(arrived[index] if index else tokens_T, positions_T, attend)
                    if index == self.total - 1:
                        score(number, made[index])
            arrived = self._move_on(tick, made, microbatches)
        for stage in self.stages.values():
            reshard(stage)

    def _move_on(self, tick: int, made: dict[int, Tensor], microbatches: Sequence[Microbatch]) -> dict[int, Tensor]:
        """Hidden states from each stage to the next one's rank; both ends go through the stages in one order."""
        arrived, moves = {}, []
        for stage in range(self.total - 1):
            if not 0 <= (number := tick - stage) < len(microbatches):
                continue
            here, there = (rank_of(self.name, s, self.ranks) for s in (stage, stage + 1))
            if here == there == self.rank:
                arrived[stage + 1] = made[stage]
            elif here == self.rank:
                moves.append(dist.P2POp(dist.isend, made[stage].contiguous(), group=self.group, group_peer=there))
            elif there == self.rank:
                arrived[stage + 1] = self._hidden(len(microbatches[number][1]) // self.cut, self.device)
                moves.append(dist.P2POp(dist.irecv, arrived[stage + 1], group=self.group, group_peer=here))
        for work in dist.batch_isend_irecv(moves) if moves else ():
            work.wait()
        return arrived

    def _check_cut(self, microbatches: Sequence[Microbatch]) -> None:
        for _, positions_T, _ in microbatches:
            if len(positions_T) % self.cut:
                raise PunaError(
                    f"{len(positions_T)} tokens in a micro-batch are not divisible by tp {self.cut}",
                    "choose seq_len x micro_batch_size divisible by tp, or --parallel.sequence_parallel false",
                )

    def _hidden(self, tokens: int, device: torch.device | str) -> Tensor:
        width = next(iter(self.stages.values())).spec.hidden_size
        return torch.empty(tokens, width, dtype=self.dtype, device=device)

    def _look_up(self, stage: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """From torch's (received hidden states, number of the microbatch) to a stage's arguments."""
        if "number" not in kwargs:
            return None
        tokens_T, positions_T, attend = self._microbatches[int(kwargs["number"])]
        return (args[0] if args else tokens_T, positions_T, attend), {}

    def _score(self, hidden_TD: Tensor, number: Tensor) -> Tensor:
        assert self._loss is not None
        return self._loss(int(number), hidden_TD)

    def _scheduled(self, tokens: int, microbatches: int) -> Any:
        """torch's schedule for this shape; its buffers are of fixed size, so another shape gets another one."""
        shape = (tokens, microbatches)
        if self._schedule is None or self._schedule[0] != shape:
            check_schedule(self.name, self.ranks, microbatches, len(self.stages))
            self._schedule = None  # its buffers go before the new ones come
            stages = [self._torch_stage(index, tokens) for index in self.stages]
            # Sums, not means; and no outputs at the end: the loss has seen them.
            settings: dict[str, Any] = {"loss_fn": self._score, "scale_grads": False}
            if self.name in _SINGLE:
                made = _SINGLE[self.name](stages[0], microbatches, **settings)
            else:
                made = _MANY[self.name](stages, microbatches, **settings)
            self._schedule = (shape, made)
        return self._schedule[1]

    def _torch_stage(self, index: int, tokens: int) -> _TorchStage:
        """With its shapes: to find them out torch would run the stage on meta, where our kernels do not run."""
        passed = self._hidden(tokens // self.cut, "meta").requires_grad_()
        made = self._hidden(tokens, "meta").requires_grad_() if index == self.total - 1 else passed
        return _TorchStage(
            self.stages[index],
            index,
            self.total,
            self.device,
            input_args=(passed,) if index else (),
            output_args=(made,),
            group=self.group,
            # What is left to do for weights once inputs have their gradients; None: torch's own splitting.
            dw_builder=None if self.splits_backward else lambda: _nothing,
        )


class _TorchStage(PipelineStage):
    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # In torch 2.11 neighbours greet each other first, in the V schedules also the two stages of one rank, and gloo
        # cannot send to itself. Nothing calls this in 2.13.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _Twice(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


def _autograd_splits() -> bool:
    """Whether a Function written in Python, such as our loss, can be gone back through once its output is let go.

    In torch 2.11 it cannot, and the split fails. There the split schedules make both gradients in one go, in the same
    order of microbatches: the same numbers, with longer waits.
    """
    x = torch.ones(1, requires_grad=True)
    with torch.enable_grad():
        edge = GradientEdge(_Twice.apply(x).grad_fn, 0)
    try:
        torch.autograd.grad([edge], [x], [torch.ones(1)])
    except RuntimeError:
        return False
    return True


def _nothing() -> None:
    """One backward pass has made the gradients of inputs and of weights."""


def _common_length(microbatches: Sequence[Microbatch]) -> int:
    lengths = sorted({len(positions_T) for _, positions_T, _ in microbatches})
    if len(lengths) != 1:
        raise PunaError(
            f"microbatches of one step have {', '.join(map(str, lengths)) or 'no'} tokens",
            "a pipeline needs microbatches of one length: pack them to the same seq_len x micro_batch_size",
        )
    return lengths[0]


def _keep_whole(stage: Stage, schedule: str) -> None:
    """Split backward passes look for the weights they ran forward with; those that FSDP2 has cut again are others.

    With zero 3 that loses gradients without an error. `degrees` refuses it where ranks share weights; where FSDP2 only
    casts or joins copies there is nothing to save, and weights stay whole.
    """
    if schedule in SPLIT_BACKWARD and isinstance(stage, FSDPModule):
        stage.set_reshard_after_forward(False)
