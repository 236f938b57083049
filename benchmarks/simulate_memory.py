"""`puna plan`'s memory against a simulation: puna's own training step on fake tensors, as one rank of many runs it.

    PUNA_NATIVE=0 python benchmarks/simulate_memory.py [--case NAME ...] [--layers 4 6] [--out RESULT.json]

The mesh is real (a process group that sends nothing), the model is cut by `parallelize`, and torch's FSDPMemTracker
adds up what every storage would hold: no memory is used, 405B takes seconds. A run of 4 and one of 6 layers (--layers;
3 and 4 give the same) tell what a layer adds, and that times the rest is added to every moment of the step. With 2, no
block is gathered ahead while another works, and none waits to be reduced: the peak is lower. The step is the trainer's:
forward, chunked cross-entropy, backward, clipping, fused AdamW. One comes first, so that optimizer states are there.

Two things are made as on a GPU: the norm keeps its input and a scale per token (a CPU build of torch has no fused
norm), and a chunk of logits is a GPU's. The plan's figure is without what a GPU's allocator and context add
(`fragmentation`, `idle`, `outside`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["PUNA_NATIVE"] = "0"  # before puna: native kernels take no fake tensors

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from puna.base.console import table
from puna.model.spec import Spec
from puna.model.transformer import Block, Transformer
from puna.ops.attention import PackedCausal
from puna.ops.basic import chunk_tokens
from puna.parallel.apply import Options, parallelize
from puna.parallel.degrees import Degrees
from puna.parallel.gradients import clip_gradients
from puna.parallel.job import Job
from puna.parallel.loss import cross_entropy
from puna.parallel.memory import moments
from puna.parallel.mesh import build_mesh
from puna.parallel.replicas import micro_batch

MOMENTS = ("loss", "loss backward", "backward", "reduction", "step")


def job(
    model: str, degrees: Degrees, per_rank: int = 1, microbatches: int = 1, seq_len: int = 8192, **rest: Any
) -> Job:
    """`per_rank`: sequences of one microbatch on one rank."""
    batch = per_rank * microbatches * degrees.data
    return Job(Spec.preset(f"llama3_{model}"), degrees, seq_len, batch, microbatches, **rest)


D64, D128, HSDP = Degrees(dp_shard=64), Degrees(dp_shard=128), Degrees(dp_replicate=8, dp_shard=8)
D8TP8 = Degrees(dp_shard=8, tp=8)
CASES = {
    "8b": job("8b", D64),
    "8b selective": job("8b", D64, checkpointing="selective"),
    "8b full": job("8b", D64, checkpointing="full"),
    "8b full x4": job("8b", D64, 4, checkpointing="full"),
    "8b fp32 full": job("8b", D64, checkpointing="full", dtype="float32"),
    "8b zero 2": job("8b", D64, zero=2, checkpointing="full"),
    "8b zero 1": job("8b", D64, zero=1, checkpointing="full"),
    "8b zero 3 twice": job("8b", D64, microbatches=2, checkpointing="full"),
    "8b zero 2 twice": job("8b", D64, microbatches=2, zero=2, checkpointing="full"),
    "8b zero 1 twice": job("8b", D64, microbatches=2, zero=1, checkpointing="full"),
    "8b hsdp": job("8b", HSDP, checkpointing="selective"),
    "8b tp 8": job("8b", Degrees(tp=8), checkpointing="selective"),
    "8b tp 8 fp32": job("8b", Degrees(tp=8), dtype="float32"),
    "8b one": job("8b", Degrees(), dtype="float32", checkpointing="full"),
    "8b one bf16": job("8b", Degrees()),
    "8b one bf16 full": job("8b", Degrees(), checkpointing="full"),
    "8b dp 8 tp 8": job("8b", D8TP8, 2),
    "8b dp 8 tp 8 whole tokens": job("8b", D8TP8, 2, sequence_parallel=False),
    "70b": job("70b", D128, checkpointing="full"),
    "70b dp 8 tp 8": job("70b", D8TP8, 2, checkpointing="selective"),
    "70b dp 8 tp 8 full": job("70b", D8TP8, 4, checkpointing="full"),
    "405b dp 64 tp 8 full": job("405b", Degrees(dp_shard=64, tp=8), checkpointing="full"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[*CASES], help="default: all")
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 6), help="of the two runs; 3 or more")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {name: compare(CASES[name], *options.layers) for name in options.case or CASES}
    print(card(found))
    if options.out:
        about = {"torch": torch.__version__, "layers": options.layers}
        options.out.write_text(json.dumps({**about, "cases": found}, indent=1) + "\n")


def compare(job: Job, few: int, more: int) -> dict[str, Any]:
    """{"simulated", "planned": bytes by moment, "error": planned / simulated - 1 of the largest}."""
    runs = {layers: simulate(shallow(job, layers)) for layers in (few, more)}
    simulated = whole_depth(runs, job.spec.num_hidden_layers)
    plan = moments(job)
    planned = {name: at.allocated for name, at in plan.items()}
    planned |= {"weights": plan["step"].weights, "optimizer": plan["step"].optimizer}
    largest = [max(one[name] for name in MOMENTS if name in one) for one in (planned, simulated)]
    return {"simulated": simulated, "planned": planned, "error": largest[0] / largest[1] - 1}


def shallow(job: Job, layers: int) -> Job:
    return replace(job, spec=job.spec.replace(num_hidden_layers=layers, sliding_windows=()))


def whole_depth(runs: dict[int, dict[str, float]], layers: int) -> dict[str, float]:
    """Linear in the layers, from runs with two numbers of them."""
    few, more = runs
    return {name: held + (held - runs[few][name]) * (layers - more) / (more - few) for name, held in runs[more].items()}


def simulate(job: Job) -> dict[str, float]:
    """Most bytes that rank 0 holds at each of the moments of `puna.parallel.memory`, and its weights and optimizer."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=job.degrees.world)
    try:
        with gpu_norm():
            return _simulate(job)
    finally:
        dist.destroy_process_group()


def _simulate(job: Job) -> dict[str, float]:
    mesh = build_mesh(job.degrees, "cpu")
    with torch.device("meta"):
        model = Transformer(job.spec)
    dtype = getattr(torch, job.dtype)
    parallel = parallelize(
        model, mesh, Options(job.zero, job.sequence_parallel, activation_checkpointing=job.checkpointing, dtype=dtype)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        parallel.to_empty(device="cpu")
        step = Step(job, parallel)
        step()
        weights = sum(local_bytes(p) for p in parallel.parameters())
        watch = (WatchSharded if isinstance(parallel, FSDPModule) else WatchPlain)(parallel, step.optimizer)
        with watch:
            step(watch)
        return {"weights": weights, "optimizer": watch.held() - weights, **watch.most}


class Watch:
    """Mixed into a tracker: the most that was held during each moment."""

    moment = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.most[self.moment] = max(self.most.get(self.moment, 0), self.held())
        return result

    def held(self) -> int:
        """Bytes there now."""
        return sum(by_use["Total"] for by_use in self.get_tracker_snapshot().values())


class WatchSharded(Watch, FSDPMemTracker):
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        super().__init__(model, optimizer)
        self.most: dict[str, int] = {}


class WatchPlain(Watch, MemTracker):
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        super().__init__()
        self.most: dict[str, int] = {}
        self.track_external(model, optimizer)


class Step:
    """The trainer's step on one rank; it tells a watch which moment it is."""

    def __init__(self, job: Job, model: nn.Module):
        self.job, self.model = job, model
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        documents = round(job.micro_tokens / job.seq_len)
        self.tokens_T = torch.zeros(documents * job.seq_len, dtype=torch.int64)
        self.positions_T = torch.arange(job.seq_len).repeat(documents)
        self.attend = PackedCausal.of([job.seq_len] * documents)
        self.chunk = chunk_tokens(math.ceil(job.spec.vocab_size / job.degrees.tp), "cuda")
        self.autocast = job.dtype == "bfloat16" and not isinstance(model, FSDPModule)
        self.watch: Any = None
        first = next(module for module in model.modules() if isinstance(module, Block))
        first.register_forward_pre_hook(lambda _, x: x[0].register_hook(lambda _: self.now("reduction")) and None)

    def __call__(self, watch: Any = None) -> None:
        self.watch = watch
        for number in range(self.job.microbatches):
            if number and isinstance(watch, FSDPMemTracker):
                watch.reset_mod_stats()
            with micro_batch(self.model, number == self.job.microbatches - 1, self.job.zero):
                self.forward_backward()
        self.now("step")
        clip_gradients(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward_backward(self) -> None:
        self.now("forward")
        with torch.autocast("cpu", enabled=self.autocast):  # bfloat16
            hidden_TD = self.model(self.tokens_T, self.positions_T, self.attend)
            hidden_TD.register_hook(lambda _: self.now("backward"))
            self.now("loss")
            loss, _ = cross_entropy(hidden_TD, self.model.head_weight, self.tokens_T, 0.0, self.chunk)
            del hidden_TD
        self.now("loss backward")
        (loss / self.job.tokens).backward()

    def now(self, moment: str) -> None:
        if self.watch is not None:
            self.watch.moment = moment


def local_bytes(parameter: Tensor) -> int:
    part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return part.numel() * part.element_size()


class _Norm(torch.autograd.Function):
    """Shapes of the fused norm: it keeps x and a number per token for the backward pass. What it computes is not
    looked at, so it computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def gpu_norm() -> Iterator[None]:
    before = F.rms_norm
    F.rms_norm = lambda x, shape, weight, eps: _Norm.apply(x, weight)
    try:
        yield
    finally:
        F.rms_norm = before


def card(found: dict[str, dict[str, Any]]) -> str:
    names = ("weights", "optimizer", *MOMENTS)
    rows = []
    for case, one in found.items():
        pairs = [f"{one['simulated'][n] / 2**30:,.2f} {one['planned'][n] / 2**30:,.2f}" for n in names]
        rows.append((case, *pairs, f"{one['error']:+.1%}"))
    return table(rows, ("GiB: simulated, planned", *names, "error"))


if __name__ == "__main__":
    main()
