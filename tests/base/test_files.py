"""One set of verbs for local paths and URLs: the same tree gives the same answers, and trouble names the path."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from puna.base import files
from puna.base.console import PunaError

TREE = {
    "a.txt": b"alpha",
    "b.json": b"{}",
    "deep/one/c.txt": b"gamma",
    "deep/d.txt": b"",
    "deep/e[1].txt": b"epsilon",
    ".hidden": b"no",
    ".git/config": b"no",
    "deep/.cache/x.txt": b"no",
    "deep/__pycache__/y.txt": b"no",
    "z": b"last",
}
VISIBLE = ["a.txt", "b.json", "deep/d.txt", "deep/e[1].txt", "deep/one/c.txt", "z"]


@pytest.fixture(params=["local", "remote"])
def tree(request, tmp_path) -> str:
    """TREE below a folder, on disk or in a bucket."""
    root = str(tmp_path / "web") if request.param == "local" else request.getfixturevalue("s3_bucket") + "/web"
    for name, data in {**TREE, "../web2/not-below.txt": b"no"}.items():
        files.write_file(os.path.normpath(f"{root}/{name}").replace("s3:/", "s3://"), data)
    return root


def below(tree: str, infos: list[files.FileInfo]) -> list[str]:
    return [info.path.removeprefix(f"{tree}/") for info in infos]


def test_a_folder_lists_its_visible_files_sorted(tree) -> None:
    for path in (tree, f"{tree}/"):
        infos = files.list_files(path)
        assert below(tree, infos) == VISIBLE
        assert [info.size for info in infos] == [len(TREE[name]) for name in VISIBLE]
    assert all(files.stat(info.path) == info for info in infos)


def test_a_file_lists_itself_even_if_hidden(tree) -> None:
    assert below(tree, files.list_files(f"{tree}/a.txt")) == ["a.txt"]
    assert below(tree, files.list_files(f"{tree}/.hidden")) == [".hidden"]


def test_a_hidden_folder_that_is_named_is_listed(tree) -> None:
    assert below(tree, files.list_files(f"{tree}/.git")) == [".git/config"]
    assert below(tree, files.list_files(f"{tree}/deep/.cache/*")) == ["deep/.cache/x.txt"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "deep/d.txt", "deep/e[1].txt", "deep/one/c.txt"]),
        ("*/*.txt", ["deep/d.txt", "deep/e[1].txt"]),
        ("deep/**", ["deep/d.txt", "deep/e[1].txt", "deep/one/c.txt"]),
        ("?", ["z"]),
        ("[ab].*", ["a.txt", "b.json"]),
        ("[!a].*", ["b.json"]),
        ("d*p", ["deep/d.txt", "deep/e[1].txt", "deep/one/c.txt"]),
        ("deep/o*/c.txt", ["deep/one/c.txt"]),
        ("*", VISIBLE),
    ],
)
def test_globs(tree, pattern, names) -> None:
    assert below(tree, files.list_files(f"{tree}/{pattern}")) == names


def test_globs_below_the_working_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a1.txt", "a2.txt", "b/a3.txt"):
        files.write_file(name, b"x")
    assert [info.path for info in files.list_files("a*.txt")] == ["a1.txt", "a2.txt"]
    assert [info.path for info in files.list_files("**/a*.txt")] == ["a1.txt", "a2.txt", "b/a3.txt"]


def test_what_is_missing_is_named(tree) -> None:
    for path in (f"{tree}/absent", f"{tree}/absent/"):
        with pytest.raises(PunaError, match=r"/absent/? does not exist"):
            files.list_files(path)
    with pytest.raises(PunaError, match=r"no file matches .*/\*\.xyz \(6 looked at\)"):
        files.list_files(f"{tree}/*.xyz")
    assert files.stat(f"{tree}/absent") is None
    assert files.stat(f"{tree}/deep") is None
    for act in (files.read_file, lambda path: files.read_range(path, 0, 1)):
        with pytest.raises(PunaError, match="/absent does not exist"):
            act(f"{tree}/absent")


def test_a_name_with_brackets_is_a_name_first(tmp_path) -> None:
    files.write_file(tmp_path / "e[1].txt", b"x")
    files.write_file(tmp_path / "f[1]" / "g.txt", b"x")
    assert [info.path for info in files.list_files(tmp_path / "e[1].txt")] == [str(tmp_path / "e[1].txt")]
    assert [info.path for info in files.list_files(tmp_path / "f[1]")] == [str(tmp_path / "f[1]" / "g.txt")]


def test_a_pattern_in_the_bucket_is_refused() -> None:
    with pytest.raises(PunaError, match="pattern in its bucket"):
        files.list_files("s3://web-*/a")


def test_read_range_is_exact(tree) -> None:
    assert files.read_range(f"{tree}/a.txt", 1, 4) == b"lph"
    assert files.read_range(f"{tree}/a.txt", 3, 3) == b""
    with pytest.raises(PunaError, match=rf"{tree}/a.txt .*6 were expected"):
        files.read_range(f"{tree}/a.txt", 3, 6)
    with pytest.raises(PunaError, match=rf"{tree}/a.txt ends "):
        files.read_range(f"{tree}/a.txt", 9, 12)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 10_000])
def test_streams_hold_every_byte_in_order(tree, size) -> None:
    data = random.Random(size).randbytes(size)
    files.write_file(f"{tree}/bytes", memoryview(data))
    pieces = list(files.open_stream(f"{tree}/bytes", chunk=1000))
    assert b"".join(pieces) == data
    assert all(len(piece) == 1000 for piece in pieces[:-1])
    assert files.read_file(f"{tree}/bytes") == data


def test_a_stream_under_faults(s3_bucket, fault_proxy, monkeypatch) -> None:
    monkeypatch.setattr(files.objects, "FIRST_WAIT", 0.001)
    data = random.Random(3).randbytes(50_000)
    files.write_file(f"{s3_bucket}/x", data)
    fault_proxy.mix(5, 0.5, ("truncate", "short", "drop", "503"))
    assert b"".join(files.open_stream(f"{s3_bucket}/x", chunk=5000)) == data
    assert sum(fault_proxy.gets.values()) > 10


def test_a_stream_left_early_stops_fetching(s3_bucket, fault_proxy) -> None:
    files.write_file(f"{s3_bucket}/x", bytes(100_000))
    stream = files.open_stream(f"{s3_bucket}/x", chunk=1000, at_once=2)
    assert next(stream) == bytes(1000)
    stream.close()
    assert sum(fault_proxy.gets.values()) <= 4


def test_an_object_replaced_while_it_is_streamed_is_an_error(s3_bucket) -> None:
    files.write_file(f"{s3_bucket}/x", bytes(10_000))
    stream = files.open_stream(f"{s3_bucket}/x", chunk=1000, at_once=1)
    next(stream)
    files.write_file(f"{s3_bucket}/x", b"1" * 10_000)
    with pytest.raises(PunaError, match="/x was replaced while it was read"):
        list(stream)


def test_writing_replaces_and_changes_the_version(tree) -> None:
    before = files.stat(f"{tree}/a.txt")
    files.write_file(f"{tree}/a.txt", b"other")
    assert files.read_file(f"{tree}/a.txt") == b"other"
    assert files.stat(f"{tree}/a.txt").version != before.version


def test_names() -> None:
    assert files.is_remote("s3://b/x")
    assert not files.is_remote("/data/s3/x")
    assert not files.is_remote(Path("x"))
    assert files.join("s3://b/web/", "a", "b.txt") == "s3://b/web/a/b.txt"
    assert files.join(Path("/d"), "a", "b.txt") == "/d/a/b.txt"
    assert files.name_of("s3://b/web/a.txt") == files.name_of(Path("/x/a.txt")) == "a.txt"
    assert files.name_of("web/") == "web"


def test_an_unknown_scheme_is_an_error_not_a_local_path() -> None:
    for act in (files.list_files, files.stat, files.read_file):
        with pytest.raises(PunaError, match="is no address of an object"):
            act("https://host/x.txt")


# ---- what only disks have, and what only stores have ----


def test_folder_links_are_followed_once(tmp_path) -> None:
    files.write_file(tmp_path / "data" / "a.txt", b"x")
    files.write_file(tmp_path / "elsewhere" / "b.txt", b"x")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    names = below(str(tmp_path / "data"), files.list_files(tmp_path / "data"))
    assert names == ["a.txt", "c.txt", "other/b.txt"]


def test_a_link_to_nothing_is_an_error(tmp_path) -> None:
    (tmp_path / "broken.txt").symlink_to(tmp_path / "absent")
    with pytest.raises(PunaError, match=r"broken\.txt is a link to nothing"):
        files.list_files(tmp_path)


def test_sockets_and_pipes_are_left_out(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    files.write_file(tmp_path / "a.txt", b"x")
    assert below(str(tmp_path), files.list_files(tmp_path)) == ["a.txt"]


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch) -> None:
    files.write_file(tmp_path / "closed" / "a.txt", b"x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):  # tests may run as root, who reads everything
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PunaError, match=r"cannot read .*closed: Permission denied"):
        files.list_files(tmp_path)


def test_a_folder_is_no_file(tmp_path) -> None:
    for act in (files.read_file, lambda path: files.read_range(path, 0, 1)):
        with pytest.raises(PunaError, match="is a folder, not a file"):
            act(tmp_path)


def test_an_empty_folder_lists_nothing(tmp_path) -> None:
    assert files.list_files(tmp_path) == []


def test_a_file_is_cut_while_it_is_listed_and_read(tmp_path) -> None:
    files.write_file(tmp_path / "a", b"0123456789")
    os.truncate(tmp_path / "a", 4)
    with pytest.raises(PunaError, match="ends at byte 4, 10 were expected"):
        files.read_range(tmp_path / "a", 0, 10)


def test_folder_markers_of_consoles_are_no_files(s3_bucket) -> None:
    for key in ("web/sub", "web/sub/x", "web/empty"):
        files.write_file(f"{s3_bucket}/{key}", b"" if key != "web/sub/x" else b"x")
    assert below(f"{s3_bucket}/web", files.list_files(f"{s3_bucket}/web")) == ["empty", "sub/x"]


def test_removing_files_and_trees(tree) -> None:
    """Absent ones are no error; hidden names go with their folder, and what stands beside it stays."""
    files.remove([f"{tree}/a.txt", f"{tree}/deep/d.txt", f"{tree}/absent"])
    files.remove([])
    assert below(tree, files.list_files(tree)) == ["b.json", "deep/e[1].txt", "deep/one/c.txt", "z"]
    files.remove_tree(f"{tree}/deep")
    assert below(tree, files.list_files(tree)) == ["b.json", "z"]
    assert files.stat(f"{tree}/deep/.cache/x.txt") is None
    files.remove_tree(tree)
    files.remove_tree(tree)
    assert files.stat(f"{tree}/.hidden") is None
    assert files.stat(f"{os.path.dirname(tree)}/web2/not-below.txt")


def test_folders_of_a_folder(tree) -> None:
    assert files.list_folders(tree) == [".git", "deep"]
    assert files.list_folders(f"{tree}/deep/") == [".cache", "__pycache__", "one"]
    assert files.list_folders(f"{tree}/absent") == []
