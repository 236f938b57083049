from __future__ import annotations

import pytest

from puna.base.console import PunaError
from puna.corpus.in_memory import STANDARD_LIBRARY, Document, hold_out, read_documents, standard_library


def test_duplicates_and_binaries_are_left_out(tmp_path, capsys) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "b.txt").write_text("two")
    (tmp_path / "sub" / "copy.txt").write_text("one")
    (tmp_path / "sub" / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "sub" / "nul.txt").write_bytes(b"a\x00b")
    (tmp_path / "sub" / ".git" / "hidden").write_text("three")
    (tmp_path / "empty.txt").write_text(" \n")
    assert [d.text for d in read_documents([tmp_path])] == ["one", "two"]
    assert "left out: 1 empty, 2 binary files, 1 exact duplicates" in capsys.readouterr().err


def test_files_globs_and_repeats_count_once(tmp_path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.md").write_text(name)
    found = read_documents([tmp_path / "a.md", str(tmp_path / "*.md"), tmp_path])
    assert [d.text for d in found] == ["a", "b", "c"]


def test_empty_corpus_and_missing_path(tmp_path) -> None:
    with pytest.raises(PunaError, match=r"no text in .* \(0 files looked at\)"):
        read_documents([tmp_path])
    with pytest.raises(PunaError, match="does not exist"):
        read_documents([tmp_path / "none"])


def test_hold_out_takes_whole_files_and_is_stable() -> None:
    documents = [Document(str(i), f"text {i} " * 50) for i in range(40)]
    train, held = hold_out(documents, 0.1)
    assert {d.name for d in train} | {d.name for d in held} == {str(i) for i in range(40)}
    assert 3 <= len(held) <= 5
    assert {d.name for d in hold_out(documents[::-1], 0.1)[1]} == {d.name for d in held}


def test_a_huge_file_is_not_held_out() -> None:
    documents = [Document("big", "x" * 10_000), *(Document(str(i), f"{i}" * 100) for i in range(5))]
    train, held = hold_out(documents, 0.01)
    assert "big" in {d.name for d in train}
    assert held


def test_one_file_is_cut_at_a_line() -> None:
    train, held = hold_out([Document("one", "line\n" * 100)], 0.1)
    assert train[0].text + held[0].text == "line\n" * 100
    assert len(held[0].text) == pytest.approx(50, abs=5)
    with pytest.raises(PunaError, match="cannot be cut"):
        hold_out([Document("one", "no line break")], 0.1)


def test_standard_library_is_there() -> None:
    names = {file.name for file in standard_library()}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any("test" in file.parts for file in standard_library())
    assert len(read_documents([STANDARD_LIBRARY])) > 300
