"""What to change when a job does not fit, and the best mesh for a number of GPUs: many jobs, planned one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from puna.base.console import PunaError
from puna.parallel.degrees import Degrees
from puna.parallel.job import CHECKPOINTING, Job
from puna.parallel.machines import Machine
from puna.parallel.memory import Memory, peak
from puna.parallel.schedules import SPLIT_BACKWARD
from puna.parallel.throughput import Throughput, throughput

SPARE = 0.92  # of a GPU's memory that a proposal may fill: the closed forms err by as much (test_memory.py)

# From degrees, sequences per forward pass (0: the recipe's way) and a checkpointing mode to a job; raises PunaError.
Make = Callable[[Degrees, int, str], Job]


@dataclass(frozen=True)
class Candidate:
    """A job that fits, with its price."""

    job: Job
    memory: Memory
    speed: Throughput

    @property
    def flags(self) -> str:
        """The settings that make it, as the command line takes them."""
        degrees, micro = self.job.degrees, self.job.batch_size // self.job.degrees.data // self.job.microbatches
        words = [f"--parallel.{name} {value}" for name, value in vars(degrees).items() if value > 1]
        words += [f"--train.micro_batch_size {micro}", f"--train.activation_checkpointing {self.job.checkpointing}"]
        return " ".join(words)


@dataclass(frozen=True)
class Change:
    """One setting to change: bytes it gives back on the fullest rank, whether that suffices, and the speed then."""

    flags: str
    saved: float
    fits: bool
    tokens_per_second: float


def meshes(world: int, per_node: int) -> Iterator[Degrees]:
    """Every factorization of `world` into the five degrees, tensor parallelism within a node."""
    for tp in _divisors(world):
        if tp > per_node:
            break
        for pp in _divisors(world // tp):
            for cp in _divisors(world // tp // pp):
                for shard in _divisors(world // tp // pp // cp):
                    yield Degrees(world // tp // pp // cp // shard, shard, cp, tp, pp)


def search(world: int, make: Make, gpu: Machine, top: int = 5) -> list[Candidate]:
    """The `top` fastest jobs that fit with room to spare, best first: all meshes, microbatches of 1, 2, 4 ...

    Each with the least checkpointing that fits. Of each mesh only its best job is kept. Empty if none fits.
    """
    best: list[Candidate] = []
    for degrees in meshes(world, gpu.per_node):
        found = list(_fitting(degrees, make, gpu))
        if found:
            best.append(max(found, key=_speed))
    return sorted(best, key=_speed, reverse=True)[:top]


def changes(job: Job, gpu: Machine, make: Make) -> list[Change]:
    """Single settings that lower the fullest rank's memory, the largest saving first."""
    before = peak(job).total
    found = []
    for flags, other in _alternatives(job, gpu, make):
        after = peak(other).total
        if after < before:
            found.append(Change(flags, before - after, after <= gpu.memory, throughput(other, gpu).tokens_per_second))
    return sorted(found, key=lambda change: (change.fits, change.saved), reverse=True)


def _micro_sizes(degrees: Degrees, make: Make) -> list[int]:
    """Sequences per forward pass to try; none where the mesh itself is refused."""
    try:
        job = make(degrees, 0, "none")
    except PunaError:
        return []
    local = job.batch_size // degrees.data
    powers = [2**power for power in range(local.bit_length()) if local % 2**power == 0]
    return list(dict.fromkeys([*powers, local]))


def _fitting(degrees: Degrees, make: Make, gpu: Machine) -> Iterator[Candidate]:
    """Jobs of one mesh that fit, small microbatches first; what one does not fit, a larger one does not either."""
    for micro in _micro_sizes(degrees, make):
        jobs = [job for mode in CHECKPOINTING if (job := _made(make, degrees, micro, mode))]
        if not jobs:  # this schedule cannot take that many microbatches
            continue
        # Each further mode only computes more again.
        fit = next(((one, found) for one in jobs if (found := peak(one)).total <= SPARE * gpu.memory), None)
        if fit is None:
            return
        yield Candidate(*fit, throughput(fit[0], gpu))


def _made(make: Make, degrees: Degrees, micro: int, mode: str) -> Job | None:
    """The job, or None where it is refused."""
    try:
        return make(degrees, micro, mode)
    except PunaError:
        return None


def _speed(candidate: Candidate) -> float:
    return candidate.speed.tokens_per_second


def _alternatives(job: Job, gpu: Machine, make: Make) -> Iterator[tuple[str, Job]]:
    degrees = job.degrees
    for mode in CHECKPOINTING[CHECKPOINTING.index(job.checkpointing) + 1 :]:
        micro = job.batch_size // degrees.data // job.microbatches
        if (less := _made(make, degrees, micro, mode)) is not None:
            yield f"--train.activation_checkpointing {mode}", less
    if degrees.shards > 1:
        wrong = degrees.pp > 1 and job.schedule in SPLIT_BACKWARD  # zero 3 under these: degrees.check_degrees
        for zero in range(job.zero + 1, 3 if wrong else 4):
            yield f"--parallel.zero {zero}", replace(job, zero=zero)
        if not job.cpu_offload:
            yield "--parallel.cpu_offload true", replace(job, cpu_offload=True)
    local = job.batch_size // degrees.data
    if degrees.pp == 1 and job.microbatches < local:
        yield "--train.micro_batch_size 1", replace(job, microbatches=local)
    for name, wider in _wider(degrees, gpu):
        try:
            yield f"--parallel.{name} {getattr(wider, name)}", make(wider, 0, job.checkpointing)
        except PunaError:
            continue


def _wider(degrees: Degrees, gpu: Machine) -> Iterator[tuple[str, Degrees]]:
    """Twice as much of one dimension, taken from the data-parallel ranks."""
    for name in ("dp_shard", "tp", "pp", "cp"):
        source = "dp_replicate" if name == "dp_shard" or degrees.dp_replicate > 1 else "dp_shard"
        if getattr(degrees, source) % 2 == 0 and not (name == "tp" and degrees.tp * 2 > gpu.per_node):
            yield name, replace(degrees, **{name: getattr(degrees, name) * 2, source: getattr(degrees, source) // 2})


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
