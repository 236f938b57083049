"""Ranks that meet, agree and wait for each other; each is a thread here. The examples of docs/ as far as a parser sees."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import TCPStore
from torch.distributed.run import get_args_parser

from puna.base.console import PunaError
from puna.parallel.launch import Meeting, Place

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def address(monkeypatch) -> TCPStore:
    """A store as torchrun has one, and the environment that says where."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return store


def on_ranks(number: int, work: Callable[[Meeting], Any]) -> list[Any]:
    """What `work` returns or raises on each rank."""

    def rank(place: int) -> Any:
        meeting = Meeting(Place(place, number, place, number), patience=30)
        try:
            return work(meeting)
        except PunaError as error:
            return error
        finally:
            meeting.leave()

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(rank, range(number)))


def test_a_process_by_itself_meets_nobody() -> None:
    meeting = Meeting(Place())
    meeting.agree("recipe", "anything", "")
    meeting.leave()


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(PunaError, match="RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        Place.of({"WORLD_SIZE": "2"})


def test_ranks_that_want_the_same_go_on(address) -> None:
    assert on_ranks(3, lambda m: m.agree("recipe", '{"a": 1}', "same")) == [None] * 3


def test_a_rank_that_wants_something_else_is_named_on_all(address) -> None:
    found = on_ranks(3, lambda m: m.agree("recipe", f'{{"a": 1, "b": {m.place.rank // 2}}}', "use one recipe"))
    assert {(e.message, e.hint) for e in found} == {
        ("recipe of rank 2 differs from rank 0's: b 1 instead of 0", "use one recipe")
    }


def test_a_barrier_says_how_many_came(address) -> None:
    found = on_ranks(2, lambda m: m.barrier("start", patience=0.3) if m.place.rank == 0 else None)
    assert found[0].message.startswith("1 of 2 ranks came to start")


def test_a_barrier_opens_for_the_last(address) -> None:
    assert on_ranks(2, lambda m: m.barrier("start")) == [None, None]


def test_the_address_of_a_dead_rank_0_is_not_believed(address) -> None:
    """torchrun's store outlives a restart: until the new rank 0 has written, the old one's port is in it."""
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        address.set("puna/store", str(dead.getsockname()[1]))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(Meeting, Place(1, 2, 1, 2), 30)
        first = Meeting(Place(0, 2, 0, 2), 30)
        meeting = second.result(60)
        first.store.set("hello", "there")
        assert meeting.store.get("hello") == b"there"
        for left in [pool.submit(meeting.leave), first.leave()]:
            assert left is None or left.result(30) is None


@pytest.mark.parametrize("name", ["slurm.sh", "torchx.sh"])
def test_shell_examples(name: str) -> None:
    script = DOCS / "examples" / name
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_kubernetes_example() -> None:
    job = yaml.safe_load((DOCS / "examples" / "pytorchjob.yaml").read_text())
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    pod = worker["template"]["spec"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert get_args_parser().parse_args(pod["containers"][0]["command"][1:]).training_script == "puna"


@pytest.mark.parametrize("file", ["parallel.md", "examples/slurm.sh"])
def test_torchrun_lines(file: str) -> None:
    """Every option is one that torchrun has."""
    text = (DOCS / file).read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:srun \S+ )?torchrun (.* -m puna train .*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        options = get_args_parser().parse_args(shlex.split(line.partition("#")[0]))
        assert (options.module, options.training_script) == (True, "puna")
        assert options.training_script_args[0] == "train"
