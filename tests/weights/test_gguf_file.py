"""weights/gguf/file.py: what is written the gguf package reads, its files we read, and nothing damaged gets through."""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch

from puna.base.console import PunaError
from puna.ops.formats.gguf import TYPES, quantize_gguf
from puna.weights.gguf.file import GgufFile, stored_bytes, write_gguf

METADATA = {
    "general.architecture": "llama",
    "u8": np.uint8(200), "i8": np.int8(-3), "u16": np.uint16(60000), "i16": np.int16(-3), "i32": np.int32(-5), "u32": 7,
    "f32": 1.5, "yes": True, "no": False, "u64": np.uint64(2**63), "i64": np.int64(-(2**40)), "f64": np.float64(0.1),
    "text": "ünïcödé \U0001f600", "empty": "", "texts": ["a", "é", ""], "ints": [1, -2], "floats": [0.5, 1.0],
    "flags": [True, False], "u64s": np.array([1, 2], np.uint64), "none": np.array([], np.int32),
}  # fmt: skip


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A file with a tensor of each type; (path, bytes of each tensor)."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    w = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    data = {name: quantize_gguf(w, name) for name in TYPES}
    data["vector"] = quantize_gguf(w[0, :37], "F32")
    entries = {**{name: (name, (3, 256)) for name in TYPES}, "vector": ("F32", (37,))}
    write_gguf(path, METADATA, entries, data.__getitem__)
    return path, data


def test_what_we_write_we_read(example) -> None:
    path, data = example
    file = GgufFile(path)
    assert {key: plain(value) for key, value in file.metadata.items()} == {
        key: plain(value) for key, value in METADATA.items()
    }
    for name, tensor in data.items():
        assert torch.equal(file.raw(name), tensor)
        assert file.tensors[name].start % 32 == 0
    file.raw("F32")[0, 0] += 1  # a private copy of the page: the file stays as it is
    assert torch.equal(file.raw("F32"), data["F32"])


def test_the_gguf_package_reads_it(example) -> None:
    path, data = example
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        field = reader.fields[key]
        contents = field.contents()
        assert contents == plain(value) or key == "f64"
        kind = field.types[0].name
        expected = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32", list: "ARRAY", np.ndarray: "ARRAY"}
        assert kind == expected.get(type(value), str(getattr(value, "dtype", "")).upper())
    for tensor in reader.tensors:
        assert tensor.data.tobytes() == data[tensor.name].numpy().tobytes()
        assert tuple(tensor.shape)[::-1] == ((37,) if tensor.name == "vector" else (3, 256))


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_we_read_what_the_gguf_package_writes(tmp_path, alignment) -> None:
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_uint64("n", 2**40)
    writer.add_array("words", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("x", x)
    writer.add_tensor("q", gguf.quantize(x, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "b.gguf")
    assert file.metadata["n"] == 2**40
    assert (file.metadata["words"], file.metadata["numbers"].tolist()) == (["a", "b"], [1, 2, 3])
    assert torch.equal(file.raw("x").view(torch.float32), torch.from_numpy(x))
    assert (file.tensors["q"].type, file.tensors["q"].shape) == ("Q8_0", (4, 64))
    assert torch.equal(file.raw("q"), quantize_gguf(torch.from_numpy(x), "Q8_0"))


# --- damage ---------------------------------------------------------------------------------------------------------


def front(*, magic=b"GGUF", version=3, tensors=(), keys=(), alignment=None, data=256) -> bytes:
    """A small file by hand. tensors: (name, sizes innermost first, type, offset); keys: (name, kind, bytes)."""
    if alignment is not None:
        keys = [*keys, ("general.alignment", 4, struct.pack("<I", alignment))]
    out = magic + struct.pack("<IQQ", version, len(tensors), len(keys))
    for name, kind, value in keys:
        out += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value
    for name, sizes, kind, offset in tensors:
        out += (
            struct.pack("<Q", len(name))
            + name.encode()
            + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
        )
    return out + bytes(-len(out) % 32) + bytes(data)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


CASES = {
    "begins with b'ABCD'": front(magic=b"ABCD"),
    "is GGUF version 2": front(version=2),
    "is GGUF version 1": front(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "has 3 bytes": b"GGU",
    "promises 99999 metadata keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 99999),
    "promises 99999 tensors": b"GGUF" + struct.pack("<IQQ", 3, 99999, 0),
    "the key a appears twice": front(keys=[("a", 4, b"1234"), ("a", 4, b"1234")]),
    "has kind 77": front(keys=[("a", 77, b"1234")]),
    "has kind 8, known|has kind 13": front(keys=[("a", 13, b"1234")]),
    "promises .* bytes at byte": front(keys=[("a", 8, struct.pack("<Q", 2**60))]),
    "is no UTF-8": front(keys=[("a", 8, text(b"\xff\xfe"))]),
    "promises 1152921504606846976 numbers": front(keys=[("a", 9, struct.pack("<IQ", 4, 2**60))]),
    "promises 1152921504606846976 array elements": front(keys=[("a", 9, struct.pack("<IQ", 8, 2**60))]),
    "nested": front(keys=[("a", 9, struct.pack("<IQ", 9, 1) * 6)], data=4096),
    "alignment is 24": front(alignment=24),
    "alignment is 0": front(alignment=0),
    "the tensor x appears twice": front(tensors=[("x", (8,), 0, 0), ("x", (8,), 0, 32)]),
    "5 dimensions": front(tensors=[("x", (8, 1, 1, 1, 1), 0, 0)]),
    "0 dimensions": front(tensors=[("x", (), 0, 0)]),
    r"type 10 \(Q2_K\)": front(tensors=[("x", (256,), 10, 0)]),
    r"type 99 \(unknown\)": front(tensors=[("x", (256,), 99, 0)]),
    "no whole Q8_0 blocks of 32": front(tensors=[("x", (33,), 8, 0)]),
    "no multiple of the alignment 32": front(tensors=[("x", (8,), 0, 8)]),
    r"y begins at \d+, before the end of x": front(tensors=[("x", (16,), 0, 0), ("y", (8,), 0, 32)]),
    "its tensors need": front(tensors=[("x", (8, 9), 0, 0)]),
    "its tensors need .*EiB|its tensors need": front(tensors=[("x", (2**62, 2**62), 0, 0)]),
}


@pytest.mark.parametrize("match", CASES)
def test_refusals(match, tmp_path) -> None:
    (tmp_path / "x.gguf").write_bytes(CASES[match])
    with pytest.raises(PunaError, match=match):
        GgufFile(tmp_path / "x.gguf")


def test_hand_made_files_are_otherwise_good(tmp_path) -> None:
    """The cases above differ from this one in what they name only."""
    (tmp_path / "x.gguf").write_bytes(
        front(keys=[("a", 8, text(b"b"))], tensors=[("x", (8,), 0, 0), ("y", (8, 4), 0, 32)], alignment=32)
    )
    file = GgufFile(tmp_path / "x.gguf")
    assert (file.metadata["a"], file.tensors["y"].shape, file.raw("y").shape) == ("b", (4, 8), (4, 32))


def test_a_file_cut_anywhere_is_refused(example, tmp_path) -> None:
    path, _ = example
    whole = path.read_bytes()
    draw = random.Random(0)
    end = max(e.start + e.bytes for e in GgufFile(path).tensors.values())
    for length in {*range(0, 200, 7), *(draw.randrange(end) for _ in range(150)), end - 1}:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(PunaError):
            GgufFile(tmp_path / "cut.gguf")


def test_flipped_bytes_in_front_are_an_error_or_harmless(example, tmp_path) -> None:
    """Never another exception, never a tensor outside the file."""
    path, _ = example
    whole = path.read_bytes()
    start = min(entry.start for entry in GgufFile(path).tensors.values())
    draw, refused = random.Random(1), 0
    for _ in range(400):
        place = draw.randrange(start)
        damaged = whole[:place] + bytes([draw.randrange(256)]) + whole[place + 1 :]
        (tmp_path / "x.gguf").write_bytes(damaged)
        try:
            file = GgufFile(tmp_path / "x.gguf")
            assert all(e.start + e.bytes <= len(whole) for e in file.tensors.values())
        except PunaError:
            refused += 1
    assert refused > 50


def test_no_file(tmp_path) -> None:
    with pytest.raises(PunaError, match="No such file"):
        GgufFile(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(PunaError) as error:
        GgufFile(tmp_path / "x.gguf")
    assert "git lfs pull" in error.value.hint


# --- writing --------------------------------------------------------------------------------------------------------


def broken(_: str) -> torch.Tensor:
    raise OSError(errno.ENOSPC, "no space")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("old")
    with pytest.raises(PunaError, match="disk is full while writing"):
        write_gguf(path, {}, {"x": ("F32", (8,))}, broken)

    def fails(_: int) -> None:
        raise OSError(errno.EDQUOT, "quota")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(PunaError, match="disk is full"):
            write_gguf(path, {}, {"x": ("F32", (8,))}, lambda _: torch.zeros(32, dtype=torch.uint8))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with pytest.raises(PunaError, match="cannot write"):
        write_gguf(path / "below" / "a.gguf", {}, {}, broken)


def test_memory_holds_one_tensor(tmp_path) -> None:
    """24 tensors of 16 MiB each: peak memory grows by one or two of them."""
    code = """
import resource, sys, torch
from puna.weights.gguf.file import GgufFile, write_gguf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
entries = {f"t{i}": ("F32", (4096, 1024)) for i in range(24)}
write_gguf(sys.argv[1], {}, {"t": ("F32", (8,))}, lambda name: torch.zeros(32, dtype=torch.uint8))
before = peak()
write_gguf(sys.argv[1], {}, entries, lambda name: torch.full((4096 * 1024 * 4,), 1, dtype=torch.uint8))
file = GgufFile(sys.argv[1])
assert all(int(file.raw(name).min()) == 1 for name in entries)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.gguf")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64


def test_stored_bytes() -> None:
    assert stored_bytes("Q4_K", (3, 512)) == 3 * 2 * 144
    assert stored_bytes("F32", (5,)) == 20
