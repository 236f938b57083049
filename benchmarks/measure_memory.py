"""`puna plan`'s memory against real training steps on CPU ranks: the resident memory of each process at its peak.

    python benchmarks/measure_memory.py [--case NAME ...] [--small] [--out benchmarks/results/memory.json]

Ranks are processes that meet over gloo; each trains a model of 134M parameters (8M with --small) in fp32 as the trainer
does. After a step of a tiny model, which loads all code, a rank's resident memory is the zero; then it builds its part
of the model, makes two steps, so that optimizer states and DDP's buckets are there, and its peak over the next step is
what is told (VmHWM, reset through /proc/self/clear_refs). The fullest rank counts. Memory that is freed goes back at
once: glibc is told to map anything above 64 KiB by itself.

The plan is for GPUs. For a CPU two of its figures are others: a chunk of logits is 64 MiB there, and torch has no fused
norm on CPUs, so each keeps its normalised input, D fp32 numbers per token, as well. What gloo and malloc take beside is
what is left of the difference.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["PUNA_NATIVE"] = "0"  # the plan counts what torch's operations keep

import torch
import torch.distributed as dist

from puna.base.console import table
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.parallel import memory as plan
from puna.parallel.apply import Options, parallelize
from puna.parallel.degrees import Degrees
from puna.parallel.gradients import clip_gradients
from puna.parallel.job import Job
from puna.parallel.loss import cross_entropy
from puna.parallel.mesh import build_mesh, submesh
from puna.parallel.pipeline import Pipeline
from puna.parallel.replicas import micro_batch, unwrap
from puna.parallel.stages import make_stages

LARGE = Spec(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
             intermediate_size=2304, vocab_size=32000)  # fmt: skip
SMALL = Spec(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
             intermediate_size=1152, vocab_size=8000)  # fmt: skip
TINY = Spec(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=128, vocab_size=128)  # fmt: skip
TOKENS = 512  # of a sequence
SHARD2, TP2, PP2 = Degrees(dp_shard=2), Degrees(tp=2), Degrees(pp=2)
PIPE: dict[str, Any] = {"microbatches": 4}
# Name: degrees, sequences per rank, settings.
CASES: dict[str, tuple[Degrees, int, dict[str, Any]]] = {
    "zero 3": (SHARD2, 2, {}),
    "zero 3 full": (SHARD2, 2, {"checkpointing": "full"}),
    "zero 2": (SHARD2, 1, {"zero": 2}),
    "zero 2 full": (SHARD2, 1, {"zero": 2, "checkpointing": "full"}),
    "tp 2": (TP2, 2, {}),
    "tp 2 full": (TP2, 2, {"checkpointing": "full"}),
    "copies": (Degrees(dp_replicate=2), 1, {}),
    "zero 3 on 4": (Degrees(dp_shard=4), 1, {}),
    "zero 3 on 4 full": (Degrees(dp_shard=4), 1, {"checkpointing": "full"}),
    "dp 2 tp 2": (Degrees(dp_shard=2, tp=2), 1, {}),
    "dp 2 tp 2 full": (Degrees(dp_shard=2, tp=2), 1, {"checkpointing": "full"}),
    "pp 2 1f1b": (PP2, 4, PIPE),
    "pp 2 gpipe": (PP2, 4, {**PIPE, "schedule": "gpipe"}),
    "pp 2 gpipe full": (PP2, 4, {**PIPE, "schedule": "gpipe", "checkpointing": "full"}),
    "dp 2 pp 2 zero 2": (Degrees(dp_shard=2, pp=2), 4, {**PIPE, "zero": 2}),
    "dp 2 pp 2 zero 3": (Degrees(dp_shard=2, pp=2), 4, PIPE),
    "dp 2 pp 2 zero 3 gpipe": (Degrees(dp_shard=2, pp=2), 4, {**PIPE, "schedule": "gpipe"}),
}
LIMIT_S = 300
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR",
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "2",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[*CASES], help="default: all")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank >= 0:
        work(job_of(options.case[0], options.small), options.rank, options.folder)
        return
    found = {name: measure(name, options.small) for name in options.case or CASES}
    print(card(found))
    if options.out:
        about = {"torch": torch.__version__, "parameters": (SMALL if options.small else LARGE).num_params()}
        options.out.write_text(json.dumps({**about, "bytes": found}, indent=1) + "\n")


def job_of(name: str, small: bool) -> Job:
    degrees, sequences, settings = CASES[name]
    return Job(SMALL if small else LARGE, degrees, TOKENS, sequences * degrees.data, dtype="float32", **settings)


def measure(name: str, small: bool) -> dict[str, float]:
    """{"measured": bytes of the fullest rank, "planned", "error": planned / measured - 1}."""
    job = job_of(name, small)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--case", name, *["--small"] * small, "--folder", folder]
        environment = {**os.environ, **ENVIRONMENT}
        ranks = [subprocess.Popen([*words, "--rank", str(r)], env=environment) for r in range(job.degrees.world)]
        try:
            codes = [rank.wait(timeout=LIMIT_S) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise SystemExit(f"{name}: ranks ended with {codes}")
        measured = max(json.loads(file.read_text()) for file in Path(folder).glob("*.json"))
    planned = planned_bytes(job)
    return {"measured": measured, "planned": planned, "error": planned / measured - 1}


def planned_bytes(job: Job) -> float:
    """The plan's fullest moment of any rank, with a CPU's chunks and norms."""
    plan.CHUNK_BYTES = 64 * 2**20
    norms = 2 * 4 * job.spec.hidden_size * job.micro_tokens / (job.degrees.tp if job.sequence_parallel else 1)
    _, flight = job.pipeline()
    found = []
    for rank in range(job.degrees.pp):
        blocks = job.rank_layers[rank] * flight[rank] if job.checkpointing == "none" else 1
        for name, at in plan.moments(job, rank).items():
            found.append(at.allocated + norms * blocks * (name in ("loss", "loss backward", "backward")))
    return max(found)


def work(job: Job, rank: int, folder: Path) -> None:
    """One rank: writes the bytes it held at its peak over what it held before it had a model."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), job.degrees.world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.degrees.world)
    make = PipelinedTraining if job.degrees.pp > 1 else Training
    make(replace(job, spec=TINY)).step()
    gc.collect()
    zero = status("VmRSS")
    training = make(job)
    for _ in range(2 if job.degrees.dp_replicate > 1 else 1):  # in its second step DDP makes its buckets anew
        training.step()
    Path("/proc/self/clear_refs").write_text("5")
    training.step()
    (folder / f"{rank}.json").write_text(json.dumps(status("VmHWM") - zero))
    dist.barrier()
    dist.destroy_process_group()


class Training:
    """A model cut over the ranks, and the trainer's step on it."""

    def __init__(self, job: Job):
        self.job = job
        self.options = Options(job.zero, job.sequence_parallel, activation_checkpointing=job.checkpointing)
        self.mesh = build_mesh(job.degrees, "cpu")
        self.model = self.build()
        self.optimizer = torch.optim.AdamW(self.parameters(), fused=True)
        documents = round(job.micro_tokens / TOKENS)
        self.tokens_T = torch.randint(job.spec.vocab_size, (documents * TOKENS,))
        self.positions_T = torch.arange(TOKENS).repeat(documents)
        self.attend = PackedCausal.of([TOKENS] * documents)

    def build(self) -> Any:
        with torch.device("meta"):
            model = Transformer(self.job.spec)
        return parallelize(model, self.mesh, self.options, seed=0)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def step(self) -> None:
        self.forward_backward()
        clip_gradients(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward_backward(self) -> None:
        with micro_batch(self.model, True, self.job.zero):
            hidden_TD = self.model(self.tokens_T, self.positions_T, self.attend)
            loss, _ = cross_entropy(hidden_TD, unwrap(self.model).head_weight, self.tokens_T)
            del hidden_TD
            (loss / self.job.tokens).backward()


class PipelinedTraining(Training):
    """The same on a rank's stages."""

    def build(self) -> Any:
        pp = submesh(self.mesh, "pp")
        assert pp is not None
        job = self.job
        stages = make_stages(job.spec, job.schedule, pp.get_local_rank(), pp.size(), job.stages_per_rank)
        for stage in stages:
            parallelize(stage, self.mesh, self.options, seed=0)
        return Pipeline(stages, pp, job.schedule, torch.device("cpu"))

    def forward_backward(self) -> None:
        def loss(_: int, hidden_TD: torch.Tensor) -> torch.Tensor:
            head = self.model.stages[self.model.total - 1].head_weight
            return cross_entropy(hidden_TD, head, self.tokens_T)[0] / self.job.tokens

        self.model.step([(self.tokens_T, self.positions_T, self.attend)] * self.job.microbatches, loss)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def card(found: dict[str, dict[str, float]]) -> str:
    rows = [(name, f"{one['measured'] / 2**20:,.0f}", f"{one['planned'] / 2**20:,.0f}", f"{one['error']:+.1%}")
            for name, one in found.items()]  # fmt: skip
    return table(rows, ("MiB per rank", "measured", "planned", "error"))


if __name__ == "__main__":
    main()
