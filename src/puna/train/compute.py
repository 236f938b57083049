"""A model on its ranks: forward and backward of a step's micro-batches. It knows no optimizer, no data and no saves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from puna.base.hardware import parse_dtype
from puna.data.pack import Batch
from puna.model.attention import Attend
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.parallel.apply import Fill, Options, parallelize
from puna.parallel.degrees import microbatches, stages_per_rank
from puna.parallel.exchange import context_parallel
from puna.parallel.gradients import clip_gradients
from puna.parallel.loss import cross_entropy
from puna.parallel.pipeline import Microbatch, Pipeline
from puna.parallel.recompute import checkpoint_activations, compile_blocks
from puna.parallel.replicas import micro_batch, reshard, unwrap
from puna.parallel.schedules import SPLIT_BACKWARD
from puna.parallel.sharding import shard
from puna.parallel.stages import Stage, make_stages
from puna.parallel.world import World
from puna.train.fake_quant import fake_quantize_linears, switch, training_config
from puna.train.recipe import Recipe


class Compute:
    """One model, whole or cut over the ranks of `world`; `fill` gives its weights once it is cut.

    Losses are sums over scored tokens. What a rank returns is its contribution to a sum over all ranks that counts each
    token once: nothing from ranks that repeat another's tokens (tensor parallelism) or see no loss (all but the last
    stage of a pipeline).
    """

    def __init__(self, recipe: Recipe, spec: Spec, world: World, fill: Fill):
        self.recipe, self.spec, self.world = recipe, spec, world
        self.dtype = parse_dtype(recipe.train.dtype)
        self.options = options_of(recipe)
        self.modules = self._build(fill)
        # By global name. Kept from here on: while FSDP has gathered a block, the block shows other ones.
        self.parameters: dict[str, Tensor] = {}
        for module in self.modules:
            module.train()
            self.parameters |= dict(unwrap(module).named_parameters())
        # FSDP gathers weights in `options.dtype`; where that is not what is computed with, autocast casts.
        gathered = self.options.dtype if isinstance(unwrap(self.modules[0]), FSDPModule) else torch.float32
        self._autocast = self.dtype != gathered
        self._counts = world.place_in("tp") == 0  # the others have the same losses
        self._first = self._counts and world.place_in("pp") == 0 and world.place_in("cp") == 0

    @property
    def model(self) -> Transformer:
        """The Transformer, or this rank's part of it."""
        return unwrap(self.modules[0])  # type: ignore[return-value]

    @property
    def remark(self) -> str:
        """What a person should know of how this machine's torch runs it; empty if nothing."""
        return ""

    @property
    def micro_size(self) -> int:
        """Sequences of one forward pass."""
        return self.recipe.train.micro_batch_size or self.recipe.train.batch_size // self.world.data_ranks

    def scored(self, batches: Sequence[Batch]) -> int:
        """This rank's contribution to the number of scored tokens."""
        return sum(batch.valid for batch in batches) if self._first else 0

    def step(self, batches: Sequence[Batch], scale: float | Tensor) -> Tensor:
        """Gradients of `scale` times the summed loss; this rank's contribution to the summed nll."""
        total = torch.zeros((), device=self.world.device)
        (module,) = self.modules
        for number, batch in enumerate(batches):
            with micro_batch(module, number == len(batches) - 1, self.options.zero):
                loss, nll = self.loss(batch)
                (loss * scale).backward()
            total += nll
        return total * self._counts

    @torch.no_grad()
    def score(self, batches: Sequence[Batch]) -> Tensor:
        """This rank's contribution to the summed nll of held-out batches. All ranks call it with as many."""
        total = torch.zeros((), device=self.world.device)
        for batch in batches:
            total += self.loss(batch)[1]
        reshard(self.modules[0])
        return total * self._counts

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss and summed negative log-likelihood of the scored tokens that this rank holds of a batch."""
        inputs, targets_T = self._share(batch)
        with self._arithmetic():
            return self._loss_of(self.modules[0](*inputs), self.model, targets_T)

    def round_numbers(self, on: bool) -> None:
        """Compute with the numbers that will be served, or with the weights as they are: what [quant] asks for."""
        for module in self.modules:
            switch(module, on)

    def clip(self, limit: float) -> Tensor:
        """Global gradient norm before clipping to `limit` (0: never), alike on every rank."""
        return clip_gradients(self.parameters.values(), limit)

    def _loss_of(self, hidden_TD: Tensor, model: Transformer, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(hidden_TD, model.head_weight, targets_T, self.recipe.optim.z_loss)

    def _share(self, batch: Batch) -> tuple[Microbatch, Tensor]:
        """What this rank holds of a batch, with how it sees the rest, and its targets."""
        batch = batch.to(self.world.device)
        columns, attend = (batch.tokens_T, batch.positions_T, batch.targets_T), batch.attend
        if (part := self.world.part("cp")) is None:
            return (batch.tokens_T, batch.positions_T, attend), batch.targets_T
        method, heads = self.recipe.parallel.cp_method, self.spec.num_attention_heads // self.world.degrees.tp
        tokens_T, positions_T, targets_T = shard(columns, part.get_local_rank(), part.size(), method)
        across: Attend = context_parallel(attend, part.get_group(), method, heads)
        return (tokens_T, positions_T, across), targets_T

    def _arithmetic(self) -> AbstractContextManager[None]:
        return torch.autocast(self.world.device.type, self.dtype, enabled=self._autocast)

    def _build(self, fill: Fill) -> list[nn.Module]:
        with torch.device("meta"):
            model = Transformer(self.spec)
        if self.world.mesh is not None:
            return [parallelize(model, self.world.mesh, self.options, fill=fill)]
        blocks: list[nn.Module] = list(model.layers)
        if self.options.rewrite is not None:
            self.options.rewrite(model)
        checkpoint_activations(blocks, self.options.activation_checkpointing)
        if self.options.compiler is not None:
            compile_blocks(blocks, self.options.compiler)
        fill(model, self.world.device, False)
        return [model]


class PipelinedCompute(Compute):
    """A model cut between layers: this rank has some stages, and all ranks of its pipeline see the same batches."""

    def __init__(self, recipe: Recipe, spec: Spec, world: World, fill: Fill):
        super().__init__(recipe, spec, world, fill)
        mesh, parallel, tp = world.part("pp"), recipe.parallel, world.degrees.tp
        assert mesh is not None
        cut = tp if parallel.sequence_parallel else 1
        stages: list[Stage] = self.modules  # type: ignore[assignment]
        self._pipeline = Pipeline(stages, mesh, parallel.pp_schedule, world.device, self.dtype, cut)

    @property
    def remark(self) -> str:
        """This torch may be too old to split a backward pass: same numbers, a longer bubble."""
        schedule = self._pipeline.name
        whole = schedule in SPLIT_BACKWARD and not self._pipeline.splits_backward
        return f"; {schedule} with whole backward passes under torch {torch.__version__}" if whole else ""

    @property
    def micro_size(self) -> int:
        """Sequences of one microbatch of the schedule."""
        train, degrees = self.recipe.train, self.world.degrees
        number = microbatches(self.recipe.parallel, degrees, train.batch_size, train.micro_batch_size)
        return train.batch_size // degrees.data // number

    def step(self, batches: Sequence[Batch], scale: float | Tensor) -> Tensor:
        """As `Compute.step`, all micro-batches on their way at once."""
        total = torch.zeros((), device=self.world.device)
        inputs, targets = zip(*map(self._share, batches), strict=True)

        def loss(number: int, hidden_TD: Tensor) -> Tensor:
            loss, nll = self._loss_of(hidden_TD, self._last, targets[number])
            total.add_(nll)
            return loss * scale

        self._pipeline.step(inputs, loss)
        return total * self._counts

    @torch.no_grad()
    def score(self, batches: Sequence[Batch]) -> Tensor:
        """As `Compute.score`."""
        total = torch.zeros((), device=self.world.device)
        inputs, targets = zip(*map(self._share, batches), strict=True)

        def score(number: int, hidden_TD: Tensor) -> None:
            total.add_(self._loss_of(hidden_TD, self._last, targets[number])[1])

        self._pipeline.forward(inputs, score)
        return total * self._counts

    def clip(self, limit: float) -> Tensor:
        """As `Compute.clip`, over the layers of all stages."""
        return clip_gradients(self.parameters.values(), limit, self._pipeline.group)

    @property
    def _last(self) -> Transformer:
        return self._pipeline.stages[self._pipeline.total - 1]

    def _build(self, fill: Fill) -> list[nn.Module]:
        parallel, mesh = self.recipe.parallel, self.world.mesh
        assert mesh is not None
        place, ranks = self.world.place_in("pp"), self.world.degrees.pp
        stages = make_stages(self.spec, parallel.pp_schedule, place, ranks, stages_per_rank(parallel))
        return [parallelize(stage, mesh, self.options, fill=fill) for stage in stages]


def build_compute(recipe: Recipe, spec: Spec, world: World, fill: Fill) -> Compute:
    """The one that the degrees ask for."""
    return (PipelinedCompute if world.degrees.pp > 1 else Compute)(recipe, spec, world, fill)


def options_of(recipe: Recipe) -> Options:
    """The passes that a recipe asks for."""
    parallel, train = recipe.parallel, recipe.train
    quant, dtype = training_config(recipe.quant), parse_dtype(train.dtype)
    if quant is not None and parallel.tp == parallel.pp == 1:
        dtype = torch.float32  # gathered whole: codes are chosen from the weights that are saved, not from their halves
    return Options(
        zero=parallel.zero,
        sequence_parallel=parallel.sequence_parallel,
        overlap=parallel.async_tp,
        activation_checkpointing=train.activation_checkpointing,
        compiler=torch.compile if train.compile else None,
        dtype=dtype,
        cpu_offload=parallel.cpu_offload,
        rewrite=None if quant is None else partial(fake_quantize_linears, config=quant),
    )
