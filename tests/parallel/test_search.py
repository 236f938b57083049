"""Search: all meshes of a GPU count, only those that work, the fastest first; and single changes that give memory back."""

from __future__ import annotations

import dataclasses

import pytest

from published import SPECS
from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.parallel.degrees import Degrees, check_degrees, microbatches, stages_per_rank
from puna.parallel.job import Job
from puna.parallel.machines import machine
from puna.parallel.memory import peak
from puna.parallel.search import SPARE, changes, meshes, search
from puna.parallel.throughput import throughput
from puna.train.recipe import ParallelSection

H100 = machine("h100")


PLAIN = ParallelSection()


def maker(spec: Spec, length: int, batch: int, section: ParallelSection = PLAIN):
    def make(degrees: Degrees, micro: int, mode: str) -> Job:
        check_degrees(section, degrees, spec, length, batch)
        number = microbatches(section, degrees, batch, micro)
        stages = stages_per_rank(section) if degrees.pp > 1 else 1
        return Job(spec, degrees, length, batch, number, zero=section.zero, schedule=section.pp_schedule,
                   stages_per_rank=stages, checkpointing=mode)  # fmt: skip

    return make


@pytest.mark.parametrize("world", [1, 6, 8, 24, 64])
def test_every_mesh_once(world: int) -> None:
    found = list(meshes(world, 8))
    assert len(set(found)) == len(found)
    assert all(degrees.world == world and degrees.tp <= 8 for degrees in found)
    assert Degrees(dp_shard=world) in found
    if world == 8:
        assert len(found) == 35  # 2^3 into five places: C(7, 4)


def test_the_best_mesh_is_the_fastest_that_fits() -> None:
    make = maker(SPECS["8b"], 8192, 8)
    found = search(8, make, H100)
    speeds = [candidate.speed.tokens_per_second for candidate in found]
    assert len(found) == 5
    assert speeds == sorted(speeds, reverse=True)
    assert len({candidate.job.degrees for candidate in found}) == 5
    everything = [
        throughput(job, H100).tokens_per_second
        for degrees in meshes(8, 8)
        for micro in (1, 2, 4, 8)
        for mode in ("none", "selective", "full")
        if (job := tried(make, degrees, micro, mode)) and peak(job).total <= SPARE * H100.memory
    ]
    assert max(everything) == speeds[0]
    assert "--parallel.dp_shard 8" in found[0].flags


def tried(make, degrees: Degrees, micro: int, mode: str) -> Job | None:
    try:
        return make(degrees, micro, mode)
    except PunaError:
        return None


def test_a_model_too_large_for_sharding_alone() -> None:
    """70B on 8 H100: 16 bytes for each of 70 B parameters are 141 GB per GPU, whatever the mesh."""
    assert search(8, maker(SPECS["70b"], 8192, 16), H100) == []
    found = search(64, maker(SPECS["70b"], 8192, 64), H100)
    assert all(peak(candidate.job).total <= SPARE * H100.memory for candidate in found)
    assert found


def test_refused_combinations_are_never_proposed() -> None:
    section = ParallelSection(pp_schedule="zbv", zero=3)
    found = search(16, maker(SPECS["8b"], 8192, 64, section), H100, top=1000)
    assert found
    assert not [c for c in found if c.job.degrees.pp > 1 and c.job.degrees.shards > 1]
    section = dataclasses.replace(section, zero=2, pp=4)
    make = maker(SPECS["70b"], 8192, 64, section)
    flags = [change.flags for change in changes(make(Degrees(pp=4, dp_shard=4), 0, "none"), H100, make)]
    assert flags
    assert "--parallel.zero 3" not in flags  # zero bubble with zero 3: wrong gradients


def test_changes_say_what_they_give_back() -> None:
    make = maker(SPECS["8b"], 8192, 16)
    job = make(Degrees(dp_shard=8), 0, "none")
    assert peak(job).total > H100.memory
    found = {change.flags: change for change in changes(job, H100, make)}
    selective = found["--train.activation_checkpointing selective"]
    after = make(Degrees(dp_shard=8), 0, "selective")
    assert selective.saved == peak(job).total - peak(after).total
    assert selective.fits
    assert selective.tokens_per_second == throughput(after, H100).tokens_per_second
    assert found["--train.micro_batch_size 1"].fits
    assert all(change.saved > 0 for change in found.values())


def test_traffic_of_zero_with_microbatches_and_in_a_pipeline() -> None:
    """replicas.py's table; in a pipeline 4 blocks and 4 microbatches were counted: 21 gathers of zero 3, 5 of zero 2."""
    spec = SPECS["8b"].replace(num_hidden_layers=4, sliding_windows=())
    flat = Job(spec, Degrees(dp_shard=2), 1024, 8, 4, dtype="float32")
    gathered, reduced = {}, {}
    for zero in (1, 2, 3):
        traffic = throughput(dataclasses.replace(flat, zero=zero), H100).traffic
        gathered[zero], reduced[zero] = traffic["all-gather"], traffic["reduce-scatter"]
    assert (gathered[2] / gathered[1], gathered[3] / gathered[1]) == (4, 8)
    assert (reduced[2] / reduced[1], reduced[3] / reduced[1]) == (4, 4)
    piped = dataclasses.replace(flat, degrees=Degrees(dp_shard=2, pp=2), batch_size=8)
    three, two, one = (throughput(dataclasses.replace(piped, zero=zero), H100).traffic for zero in (3, 2, 1))
    assert two == one
    assert three["reduce-scatter"] == two["reduce-scatter"]
    half = 4 / 2 * piped.layer_params * 2  # of two blocks, what a rank sends in one gather in fp32
    assert three["all-gather"] - two["all-gather"] == 4 * half  # M + 1 instead of one, the tables once with both
