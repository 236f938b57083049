"""`puna train` under torchrun as users start it; ranks that die, are told to stop or hang; jobs that cannot work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from puna.weights.checkpoint import verify
from train import launch_checks_faults as bad
from train.launch_checks import (
    Job,
    finish,
    free_ports,
    losses,
    real_torchrun,
    send,
    train_alone,
    until,
    write_inputs,
    write_recipe,
)

TWO = ["--standalone", "--nproc_per_node=2"]
LONG = {"train": {"steps": 40}, "checkpoint": {"every": 3}}
ports = free_ports()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Text, a tokenizer and shards; what is started runs here."""
    made = tmp_path_factory.mktemp("launch")
    write_inputs(made)
    before = os.getcwd()
    os.chdir(made)
    words = ["tokenize", "text", "--tokenizer", "tokenizer", "--out", "shards"]
    subprocess.run([sys.executable, "-m", "puna", *words], check=True, capture_output=True, timeout=100)
    yield made
    os.chdir(before)


@pytest.fixture(scope="module")
def pool(folder) -> Iterator[ThreadPoolExecutor]:
    """Two jobs at a time: each mostly waits."""
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture(scope="module")
def alone(folder) -> dict[int, float]:
    """Losses of one process."""
    assert train_alone(folder / "logs" / "alone", [str(write_recipe(folder, "alone"))]) == 0
    return losses(folder / "alone")


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    """A longer run on two ranks to which nothing happened."""
    return trained(folder, "undisturbed", TWO, LONG)


@contextmanager
def started(folder: Path, name: str, options: list[str], changes: dict[str, Any], log: str = "") -> Iterator[Job]:
    """A job that is ended in any case."""
    job = Job(folder / "logs" / (log or name), options, ["train", str(write_recipe(folder, name, **changes)), "--json"])
    try:
        yield job
    finally:
        job.end()


def trained(folder: Path, name: str, options: list[str], changes: dict[str, Any]) -> Path:
    """The run of a job that must succeed."""
    with started(folder, name, options, changes, f"{name}-again") as job:
        assert job.wait(100) == 0, job.err[-4000:]
    return folder / name


def assert_same(run: Path, expected: Path) -> None:
    """Every loss and every byte of the weights; and one set of saves."""
    assert losses(run) == losses(expected)
    assert saves(run) == saves(expected)
    assert verify(run / "latest") == []
    weights = [sorted((folder / "latest").glob("*.safetensors")) for folder in (run, expected)]
    assert [file.read_bytes() for file in weights[0]] == [file.read_bytes() for file in weights[1]]


def saves(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if "step-" in path.name)


def assert_like(run: Path, expected: dict[int, float]) -> None:
    """The losses of one process, but for the order of sums."""
    assert losses(run) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert saves(run) == ["step-000008", "step-000012"]
    assert verify(run / "latest") == []


# --- as a user types it -----------------------------------------------------------------------------------------------


def one_node(folder: Path) -> list[tuple[int, str, str]]:
    return finish([real_torchrun(TWO, ["train", str(write_recipe(folder, "one_node")), "--json"])], 120)


def two_agents(folder: Path) -> list[tuple[int, str, str]]:
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=x",
               f"--rdzv_endpoint=localhost:{next(ports)}"]  # fmt: skip
    words = ["train", str(write_recipe(folder, "two_agents")), "--json"]
    return finish([real_torchrun(options, words) for _ in range(2)], 120)


def two_hosts(folder: Path) -> list[tuple[int, str, str]] | str:
    """Two network namespaces joined by a cable; why not, where this machine does not allow that."""
    names = [f"puna{os.getpid() % 10000}{end}" for end in "ab"]
    steps = [f"ip netns add {names[0]}", f"ip netns add {names[1]}",
             f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"]  # fmt: skip
    for number, name in enumerate(names, 1):
        steps += [f"ip -n {name} addr add 10.77.3.{number}/24 dev {name}", f"ip -n {name} link set {name} up",
                  f"ip -n {name} link set lo up"]  # fmt: skip
    try:
        for step in steps:
            subprocess.run(step.split(), check=True, capture_output=True, timeout=10)
        words = ["train", str(write_recipe(folder, "two_hosts")), "--json"]
        options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=10.77.3.1", "--master_port=29517"]
        return finish([
            real_torchrun([*options, f"--node_rank={number}"], words, ("ip", "netns", "exec", name), GLOO_SOCKET_IFNAME=name)
            for number, name in enumerate(names)
        ], 120)  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces: {error}"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10, check=False)


@pytest.fixture(scope="module")
def typed(folder, pool) -> dict[str, Future]:
    return {work.__name__: pool.submit(work, folder) for work in (one_node, two_agents, two_hosts)}


@pytest.mark.parametrize("name", ["one_node", "two_agents", "two_hosts"])
def test_launch_line(typed, folder, alone, name: str) -> None:
    ends = typed[name].result(300)
    if isinstance(ends, str):
        pytest.skip(ends)
    assert [code for code, _, _ in ends] == [0] * len(ends), ends
    spoken = [json.loads(line) for _, out, _ in ends for line in out.splitlines()]
    assert [figures["step"] for figures in spoken] == [12]  # one object, of rank 0 only
    assert_like(folder / name, alone)


# --- ranks that die ---------------------------------------------------------------------------------------------------


def killed_and_restarted(folder: Path, name: str, ranks: tuple[int, ...]) -> Path:
    """torchrun starts all ranks again after each of these was killed, without any variable of ours."""
    with started(folder, name, [*TWO, "--max-restarts=3"], LONG) as job:
        for number, rank in enumerate(ranks):
            job.until_step(8 + 12 * number, folder / name)
            send(job.ranks()[rank], signal.SIGKILL)
        assert job.wait(100) == 0, job.err[-4000:]
    return folder / name


def killed_on_either_agent(folder: Path, name: str) -> Path:
    """Two agents count their restarts each: first a rank of the second agent dies, then one of the first."""
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=y", "--max-restarts=3",
               f"--rdzv_endpoint=localhost:{next(ports)}"]  # fmt: skip
    with (
        started(folder, name, options, LONG, "agent-0") as first,
        started(folder, name, options, LONG, "agent-1") as second,
    ):
        jobs = (first, second)
        for number, victim in enumerate((1, 0)):
            jobs[0].until_step(6 + 12 * number, folder / name)
            send(next(iter(jobs[victim].ranks().values())), signal.SIGKILL)
        assert [job.wait(100) for job in jobs] == [0, 0], first.err[-3000:] + second.err[-3000:]
    return folder / name


def goes_on_with_fewer(folder: Path, name: str) -> Path:
    """Killed on 4 ranks, then on 2; one rank ends it."""
    for ranks in (4, 2, 1):
        changes = {"train": {"steps": 12}}
        options = ["--standalone", f"--nproc_per_node={ranks}"]
        with started(folder, name, options, changes, f"{name}-{ranks}") as job:
            if ranks == 1:
                assert job.wait(100) == 0, job.err[-4000:]
            else:
                step = 12 // ranks + 1  # 4 ranks: with the save of step 4 behind it; 2 ranks: that of step 8
                job.until_step(step + (4 if ranks == 2 else 0), folder / name)
                until(lambda: (folder / name / f"step-{4 if ranks == 4 else 8:06d}").exists(), 20)  # noqa: B023
                for pid in job.processes():
                    send(pid, signal.SIGKILL)
    return folder / name


@pytest.fixture(scope="module")
def deaths(folder, pool, undisturbed) -> dict[str, Future]:
    return {
        "one_rank": pool.submit(killed_and_restarted, folder, "one_rank", (1,)),
        "rank_0": pool.submit(killed_and_restarted, folder, "rank_0", (0, 0)),
        "agents": pool.submit(killed_on_either_agent, folder, "agents"),
        "fewer": pool.submit(goes_on_with_fewer, folder, "fewer"),
    }


@pytest.mark.parametrize("name", ["one_rank", "rank_0", "agents"])
def test_restarts_as_if_nothing_had_happened(deaths, undisturbed, name: str) -> None:
    assert_same(deaths[name].result(300), undisturbed)


def test_goes_on_with_fewer_ranks(deaths, alone) -> None:
    assert_like(deaths["fewer"].result(300), alone)


@pytest.mark.slow
def test_a_node_that_goes_leaves_the_others_at_work(folder, undisturbed) -> None:
    """--nnodes=1:2: the agent with all it started is killed, and the other one goes on alone."""
    options = ["--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=z", "--max-restarts=3",
               f"--rdzv_endpoint=localhost:{next(ports)}", "--rdzv_conf=last_call_timeout=3,keep_alive_interval=1"]  # fmt: skip
    with (
        started(folder, "leaves", options, LONG, "stays") as stays,
        started(folder, "leaves", options, LONG, "goes") as goes,
    ):
        stays.until_step(8, folder / "leaves")
        if 0 in goes.ranks():  # the rendezvous lives with the agent that came first
            stays, goes = goes, stays
        goes.end()
        assert stays.wait(200) == 0, stays.err[-4000:]
    assert losses(folder / "leaves") == pytest.approx(losses(undisturbed), rel=1e-5, abs=1e-5)


def test_ranks_end_with_their_torchrun(folder) -> None:
    """Else they would train on, beside the job that is started in their place."""
    with started(folder, "orphans", TWO, {"train": {"steps": 100000}}) as job:
        job.until_step(3, folder / "orphans")
        send(job.agent, signal.SIGKILL)
        assert until(lambda: not job.processes(), 10)
        assert "torchrun has died" in job.err


# --- told to stop -----------------------------------------------------------------------------------------------------


def told(folder: Path, name: str, tell: Callable[[Job], None]) -> tuple[int | None, dict[int, float], Job]:
    """Exit code, losses so far and the job of a run that was told to stop in its middle, and then went on to its end."""
    with started(folder, name, TWO, LONG) as job:
        job.until_step(8, folder / name)
        tell(job)
        code, before = job.wait(30), losses(folder / name)
    trained(folder, name, TWO, LONG)
    return code, before, job


STOPS: dict[str, Callable[[Job], None]] = {
    "sigterm_torchrun": lambda job: send(job.agent, signal.SIGTERM),
    "sigterm_rank_1": lambda job: send(job.ranks()[1], signal.SIGTERM),
    "ctrl_c": lambda job: os.killpg(job.agent, signal.SIGINT),
}


@pytest.fixture(scope="module")
def stops(folder, pool, undisturbed) -> dict[str, Future]:
    return {name: pool.submit(told, folder, name, tell) for name, tell in STOPS.items()}


@pytest.mark.parametrize("name", STOPS)
def test_told_to_stop(stops, folder, undisturbed, name: str) -> None:
    code, before, job = stops[name].result(300)
    assert code is not None, "it did not end"
    assert 8 <= max(before) < 40
    assert f"interrupted at step {max(before)} and saved" in job.err  # its last row, its last save: the same step
    assert f"saved {folder / name}/step-{max(before):06d}" in job.err
    figures = json.loads(job.out)
    assert figures["interrupted"]
    assert figures["step"] == max(before)
    assert "error: " not in job.err
    assert_same(folder / name, undisturbed)


def test_a_rank_that_cannot_stop_is_not_waited_for(folder) -> None:
    """Its neighbour stands still; SIGTERM gives it `checkpoint.grace` seconds."""
    with started(folder, "grace", TWO, LONG | {"checkpoint": {"every": 3, "grace": 2.0}}) as job:
        job.until_step(5, folder / "grace")
        send(job.ranks()[1], signal.SIGSTOP)
        time.sleep(0.3)  # rank 0 is in a collective by now, or will be when it looks
        send(job.ranks()[0], signal.SIGTERM)
        rank_0 = job.ranks()[0]
        assert until(lambda: rank_0 not in job.processes(), 10)
        assert "not done 2 s after SIGTERM" in job.err
        send(job.ranks()[1], signal.SIGKILL)
        assert job.wait(40) == 1


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(folder, pool) -> dict[str, Future]:
    return {name: pool.submit(bad.observe, folder, name, fault) for name, fault in bad.faults(folder).items()}


@pytest.mark.parametrize("name", list(bad.faults(Path())))
def test_one_message_and_the_end(seen, folder, name: str) -> None:
    found, fault = seen[name].result(300), bad.faults(folder)[name]
    assert found.code == 1, found.output
    assert len(found.errors) == (name != "dies"), found.output  # nobody but torchrun can say that it was killed
    assert all(part in found.output for part in fault.says), found.output
    assert "src/puna/" not in found.output, found.output  # no traceback of ours
    assert found.gone < 15


def test_a_time_out_leaves_a_record(seen) -> None:
    """Which collective each rank stood in; the one that stands still writes none."""
    run = seen["hang"].result(300).run
    for rank in (0, 2):
        record = json.loads((run / "flight" / f"rank-{rank:05d}.json").read_text())
        assert all(entry["profiling_name"].startswith("gloo:") for entry in record["entries"])
        assert record["entries"]


def test_clocks_may_differ(folder, pool, alone) -> None:
    assert bad.losses_with_skew(folder) == pytest.approx(alone, rel=1e-5, abs=1e-5)
