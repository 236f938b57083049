from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from puna.base.console import PunaError
from puna.data.cut import Concat
from puna.data.loader import Loader
from puna.data.mixture import Mixture
from puna.data.pack import Rules
from puna.data.stream import Lane, Stream
from shard_folders import make_source, open_folder

T = 16


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(make_source(tmp_path / "source", seed=0).folder)


def stream(folder: Path) -> Stream:
    reader = open_folder(folder)
    cut = Concat(T)
    counts = [cut.count(info) for info in reader.manifest.shards]
    return Stream({T: [Lane(reader, cut, counts, key=1, group=2)]}, {T: Mixture([(0, [1.0])])}, Rules())


def ids(batches) -> list[int]:
    return [i for batch in batches for i in batch.tokens_T.tolist()]


def test_batches_are_those_of_the_stream_in_any_order_of_asking(folder) -> None:
    plain = stream(folder)
    loader = Loader(stream(folder), batch_size=6, micro_batch_size=4)
    for step in (0, 1, 2, 7, 8, 3, 4, 4):
        batches = loader.step(step)
        assert [len(b.tokens_T) for b in batches] == [4 * T, 2 * T]
        assert ids(batches) == plain.batch(step * 6, 6).tokens_T.tolist() == ids(loader.make(step)[0])
        assert loader.waited > 0
    loader.close()
    assert "puna-data" not in {thread.name for thread in threading.enumerate()}


def test_ranks_share_a_batch(folder) -> None:
    plain = stream(folder)
    loaders = [Loader(stream(folder), 8, rank=rank, world=4) for rank in range(4)]
    for step in range(3):
        assert [i for loader in loaders for i in ids(loader.step(step))] == plain.batch(step * 8, 8).tokens_T.tolist()
    for loader in loaders:
        loader.close()
    with pytest.raises(PunaError, match="cannot be shared by 3 ranks"):
        Loader(plain, 8, rank=0, world=3)


def test_shards_are_opened_before_they_are_needed(folder) -> None:
    """Batch 0 lies in the first group of shards; the ones after it are opened meanwhile by other threads."""
    source = stream(folder)
    lane = source.lanes[T][0]
    ahead = set(lane.order.upcoming(0))
    opened: dict[int, str] = {}
    everything = threading.Event()
    real = lane.open

    def watch(number: int):
        found = real(number)
        opened.setdefault(number, threading.current_thread().name)
        if set(opened) >= ahead:
            everything.set()
        return found

    lane.open = watch
    loader = Loader(source, batch_size=1, ahead=1)
    loader.step(0)
    assert everything.wait(30)
    assert sum(name.startswith("puna-shards") for name in opened.values()) >= len(ahead) - 2
    loader.close()


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_asked_for(folder) -> None:
    loader = Loader(stream(folder), batch_size=2)
    for path in folder.glob("*.bin"):
        path.write_bytes(path.read_bytes()[:-4])
    for _ in range(2):
        with pytest.raises(PunaError, match="bytes, the manifest says"):
            loader.step(0)
    loader.close()


def test_no_rank_times_out_while_another_waits_for_storage(tmp_path) -> None:
    """Two ranks whose collectives time out after 2 s; one's storage stands still for 5 s at step 1."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = _launch(script, tmp_path, "slow")
    assert done == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    assert "waiting for the data of 1 of 2 ranks" in (tmp_path / "log-0").read_text()


def test_a_rank_without_data_stops_the_others_with_the_reason(tmp_path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    assert _launch(script, tmp_path, "broken") == [2, 2]
    assert "another rank has no data for step 1: the bucket is gone" in (tmp_path / "log-0").read_text()


def _launch(script: Path, folder: Path, mode: str) -> list[int]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds it
    ranks = []
    for rank in range(2):
        with open(folder / f"log-{rank}", "w") as log:
            command = [sys.executable, str(script), str(rank), str(store.port), mode]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        return [process.wait(120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


RANK = '''
import os, sys, threading
from datetime import timedelta
import torch
import torch.distributed as dist
from puna.base.console import PunaError
from puna.data.gate import StoreGate
from puna.data.loader import Loader

rank, port, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))

class Toy:
    """A stream whose storage is slow, or gone, for rank 1 at step 1."""
    width = 1 << 16
    def batches(self, ranges):
        ((first, count),) = ranges
        if rank == 1 and first // 2 == 1:
            if mode == "broken":
                raise PunaError("the bucket is gone")
            threading.Event().wait(5)
        return [torch.tensor([float(first)])]
    def upcoming(self, first):
        return iter(())

gate = StoreGate(store, world=2, report=1.0)
loader = Loader(Toy(), batch_size=2, rank=rank, world=2, ahead=1, gate=gate)
try:
    for step in range(3):
        (batch,) = loader.step(step)
        dist.all_reduce(batch)
        assert batch.item() == 4 * step + 1, batch
except PunaError as error:
    print(error.message, flush=True)
    os._exit(2)  # as it is: tearing down a group whose other ranks have gone may abort
dist.destroy_process_group()
'''
