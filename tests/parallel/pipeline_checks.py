"""Checks that run on ranks (see ranks.py): every schedule, alone and with the other degrees, steps like one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.apply_checks import (
    ALL_BIASES,
    CLIP,
    SAMPLES,
    SPEC,
    TOLERANCE,
    Z_LOSS,
    CollectiveCount,
    Sample,
    reference,
    samples,
    together,
    whole,
    whole_model,
)
from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops import basic
from puna.ops.attention import PackedCausal
from puna.parallel import loss as parallel_loss
from puna.parallel import pipeline
from puna.parallel.apply import Options, parallelize
from puna.parallel.degrees import Degrees
from puna.parallel.exchange import context_parallel
from puna.parallel.gradients import clip_gradients
from puna.parallel.materialise import materialise
from puna.parallel.mesh import build_mesh, data_ranks, submesh, sum_over_data
from puna.parallel.pipeline import Microbatch, Pipeline
from puna.parallel.schedules import SCHEDULES, default_stages
from puna.parallel.sharding import shard
from puna.parallel.stages import make_stages

FIVE = SPEC.replace(num_hidden_layers=5, sliding_windows=(None, 9, None, 5, None))  # uneven on 2 and on 4 stages
EIGHT = SPEC.replace(num_hidden_layers=8, sliding_windows=(None, 9) * 4)  # one layer for each of 4 x 2 stages
BIASES = ALL_BIASES.replace(num_hidden_layers=5, sliding_windows=FIVE.sliding_windows)
WHOLE_SEQUENCE = Options(sequence_parallel=False)


@dataclass(frozen=True)
class Run:
    """A pipeline on a mesh, and this rank's share of the samples."""

    pipeline: Pipeline
    mesh: DeviceMesh
    parts: list[Sample]

    def inputs(self, parts: list[Sample]) -> tuple[list[Microbatch], list[Tensor]]:
        """Microbatches and their targets; under cp the tokens of each that this rank holds."""
        seen = [_own_tokens(self.mesh, part) for part in parts]
        return [batch for batch, _ in seen], [targets for _, targets in seen]

    def cross_entropy(self, hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        head = self.pipeline.stages[self.pipeline.total - 1].head_weight
        return parallel_loss.cross_entropy(hidden_TD, head, targets_T, Z_LOSS, 24)

    def valid(self) -> Tensor:
        counted = sum((targets != basic.IGNORE).sum() for targets in self.inputs(self.parts)[1])
        return sum_over_data(torch.tensor(float(counted)), self.mesh)

    def named(self) -> dict[str, Tensor]:
        return {name: p for stage in self.pipeline.stages.values() for name, p in stage.named_parameters()}

    def step(self, valid: Tensor) -> Tensor:
        """Forward and backward of all microbatches; the sum of negative log-likelihoods, where the head is."""
        (batches, targets), total = self.inputs(self.parts), torch.zeros(())

        def loss(number: int, hidden_TD: Tensor) -> Tensor:
            loss, nll = self.cross_entropy(hidden_TD, targets[number])
            total.add_(nll)
            return loss / valid

        self.pipeline.step(batches, loss)
        return sum_over_data(total, self.mesh)

    def validate(self) -> Tensor:
        """The same sum by forward passes, three samples together and the others one by one."""
        batches, targets = self.inputs([together(self.parts[:3]), *self.parts[3:]])
        total, seen = torch.zeros(()), []

        def score(number: int, hidden_TD: Tensor) -> None:
            assert not hidden_TD.requires_grad
            seen.append(number)
            total.add_(self.cross_entropy(hidden_TD, targets[number])[1])

        self.pipeline.forward(batches, score)
        assert seen == (list(range(len(batches))) if self.pipeline.has_last else [])
        return sum_over_data(total, self.mesh)


def start(
    degrees: dict[str, int], schedule: str, options: Options, spec: Spec, each: int = 0, micro: int = 1, seed: int = -1
) -> Run:
    """`seed` -1: the weights of `whole_model`, handed in as a loader would."""
    mesh = build_mesh(Degrees(**degrees), "cpu")
    pp = submesh(mesh, "pp")
    assert pp is not None
    stages = make_stages(spec, schedule, pp.get_local_rank(), pp.size(), each or default_stages(schedule))
    weights = dict(whole_model(spec).named_parameters())

    def fill(module: Transformer, device: torch.device, offload: bool) -> None:
        materialise(module, device, lambda name, tensor: tensor.copy_(weights[name]), offload)  # type: ignore[arg-type]

    for stage in stages:
        parallelize(stage, mesh, options, seed=None if seed < 0 else seed, fill=fill if seed < 0 else None)
    cut = degrees.get("tp", 1) if options.sequence_parallel else 1
    made = Pipeline(stages, pp, schedule, torch.device("cpu"), options.dtype, cut)
    index, count = data_ranks(mesh)
    share = samples(spec.vocab_size)[index * SAMPLES // count : (index + 1) * SAMPLES // count]
    return Run(made, mesh, [together(share[i : i + micro]) for i in range(0, len(share), micro)])


def _own_tokens(mesh: DeviceMesh, part: Sample) -> tuple[Microbatch, Tensor]:
    documents = PackedCausal.of(part.lengths)
    if (cp := submesh(mesh, "cp")) is None:
        return (part.tokens_T, part.positions_T, documents), part.targets_T
    arrays = (part.tokens_T, part.positions_T, part.targets_T)
    tokens, positions, targets = shard(arrays, cp.get_local_rank(), cp.size(), "ring")
    return (tokens, positions, context_parallel(documents, cp.get_group(), "ring", SPEC.num_attention_heads)), targets


def compare(degrees: dict[str, int], schedule: str, options: Options | None = None, **rest: Any) -> dict[str, float]:
    """Two optimizer steps, a validation pass between them, against one process's."""
    spec = rest.setdefault("spec", FIVE)
    run = start(degrees, schedule, options or Options(), **rest)
    line, valid, mine = run.pipeline, run.valid(), run.named()
    optimizer = torch.optim.AdamW(line.parameters(), lr=1e-2, eps=1e-4, fused=True)
    worst = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "weight": 0.0, "validation": 0.0}
    for number, (loss_1, norm_1, gradients_1, weights_1) in enumerate(reference(spec)):
        if number == 1:  # between two steps: it must disturb neither
            total = run.validate()
            assert all(p is mine[name] for name, p in run.named().items()), "weights are still gathered"
            worst["validation"] = abs((total / valid).item() - loss_1) if line.has_last else 0.0
        loss = (run.step(valid) / valid).item()
        assert _over_stages(len(mine), line) == len(gradients_1), "a parameter is missing, or there twice"
        for name, parameter in mine.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            difference = (whole(parameter.grad) - gradients_1[name]).abs().max().item()
            worst["gradient"] = max(worst["gradient"], difference / max(gradients_1[name].abs().max().item(), 1e-3))
        norm = clip_gradients(line.parameters(), CLIP, pipeline=line.group).item()
        optimizer.step()
        optimizer.zero_grad()
        differences = [(whole(p.detach()) - weights_1[name]).abs().max().item() for name, p in mine.items()]
        worst["weight"] = max(worst["weight"], *differences)
        worst["norm"] = max(worst["norm"], abs(norm - norm_1) / norm_1)
        worst["loss"] = max(worst["loss"], abs(loss - loss_1) if line.has_last else 0.0)
    for what, value in worst.items():
        assert value <= TOLERANCE, f"{what} differs by {value:.2e}: {worst}"
    return worst


def _over_stages(number: int, line: Pipeline) -> int:
    count = torch.tensor(number)
    dist.all_reduce(count, group=line.group)
    return int(count)


def named(name: str, function: Any, *inputs: Any, **rest: Any) -> Any:
    check = partial(function, *inputs, **rest)
    check.__name__ = name  # type: ignore[attr-defined]
    return check


def case(name: str, *inputs: Any, **rest: Any) -> Any:
    return named(name, compare, *inputs, **rest)


def meta_weights_are_one_process_weights() -> None:
    """Every stage, wherever it is and however it is cut, draws its part of the numbers of `Transformer.init_weights`."""
    expected = Transformer(FIVE)
    expected.init_weights(torch.Generator().manual_seed(7))
    right = dict(expected.named_parameters())
    for degrees, schedule in (
        ({"pp": 4}, "gpipe"),
        ({"pp": 2, "dp_shard": 2}, "zbv"),
        ({"pp": 2, "tp": 2}, "interleaved"),
    ):
        run = start(degrees, schedule, Options(zero=2), FIVE, seed=7)
        mine = run.named()
        assert _over_stages(len(mine), run.pipeline) == len(right)
        for name, parameter in mine.items():
            assert torch.equal(whole(parameter.detach()), right[name]), f"{degrees}: {name}"


def bfloat16_is_near(degrees: dict[str, int], schedule: str, zero: int) -> float:
    """FSDP2 gathering bf16, hidden states sent in it: loss and gradients of fp32 within its digits, gradients fp32."""
    run = start(degrees, schedule, Options(dtype=torch.bfloat16, zero=zero), FIVE)
    valid = run.valid()
    loss = (run.step(valid) / valid).item()
    loss_1, _, gradients_1, _ = reference(FIVE)[0]
    assert not run.pipeline.has_last or 1e-6 < abs(loss - loss_1) < 2e-2, (loss, loss_1)
    worst = 0.0
    for name, parameter in run.named().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        right = gradients_1[name]
        worst = max(worst, ((whole(parameter.grad) - right).norm() / right.norm()).item())
    assert worst < 0.05, worst
    return worst


def shapes_may_change() -> None:
    """A step of 8 x 32 tokens, one of 4 x 64 and one of 8 x 32: gradients add up to three times one step's."""
    for schedule in ("1f1b", "zbv"):
        run = start({"pp": 2}, schedule, Options(), FIVE)
        valid = run.valid()
        pairs = [together(run.parts[i : i + 2]) for i in range(0, len(run.parts), 2)]
        for parts in (run.parts, pairs, run.parts):
            replace(run, parts=parts).step(valid)
        for name, parameter in run.named().items():
            right = 3 * reference(FIVE)[0][2][name]
            assert (parameter.grad - right).abs().max() <= TOLERANCE * max(right.abs().max(), 1e-3), name


def whole_backward_is_exact() -> dict[str, float]:
    """What an older torch does with a split schedule."""
    with patch.object(pipeline, "_autograd_splits", lambda: False):
        return compare({"pp": 2}, "zbv")


def refusals_come_with_numbers() -> None:
    """Raised on every rank before anything is sent: the next step works."""
    run = start({"pp": 2}, "1f1b", Options(), FIVE)
    batches, _ = run.inputs([*run.parts[:-1], together(run.parts[:2])])
    for found, message in ((batches, "have 32, 64 tokens"), ([], "have no tokens"), (batches[:1], "at least pp = 2")):
        with pytest.raises(PunaError, match=message):
            run.pipeline.step(found, lambda number, hidden_TD: hidden_TD.sum())
    run.step(run.valid())


def tokens_that_tp_cannot_cut_are_refused() -> None:
    """On every rank, where only the first stage would notice and the others would wait for it."""
    run = start({"pp": 2, "tp": 2}, "1f1b", Options(), FIVE)
    tokens_T, positions_T, _ = run.inputs(run.parts[:1])[0][0]
    odd = [(tokens_T[:31], positions_T[:31], PackedCausal.of((31,)))] * 2
    for use in (run.pipeline.step, run.pipeline.forward):
        with pytest.raises(PunaError, match="31 tokens in a micro-batch are not divisible by tp 2"):
            use(odd, lambda number, hidden_TD: hidden_TD.sum())


def gradients_travel_once() -> None:
    """FSDP2 units of a stage: its blocks, and the rest where that has weights. One collective each per step."""
    for schedule in ("1f1b", "zbv"):
        run = start({"pp": 2, "dp_shard": 2}, schedule, Options(zero=2), FIVE)
        valid = run.valid()
        with CollectiveCount() as seen:
            run.step(valid)
        stages = run.pipeline.stages.values()
        units = sum(len(stage.layers) + (stage.first or stage.last) for stage in stages)
        found = [seen.calls[f"c10d::{name}"] for name in ("_allgather_base_", "_reduce_scatter_base_")]
        assert found == [units, units], (schedule, units, seen.calls)


FULL = Options(activation_checkpointing="full")
BOTH = {"pp": 2, "dp_shard": 2}
WORLDS = {
    4: [
        case("pp4_gpipe", {"pp": 4}, "gpipe"),
        case("pp4_1f1b", {"pp": 4}, "1f1b"),
        *(case(f"pp4_{name}", {"pp": 4}, name, spec=EIGHT) for name in ("interleaved", "zbv", "dualpipev")),
        *(case(f"fsdp_zero3_{name}", BOTH, name, Options()) for name in ("gpipe", "1f1b", "interleaved")),
        case("fsdp_zero2_1f1b", BOTH, "1f1b", Options(zero=2)),
        *(case(f"fsdp_zero2_{name}", BOTH, name, Options(zero=2)) for name in ("zbv", "dualpipev")),
        case("fsdp_zero1_zbv", BOTH, "zbv", Options(zero=1)),
        case("fsdp_four_stages_each", BOTH, "interleaved", Options(), spec=EIGHT, each=4),
        case("replicate_1f1b", {"pp": 2, "dp_replicate": 2}, "1f1b"),
        case("replicate_zbv_zero3", {"pp": 2, "dp_replicate": 2}, "zbv"),
        case("tp_1f1b", {"pp": 2, "tp": 2}, "1f1b", micro=2),
        case("tp_zbv_biases", {"pp": 2, "tp": 2}, "zbv", spec=BIASES, micro=2),
        case("tp_whole_sequence", {"pp": 2, "tp": 2}, "interleaved", WHOLE_SEQUENCE, spec=BIASES, micro=4),
        case("cp_1f1b", {"pp": 2, "cp": 2}, "1f1b"),
        case("full_fsdp_1f1b", BOTH, "1f1b", FULL),
        case("full_tp_interleaved", {"pp": 2, "tp": 2}, "interleaved", FULL, micro=4),
        case("selective_fsdp_1f1b", BOTH, "1f1b", Options(activation_checkpointing="selective")),
        case("offload_1f1b", BOTH, "1f1b", Options(cpu_offload=True)),
        meta_weights_are_one_process_weights,
        named("bfloat16_fsdp", bfloat16_is_near, BOTH, "zbv", 2),
        tokens_that_tp_cannot_cut_are_refused,
        gradients_travel_once,
    ],
    2: [
        *(case(f"pp2_{name}", {"pp": 2}, name) for name in SCHEDULES),
        named("bfloat16_zero3", bfloat16_is_near, {"pp": 2}, "zbv", 3),
        shapes_may_change,
        whole_backward_is_exact,
        refusals_come_with_numbers,
    ],
    8: [
        case("hsdp", {"pp": 2, "dp_replicate": 2, "dp_shard": 2}, "interleaved"),
        case("fsdp_tp_1f1b", {"pp": 2, "dp_shard": 2, "tp": 2}, "1f1b"),
        case("fsdp_tp_zbv", {"pp": 2, "dp_shard": 2, "tp": 2}, "zbv", Options(zero=2)),
    ],
}
