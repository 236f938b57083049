"""Our writer's files are safetensors files: any dtype and shape, the checksum without reading them again."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from puna.weights.manifest import digest_file
from puna.weights.shards import index_of, plan_files, queues
from puna.weights.tensor_file import TensorFile, write_files

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]


def test_safetensors_reads_what_was_written(tmp_path) -> None:
    tensors = {str(dtype): torch.randn(3, 5).mul(4).to(dtype) for dtype in DTYPES}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 6).T,
        'ä"\\': torch.ones(1),
    }
    tensors["fp8"] = torch.randn(8).to(torch.float8_e4m3fn)
    path = tmp_path / "x.safetensors"
    with TensorFile(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as file:
        for tensor in tensors.values():
            file.add(tensor)
    assert file.digest == digest_file(path)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(
        torch.equal(read[name], tensor.contiguous()) and read[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
        if name != "fp8"
    )
    assert torch.equal(read["fp8"].float(), tensors["fp8"].float())


def test_large_tensors_go_in_pieces(tmp_path) -> None:
    tensor = torch.arange(6 * 2**20, dtype=torch.float32)  # 24 MiB, of 16 MiB pieces
    with TensorFile(tmp_path / "x.safetensors", {"x": (tensor.dtype, tuple(tensor.shape))}) as file:
        file.add(tensor)
    assert file.digest == digest_file(tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


def test_what_was_not_announced_is_a_bug(tmp_path) -> None:
    with (
        pytest.raises(AssertionError, match="announced"),
        TensorFile(tmp_path / "a", {"x": (torch.float32, (2,))}) as file,
    ):
        file.add(torch.ones(3))
    with (
        pytest.raises(AssertionError, match="0 of 1 tensors"),
        TensorFile(tmp_path / "b", {"x": (torch.float32, (2,))}),
    ):
        pass


def test_all_tensors_are_taken_even_if_writing_fails(tmp_path, monkeypatch) -> None:
    """Other ranks wait for the parts behind the iterator."""
    taken = []

    def tensors():
        for number in range(5):
            taken.append(number)
            yield torch.ones(2)

    def full(self, data) -> None:
        raise OSError(errno.ENOSPC, "full")

    files = plan_files({f"layers.{i}.attn_norm.weight": 8 for i in range(5)})
    monkeypatch.setattr(TensorFile, "_write", full)
    with pytest.raises(OSError, match="full"):
        write_files(files, tensors(), dict.fromkeys(files[0].parameters, (torch.float32, (2,))), tmp_path)
    assert taken == [0, 1, 2, 3, 4]


LIMIT = """
import errno, resource, signal, sys, torch
from pathlib import Path
from puna.weights.tensor_file import TensorFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with TensorFile(Path(sys.argv[1]), {"x": (torch.float32, (1 << 20,))}) as file:
        file.add(torch.ones(1 << 20))
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs file size limits")
def test_the_operating_systems_error_comes_through(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMIT, str(tmp_path / "x")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "EFBIG", done.stderr


# ---- which file, which rank ----


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=40),
    ranks=st.integers(1, 9),
    stages=st.integers(1, 3),
    largest=st.integers(500, 5000),
    smallest=st.integers(1, 3000),
)
def test_plans_are_whole_in_order_and_within_limits(sizes, ranks, stages, largest, smallest) -> None:
    names = {f"p{i}": size for i, size in enumerate(sizes)}
    stage_of = [i * stages // len(sizes) for i in range(len(sizes))]
    holders = {
        name: list(range(stage * ranks, (stage + 1) * ranks)) for name, stage in zip(names, stage_of, strict=True)
    }
    plan = plan_files(names, holders, largest, smallest)
    assert [name for file in plan for name in file.parameters] == list(names)
    for file in plan:
        assert all(file.owner in holders[name] for name in file.parameters)
        assert len(file.parameters) == 1 or sum(names[name] for name in file.parameters) <= largest
    assert sum(map(len, queues(plan).values())) == len(names)
    assert len(plan) == 1 or index_of(plan, {name: name for name in names}, names)["metadata"] == {
        "total_size": sum(sizes)
    }


def test_writers_have_equal_shares() -> None:
    """32 layers on 8 ranks: 8 files that differ by less than a layer, on ranks 0 to 7 in the model's order."""
    sizes = {f"layers.{i}": 2**30 for i in range(32)}
    plan = plan_files(sizes, {name: range(8) for name in sizes})
    assert [file.owner for file in plan] == list(range(8))
    assert {len(file.parameters) for file in plan} == {4}
    assert plan[0].name == "model-00001-of-00008.safetensors"


def test_few_large_files_spread_over_many_ranks_and_many_over_few() -> None:
    sizes = {f"p{i}": 300 * 2**20 for i in range(4)}
    assert [file.owner for file in plan_files(sizes, {name: range(64) for name in sizes})] == [0, 16, 32, 48]
    sizes = {f"p{i}": 4 * 10**9 for i in range(8)}
    owners = [file.owner for file in plan_files(sizes, dict.fromkeys(sizes, (5, 6)))]
    assert owners == [5, 5, 5, 5, 6, 6, 6, 6]
    assert all(a <= b for a, b in pairwise(owners))


def test_a_small_model_is_one_file() -> None:
    (file,) = plan_files({"a": 10, "b": 20}, {"a": range(8), "b": range(8)})
    assert (file.name, file.owner, file.parameters) == ("model.safetensors", 0, ("a", "b"))
