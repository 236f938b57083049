from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from puna.base.console import PunaError
from puna.data.reader import ShardReader
from puna.data.shards import check_tokenizer, is_shards, read_manifest, token_dtype
from shard_folders import make_source, open_folder, shard, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "shards", [shard([5, 9], 0, tags=[1, 0]), shard([4, 4, 7], 14, tags=[0, 2, 0])])


def test_what_is_written_is_read(folder) -> None:
    reader = open_folder(folder)
    assert is_shards(folder)
    assert reader.name == "shards"
    assert (reader.manifest.tokens, reader.manifest.documents, reader.manifest.text_bytes) == (29, 5, 116)
    second = reader.shard(1)
    assert second.tokens.tolist() == list(range(14, 29))
    assert second.starts.tolist() == reader.starts(1).tolist() == [0, 4, 8, 15]
    assert second.tags.tolist() == [0, 2, 0]
    assert isinstance(second.tokens.base, np.memmap)
    assert reader.shard(1) is second


def test_the_token_file_is_plain(folder) -> None:
    """What nanoGPT reads: the ids and nothing else."""
    assert np.fromfile(folder / "shard-000000.bin", dtype=np.uint32).tolist() == list(range(14))
    assert [token_dtype(n) for n in (2**16, 2**16 + 1)] == ["uint16", "uint32"]


@pytest.mark.parametrize("name", ["shard-000001.bin", "shard-000001.docs"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_never_read(folder, name, damage) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    expected = {"flip": f"{name} is damaged: sha256", "cut": "bytes, the manifest says", "gone": f"{name} is gone"}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-3])
    reader = open_folder(folder)
    for _ in range(2):  # and not on the second try either
        with pytest.raises(PunaError, match=expected[damage]) as error:
            reader.shard(1)
        assert "puna tokenize" in error.value.hint
    assert len(reader.shard(0).tokens) == 14


def test_manifests_that_are_refused(folder, tmp_path) -> None:
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())
    cases = {
        "says 30 tokens, its shards have 29": {**whole, "tokens": 30},
        "says 29 tokens, its shards have 14": {**whole, "shards": whole["shards"][:1]},
        "has version 9, this puna reads 1": {**whole, "version": 9},
        "not a manifest of token shards": {**whole, "format": "other"},
        "lists 2 shards of int8": {**whole, "dtype": "int8"},
    }
    for message, payload in cases.items():
        path.write_text(json.dumps(payload))
        with pytest.raises(PunaError, match=message):
            read_manifest(folder)
    path.write_text(json.dumps(whole)[:-40])
    with pytest.raises(PunaError, match="not a manifest"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(PunaError, match="never finished"):
        read_manifest(folder)
    with pytest.raises(PunaError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")


def test_another_tokenizer_is_refused(folder, tokenizer) -> None:
    with pytest.raises(PunaError, match=r"another tokenizer: 1000000000 tokens, hash vvvv.*this one has 320"):
        ShardReader.open(folder, tokenizer)
    same = write_folder(folder.parent / "same", [shard([5], 0)], tokenizer.vocab_hash, 320)
    check_tokenizer(ShardReader.open(same, tokenizer).manifest, tokenizer, same)


def test_the_fingerprint_tells_tokens_and_boundaries_apart(tmp_path) -> None:
    made = {
        "same": [shard([5, 9], 0)],
        "ids": [shard([5, 9], 1)],
        "boundaries": [shard([6, 8], 0)],
        "order": [shard([5], 0), shard([9], 5)],
    }
    prints = {name: open_folder(write_folder(tmp_path / name, s)).manifest.fingerprint() for name, s in made.items()}
    assert len(set(prints.values())) == 4
    assert prints["same"] == open_folder(write_folder(tmp_path / "b", made["same"])).manifest.fingerprint()


def test_threads_share_one_opening(tmp_path, monkeypatch) -> None:
    reader = make_source(tmp_path / "s", seed=0, shards=1)
    opened = []
    real = reader._load
    monkeypatch.setattr(reader, "_load", lambda info: opened.append(info.name) or real(info))
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(reader.shard(0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 8
    assert opened == ["shard-000000"]


def test_open_shards_are_few(tmp_path) -> None:
    reader = make_source(tmp_path / "s", seed=0, shards=9)
    few = ShardReader(reader.folder, reader.manifest, keep=3)
    kept = few.shard(0)
    for number in range(9):
        few.shard(number)
    assert len(few._open) == 3
    assert kept.tokens[0] == 0  # closed for the reader, still whole for who holds it
