"""Shards in a bucket: the same batches as from the disk, or one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from puna.base.console import PunaError
from puna.base.files import write_file
from puna.data.shards import read_manifest
from shard_folders import best_fit_stream as stream
from shard_folders import make_source, open_folder, upload
from shard_folders import open_remote as remote

T, ROWS = 32, 8
TESTS = str(Path(__file__).parent.parent)


@pytest.fixture
def source(tmp_path, s3_bucket) -> tuple[Path, str]:
    """A local folder of seven shards and its copy in the bucket."""
    folder = Path(make_source(tmp_path / "web", seed=0, shards=7).folder)
    return folder, upload(folder, f"{s3_bucket}/data/web")


def test_through_faults_the_batches_are_those_of_the_disk(source, fault_proxy, tmp_path) -> None:
    fault_proxy.mix(0, 0.3)
    local, far = stream(open_folder(source[0])), stream(remote(source[1], tmp_path / "cache"))
    for step in range(2 * local.lanes[T][0].order.total // ROWS):
        a, b = (s.batch(step * ROWS, ROWS) for s in (local, far))
        assert a.tokens_T.equal(b.tokens_T)
        assert a.targets_T.equal(b.targets_T)


def test_a_shard_is_fetched_once_per_node(source, fault_proxy, tmp_path) -> None:
    """Two processes of one node and one of another read the bucket at once."""
    script = tmp_path / "node.py"
    script.write_text(NODE)
    commands = [(tmp_path / "node-a", 0), (tmp_path / "node-a", 1), (tmp_path / "node-b", 0)]
    running = [
        subprocess.Popen([sys.executable, str(script), source[1], str(cache), str(rank), TESTS], stdout=subprocess.PIPE)
        for cache, rank in commands
    ]
    try:
        outputs = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    finally:
        for process in running:
            process.kill()
    local = stream(open_folder(source[0]))
    steps = local.lanes[T][0].order.total // ROWS
    for (_, rank), output in zip(commands, outputs, strict=True):
        assert output == [local.batch(step * ROWS + rank * 4, 4).tokens_T.tolist() for step in range(steps)]
    tokens = {path: n for path, n in fault_proxy.gets.items() if path.endswith(".bin")}
    assert len(tokens) == 7
    assert set(tokens.values()) == {2}  # two nodes


NODE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from shard_folders import best_fit_stream as stream, open_remote as remote
url, cache, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
made = stream(remote(url, cache))
steps = made.lanes[32][0].order.total // 8
print(json.dumps([made.batch(step * 8 + rank * 4, 4).tokens_T.tolist() for step in range(steps)]))
"""


def test_a_damaged_object_is_an_error_and_is_not_kept(source, s3_bucket, tmp_path) -> None:
    _, url = source
    reader = remote(url, tmp_path / "cache")
    whole = (source[0] / "shard-000002.bin").read_bytes()
    write_file(f"{url}/shard-000002.bin", bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(PunaError, match=r"shard-000002\.bin is corrupt: sha256"):
        reader.shard(2)
    write_file(f"{url}/shard-000002.bin", whole)
    assert reader.shard(2).tokens.tobytes() == whole


def test_a_cache_smaller_than_an_epoch_goes_on_by_itself(source, tmp_path) -> None:
    reader = remote(source[1], tmp_path / "cache", capacity=20_000)
    local, far = stream(open_folder(source[0])), stream(reader)
    assert sum(info.tokens * 4 for info in reader.manifest.shards) > 30_000
    for step in range(20):
        assert local.batch(step * ROWS, ROWS).tokens_T.equal(far.batch(step * ROWS, ROWS).tokens_T)
    kept = [f for f in (tmp_path / "cache").rglob("*") if f.is_file() and len(f.name) == 64]
    assert sum(f.stat().st_size for f in kept) <= 20_000


def test_no_permission_and_no_manifest(source, fault_proxy, tmp_path) -> None:
    with pytest.raises(PunaError, match="holds no manifest"):
        read_manifest(source[1] + "/other")
    fault_proxy.always("403")
    with pytest.raises(PunaError, match="no permission to read") as error:
        remote(source[1], tmp_path / "cache")
    assert "very-secret" not in error.value.message + error.value.hint
