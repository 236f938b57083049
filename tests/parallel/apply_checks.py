"""Checks that run on ranks (see ranks.py): every degree gives the loss, gradients and steps of one process."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops import basic
from puna.ops.attention import PackedCausal
from puna.parallel import loss as parallel_loss
from puna.parallel.apply import Options, parallelize
from puna.parallel.degrees import Degrees
from puna.parallel.gradients import clip_gradients
from puna.parallel.materialise import materialise
from puna.parallel.mesh import build_mesh, data_ranks, submesh, sum_over_data
from puna.parallel.replicas import micro_batch, unwrap

SPEC = Spec(
    vocab_size=130,  # divides by no tp > 2
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    intermediate_size=96,
    initializer_range=0.1,
)
ALL_BIASES = SPEC.replace(
    model_type="qwen3", qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, num_key_value_heads=2
)
TOKENS, SAMPLES, Z_LOSS, CLIP = 32, 8, 1e-3, 0.5
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Sample:
    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    lengths: tuple[int, ...]


def samples(vocab: int) -> list[Sample]:
    """Eight packed sequences, each of documents of other lengths and with another share of scored tokens."""
    generator = torch.Generator().manual_seed(1)
    packings = [(32,), (7, 25), (1, 1, 30), (16, 16), (5, 6, 7, 14), (31, 1), (10, 22), (4,) * 8]
    made = []
    for number, lengths in enumerate(packings):
        tokens = torch.randint(vocab, (TOKENS,), generator=generator)
        targets = torch.randint(vocab, (TOKENS,), generator=generator)
        targets[torch.rand(TOKENS, generator=generator) < number / 10] = basic.IGNORE
        positions = torch.cat([torch.arange(n) for n in lengths])
        made.append(Sample(tokens, positions, targets, lengths))
    return made


def together(parts: list[Sample]) -> Sample:
    columns = [torch.cat([getattr(p, name) for p in parts]) for name in ("tokens_T", "positions_T", "targets_T")]
    return Sample(*columns, tuple(n for p in parts for n in p.lengths))


def whole_model(spec: Spec) -> Transformer:
    """One process's model: norms and biases other than 1 and 0, so that a wrong one shows."""
    model = Transformer(spec)
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def forward(model: torch.nn.Module, sample: Sample, cross_entropy: Any) -> tuple[Tensor, Tensor]:
    hidden = model(sample.tokens_T, sample.positions_T, PackedCausal.of(sample.lengths))
    return cross_entropy(hidden, unwrap(model).head_weight, sample.targets_T, Z_LOSS, 24)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, fused=True)


_references: dict[Spec, list[Any]] = {}


def reference(spec: Spec) -> list[Any]:
    """[(mean loss, gradient norm, gradients, weights after the step)] of two steps of one process, once per spec."""
    if spec not in _references:
        model, found = whole_model(spec), []
        optimizer, batch = optimizer_of(model), together(samples(spec.vocab_size))
        valid = (batch.targets_T != basic.IGNORE).sum()
        for _ in range(2):
            loss, nll = forward(model, batch, basic.cross_entropy)
            (loss / valid).backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            found.append((nll.item() / valid.item(), norm.item(), gradients, weights))
        _references[spec] = found
    return _references[spec]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(degrees: dict[str, int], options: Options, spec: Spec = SPEC, micro: int = 1) -> dict[str, float]:
    """Two optimizer steps on the mesh, each over this rank's share of the samples in micro-batches of `micro`."""
    mesh = build_mesh(Degrees(**degrees), "cpu")
    model = parallelize(copy.deepcopy(whole_model(spec)), mesh, options)
    optimizer = optimizer_of(model)
    index, count = data_ranks(mesh)
    if (cp := submesh(mesh, "cp")) is not None:  # whole samples instead of parts: nothing to exchange, the rest alike
        index, count = index * cp.size() + cp.get_local_rank(), count * cp.size()
    mine = samples(spec.vocab_size)[index * SAMPLES // count : (index + 1) * SAMPLES // count]
    batches = [together(mine[i : i + micro]) for i in range(0, len(mine), micro)]
    counted = torch.tensor(float(sum((b.targets_T != basic.IGNORE).sum() for b in batches)))
    valid = sum_over_data(counted, mesh)
    worst = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "weight": 0.0}
    for loss_1, norm_1, gradients_1, weights_1 in reference(spec):
        total = torch.zeros(())
        for number, batch in enumerate(batches):
            with micro_batch(model, number == len(batches) - 1, options.zero):
                loss, nll = forward(model, batch, parallel_loss.cross_entropy)
                (loss / valid).backward()
            total += nll
        sum_over_data(total, mesh)
        named = dict(unwrap(model).named_parameters())
        assert named.keys() == gradients_1.keys(), "parameters changed their names"
        for name, parameter in named.items():
            difference = (whole(parameter.grad) - gradients_1[name]).abs().max().item()
            worst["gradient"] = max(worst["gradient"], difference / max(gradients_1[name].abs().max().item(), 1e-3))
        norm = clip_gradients(model.parameters(), CLIP).item()
        optimizer.step()
        optimizer.zero_grad()
        differences = [(whole(p.detach()) - weights_1[name]).abs().max().item() for name, p in named.items()]
        worst["weight"] = max(worst["weight"], *differences)
        worst["loss"] = max(worst["loss"], abs((total / valid).item() - loss_1))
        worst["norm"] = max(worst["norm"], abs(norm - norm_1) / norm_1)
    for what, value in worst.items():
        assert value <= TOLERANCE, f"{what} differs by {value:.2e}: {worst}"
    return worst


def case(name: str, degrees: dict[str, int], options: Options | None = None, **rest: Any) -> Any:
    check = partial(compare, degrees, options or Options(), **rest)
    check.__name__ = name  # type: ignore[attr-defined]
    return check


def aot_eager(function: Any) -> Any:
    """The tracing of torch.compile without its slow code generation."""
    return torch.compile(function, backend="aot_eager")


def meta_weights_are_one_process_weights() -> None:
    """Built on meta, cut, then filled: fsdp x tp, with a vocabulary that both cut unevenly."""
    previous: list[Any] = [lambda: None]

    def one_at_a_time(name: str, tensor: Tensor) -> None:
        assert previous[0]() is None, f"the tensor before {name} is still there"
        previous[0] = weakref.ref(tensor)

    mesh = build_mesh(Degrees(dp_shard=4), "cpu")
    with torch.device("meta"):
        model = Transformer(ALL_BIASES)
    materialise(parallelize(model, mesh), torch.device("cpu"), one_at_a_time)
    for degrees, options in (
        ({"dp_shard": 2, "tp": 2}, Options()),
        ({"dp_replicate": 2, "dp_shard": 2}, Options(cpu_offload=True)),
        ({"tp": 4}, Options()),
        ({"dp_replicate": 4}, Options()),
    ):
        mesh = build_mesh(Degrees(**degrees), "cpu")
        expected = Transformer(ALL_BIASES)
        expected.init_weights(torch.Generator().manual_seed(7))
        with torch.device("meta"):
            model = Transformer(ALL_BIASES)
        made = unwrap(parallelize(model, mesh, options, seed=7))
        for (name, parameter), right in zip(made.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(whole(parameter.detach()), right), f"{degrees}: {name}"


def bfloat16_is_near() -> float:
    """FSDP2 x tp gathering bf16: the loss of fp32 within bf16's three digits; weights and gradients stay fp32."""
    mesh = build_mesh(Degrees(dp_shard=2, tp=2), "cpu")
    model = parallelize(whole_model(SPEC), mesh, Options(dtype=torch.bfloat16))
    batch = together(samples(SPEC.vocab_size))
    loss, nll = forward(model, batch, parallel_loss.cross_entropy)
    loss.backward()
    valid = (batch.targets_T != basic.IGNORE).sum()
    difference = abs((nll / valid).item() - reference(SPEC)[0][0])
    assert 1e-6 < difference < 2e-2, difference
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    return difference


def logits_are_one_process_logits() -> None:
    """`Transformer.logits` under tensor parallelism, for generation: every rank has all words."""
    mesh = build_mesh(Degrees(tp=4), "cpu")
    model, single, batch = parallelize(whole_model(SPEC), mesh), whole_model(SPEC), samples(SPEC.vocab_size)[1]
    with torch.no_grad():
        inputs = (batch.tokens_T, batch.positions_T, PackedCausal.of(batch.lengths))
        torch.testing.assert_close(
            model.logits(model(*inputs)), single.logits(single(*inputs)), rtol=1e-5, atol=TOLERANCE
        )


def refusals_come_with_numbers() -> None:
    """Wrong worlds and tokens that do not divide raise on every rank instead of hanging or aborting."""
    _refused(lambda: build_mesh(Degrees(dp_shard=3), "cpu"), "dp_shard 3 = 3 ranks, but 4 were started")
    mesh = build_mesh(Degrees(tp=4), "cpu")
    six = SPEC.replace(num_attention_heads=6, num_key_value_heads=2)
    _refused(lambda: parallelize(whole_model(six), mesh), "num_attention_heads 6 is not divisible by tp 4")
    model = parallelize(whole_model(SPEC), mesh)
    sample = samples(SPEC.vocab_size)[0]
    cut = replace(sample, tokens_T=sample.tokens_T[:30], positions_T=sample.positions_T[:30], lengths=(30,))
    _refused(lambda: forward(model, cut, parallel_loss.cross_entropy), "30 tokens")
    mesh = build_mesh(Degrees(dp_shard=4), "cpu")
    _refused(lambda: parallelize(whole_model(SPEC), mesh, Options(zero=4)), "zero 4")
    _refused(lambda: parallelize(whole_model(SPEC), mesh, Options(activation_checkpointing="some")), "'some'")


def _refused(action: Any, message: str) -> None:
    with pytest.raises(PunaError) as caught:
        action()
    assert message in caught.value.message, caught.value.message


def one_clip_for_all() -> None:
    """The norm of parameters on several meshes and of a plain one is that of all numbers, each counted once."""
    mesh = build_mesh(Degrees(dp_shard=2, tp=2), "cpu")
    generator = torch.Generator().manual_seed(3)
    whole_gradients = [torch.randn(6, 5, generator=generator) for _ in range(4)]
    layouts = [None, (mesh["tp"], [Shard(1)]), (mesh["tp"], [Replicate()]), (mesh, [Shard(0), Replicate()])]
    parameters = []
    for gradient, layout in zip(whole_gradients, layouts, strict=True):
        value = gradient if layout is None else distribute_tensor(gradient, *layout)
        parameter = torch.nn.Parameter(torch.zeros_like(value))
        parameter.grad = value.clone()
        parameters.append(parameter)
    expected = torch.cat([g.flatten() for g in whole_gradients]).norm()
    norm = clip_gradients(parameters, 2.0)
    torch.testing.assert_close(norm, expected)
    for parameter, gradient in zip(parameters, whole_gradients, strict=True):
        torch.testing.assert_close(whole(parameter.grad), gradient * 2.0 / expected, rtol=1e-5, atol=1e-6)
    everywhere = [torch.zeros(()) for _ in range(4)]
    dist.all_gather(everywhere, norm)
    assert all(torch.equal(one, norm) for one in everywhere)


def traffic_is_as_documented() -> None:
    """All-gathers, reduce-scatters and all-reduces of a step of two micro-batches; two blocks and the rest: 3 units."""
    expected = {1: (3, 3, 3), 2: (6, 6, 3), 3: (10, 6, 3)}  # zero 3: + 2 blocks x 2 micro-batches, backward
    mesh = build_mesh(Degrees(dp_replicate=2, dp_shard=2), "cpu")
    batch = together(samples(SPEC.vocab_size))
    for zero, counts in expected.items():
        model = parallelize(whole_model(SPEC), mesh, Options(zero=zero))
        with CollectiveCount() as seen:
            for last in (False, True):
                with micro_batch(model, last, zero):
                    forward(model, batch, parallel_loss.cross_entropy)[0].backward()
        names = ("_allgather_base_", "_reduce_scatter_base_", "allreduce_")
        found = tuple(seen.calls[f"c10d::{name}"] for name in names)
        assert found == counts, f"zero {zero}: {seen.calls}"


class CollectiveCount(TorchDispatchMode):
    """Counts calls of c10d operations by name. (torch's CommDebugMode stumbles over FSDP2's hooks.)"""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


TIED = SPEC.replace(tie_word_embeddings=True, num_key_value_heads=1)
WORLDS = {
    4: [
        case("zero3", {"dp_shard": 4}),
        case("zero2", {"dp_shard": 4}, Options(zero=2)),
        case("zero1", {"dp_shard": 4}, Options(zero=1)),
        case("ddp", {"dp_replicate": 4}),
        case("hsdp", {"dp_replicate": 2, "dp_shard": 2}),
        case("hsdp_zero1", {"dp_replicate": 2, "dp_shard": 2}, Options(zero=1)),
        case("offload", {"dp_shard": 4}, Options(cpu_offload=True)),
        case("tp", {"tp": 4}, micro=4),
        case("tp_tied_few_kv", {"tp": 4}, spec=TIED, micro=4),
        case("tp_all_biases", {"tp": 4}, spec=ALL_BIASES, micro=2),
        case("tp_whole_sequence", {"tp": 4}, Options(sequence_parallel=False), spec=ALL_BIASES, micro=4),
        case("fsdp_tp", {"dp_shard": 2, "tp": 2}, spec=ALL_BIASES),
        case("fsdp_tp_zero1", {"dp_shard": 2, "tp": 2}, Options(zero=1), spec=TIED, micro=2),
        case("replicate_tp", {"dp_replicate": 2, "tp": 2}, micro=2),
        case("cp_shares_shards", {"dp_shard": 2, "cp": 2}),
        case("cp_tp", {"cp": 2, "tp": 2}),
        case("cp_replicate", {"dp_replicate": 2, "cp": 2}),
        case("compiled_fsdp_tp", {"dp_shard": 2, "tp": 2}, Options(compiler=aot_eager), micro=4),
        case("full_fsdp_tp", {"dp_shard": 2, "tp": 2}, Options(activation_checkpointing="full")),
        case("selective_fsdp_tp", {"dp_shard": 2, "tp": 2}, Options(activation_checkpointing="selective")),
        case("full_hsdp", {"dp_replicate": 2, "dp_shard": 2}, Options(activation_checkpointing="full")),
        case("selective_ddp", {"dp_replicate": 4}, Options(activation_checkpointing="selective")),
        meta_weights_are_one_process_weights,
        bfloat16_is_near,
        logits_are_one_process_logits,
        refusals_come_with_numbers,
        one_clip_for_all,
        traffic_is_as_documented,
    ],
    2: [
        case("zero3", {"dp_shard": 2}, spec=TIED),
        case("zero2", {"dp_shard": 2}, Options(zero=2)),
        case("zero1", {"dp_shard": 2}, Options(zero=1)),
        case("ddp", {"dp_replicate": 2}),
        case("tp", {"tp": 2}, micro=2),
        case("full_tp", {"tp": 2}, Options(activation_checkpointing="full"), micro=4),
    ],
}
