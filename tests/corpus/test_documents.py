"""Files of every kind become the same documents, however they are cut, and what is wrong with them is counted."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter

import pytest

from puna.base.console import PunaError
from puna.corpus import blocks, read_blocks
from puna.corpus.blocks import find_inputs, find_seam, plan
from puna.corpus.documents import BINARY, BROKEN, EMPTY, INVALID, Rules, as_domain, file_kind
from puna.corpus.read_blocks import read_all, read_block

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(params=[200, 3000, 2 << 20], ids=["blocks of 200 B", "blocks of 3 kB", "one block"])
def cut(request, monkeypatch):
    """Blocks of other sizes, and seams looked for within a block."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    monkeypatch.setattr(blocks, "WIDE", 2 * request.param)
    for module in (blocks, read_blocks):
        monkeypatch.setattr(module, "SEAM", min(request.param, 1 << 16))


def texts_of(count: int = 60) -> list[str]:
    draw = random.Random(0)
    words = [
        "alpha",
        "beta",
        "gamma",
        "\u00fcber",
        "\u4e2d\u6587",
        "\U0001f600",
        "line\nbreak",
        '"quoted"',
        "a\\b",
        "x\u2028y",
    ]
    return [" ".join(draw.choices(words, k=draw.choice((1, 5, 40, 300)))) for _ in range(count)]


def read(path, **rules):
    return read_all(find_inputs([path]), Rules(**rules))


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def packed(data: bytes, ending: str) -> bytes:
    """Compressed in three members or frames."""
    third = len(data) // 3
    pieces = (data[:third], data[third : 2 * third], data[2 * third :])
    return {"": data, ".gz": b"".join(map(gzip.compress, pieces)), ".zst": b"".join(map(zstd, pieces))}[ending]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, cut, ending) -> None:
    """Lines of 1 to 2,000 characters, blank lines, CRLF, a BOM and no line break at the end."""
    texts = texts_of()
    lines = [json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    data = "\ufeff" + "\r\n".join(lines[:30]) + "\n\n  \n" + "\n".join(lines[30:])
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(packed(data.encode(), ending))
    reading = read(file)
    assert [d.text for d in reading.documents] == texts
    assert not reading.left_out


@pytest.mark.parametrize("rows_per_group", [1, 7, 60])
def test_parquet(tmp_path, cut, rows_per_group) -> None:
    texts = texts_of()
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), file, row_group_size=rows_per_group)
    assert [d.text for d in read(file).documents] == texts


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_however_large(tmp_path, cut, ending) -> None:
    text = "\n".join(texts_of())
    (tmp_path / f"a.txt{ending}").write_bytes(packed(b"\xef\xbb\xbf" + text.encode(), ending))
    (tmp_path / f"b.txt{ending}").write_bytes(packed(b"last", ending))
    documents = read(tmp_path).documents
    assert [d.text for d in documents] == [text, "last"]
    assert documents[0].name.endswith(f"a.txt{ending}")


def test_a_text_without_line_breaks_is_cut_between_characters(tmp_path, cut) -> None:
    text = "\u4e2d\u6587\U0001f600" * 500
    (tmp_path / "a.txt").write_text(text)
    reading = read(tmp_path)
    assert [d.text for d in reading.documents] == [text]
    assert not reading.left_out


def test_a_seam_is_where_tokenizers_do_not_look_across() -> None:
    assert find_seam(b"....a\n  indented\n\nparagraph\nend", 4) == len(b"....a\n  indented\n\nparagraph\n")
    assert find_seam(b"....a\n  indented\r\n", 4) == 6
    assert find_seam(b"....\xb8\xad no line break", 4) == 6
    assert find_seam(b"....", 4) == 4


def test_every_byte_range_owns_its_lines(tmp_path, monkeypatch) -> None:
    """Every size of block from 1 byte on; lines of every length, some empty, the last with and without its end."""
    lines = [json.dumps({"text": "x" * n}) for n in (1, 2, 50, 1, 3, 20, 2)]
    for end in ("", "\n"):
        file = tmp_path / "a.jsonl"
        file.write_text("\n".join([*lines[:3], "", *lines[3:]]) + end)
        for size in range(1, 120):
            monkeypatch.setattr(blocks, "BLOCK", size)
            for module in (blocks, read_blocks):
                monkeypatch.setattr(module, "SEAM", max(1, size // 2))
            assert [len(d.text) for d in read(file).documents] == [1, 2, 50, 1, 3, 20, 2]


def test_a_plan_begins_anywhere(tmp_path, monkeypatch) -> None:
    """From the `after` of any block on, the plan is the rest of the whole plan: so a job goes on."""
    monkeypatch.setattr(blocks, "BLOCK", 3000)
    text = "\n".join(texts_of())
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("small")
        (tmp_path / f"{i}-large.txt").write_text(text)
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode() * 3))
    inputs = find_inputs([tmp_path])
    whole = list(plan(inputs, Rules()))
    for number, block in enumerate(whole):
        assert list(plan(inputs, Rules(), block.after)) == whole[number + 1 :]
    assert sum(block.weight for block in whole) == sum(item.info.size for item in inputs)


def test_binary_empty_and_damaged_text(tmp_path, cut) -> None:
    (tmp_path / "binary.png").write_bytes(b"\x89PNG\0" + b"x" * 5000)
    (tmp_path / "late.bin").write_bytes(b"text\n" * 1000 + b"\0" + b"text\n" * 1000)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n" * 5000)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1") + b"fine\n" * 2000)
    (tmp_path / "good.txt").write_bytes(b"good")
    reading = read(tmp_path)
    assert reading.left_out == Counter({BINARY: 2, EMPTY: 2, INVALID: 1})
    assert [d.text[:6] for d in reading.documents] == ["good", "caf\ufffd\nf"]
    assert [note.text() for note in reading.notes] == [f"{tmp_path}/latin.txt is not valid UTF-8 at byte 3"]
    with pytest.raises(PunaError, match=r"latin.txt is not valid UTF-8 at byte 3") as caught:
        read(tmp_path, strict=True)
    assert "leave out --strict" in caught.value.hint


def test_byte_offset_in_a_large_file(tmp_path, cut) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 4000 + b"\xff" + b"fine\n" * 1000)
    with pytest.raises(PunaError, match=r"a.txt is not valid UTF-8 at byte 20000$"):
        read(tmp_path, strict=True)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_bad_lines_are_counted_and_named_by_their_number(tmp_path, cut, ending) -> None:
    lines = [json.dumps({"text": f"text {i} " * 9}).encode() for i in range(40)]
    lines[20] = b'{"text": "cut'
    lines[25] = b'["no", "object"]'
    lines[30] = b'{"text": "caf\xe9"}'
    lines[31] = b'{"text": "half \\ud83d pair"}'
    lines[32] = b'{"text": null}'
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(packed(b"\n".join(lines), ending))
    reading = read(file)
    assert reading.left_out == Counter({BROKEN: 2, INVALID: 2, EMPTY: 1})
    assert len(reading.documents) == 37
    assert [d.text for d in reading.documents[28:30]] == ["caf\ufffd", "half \ufffd pair"]
    named = [note.text().removeprefix(str(file)) for note in reading.notes]
    assert [text.split()[0] for text in named[:3]] == [":21", ":26", ":31"]
    assert "is not a line of JSON: a list, not an object" in named[1]
    with pytest.raises(PunaError, match=r":21 is not a line of JSON"):
        read(file, strict=True)


def test_a_row_without_the_field_names_those_it_has(tmp_path, cut) -> None:
    lines = [{"text": "a" * 50}] * 30 + [{"url": "u", "content": "long enough", "id": 3}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(PunaError, match=r"a.jsonl:31 has no field 'text'") as caught:
        read(file)
    assert caught.value.hint == "its fields are content, url, id; for instance --text-field content"
    file.write_text('{"text": ["a"]}')
    with pytest.raises(PunaError, match=r"a.jsonl:1 has a list in its field 'text', not text"):
        read(file)


def test_fields_by_dotted_path(tmp_path) -> None:
    row = {"meta": {"body": "inside"}, "a.b": "with a dot"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.table({"meta": [{"body": "inside"}]}), tmp_path / "b.parquet")
    assert [d.text for d in read(tmp_path, text_field="meta.body").documents] == ["inside"] * 2
    assert read(tmp_path / "a.jsonl", text_field="a.b").documents[0].text == "with a dot"
    with pytest.raises(PunaError, match=r"no field 'meta.title'"):
        read(tmp_path / "a.jsonl", text_field="meta.title")


def test_parquet_that_is_not_as_it_should_be(tmp_path, cut) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), file)
    with pytest.raises(PunaError, match=r"a.parquet has no field 'text'") as caught:
        read(file)
    assert "content, id" in caught.value.hint
    pq.write_table(pa.table({"text": [b"fine", b"caf\xe9", None, b""]}), file)
    reading = read(file)
    assert [d.text for d in reading.documents] == ["fine", "caf\ufffd"]
    assert reading.left_out == Counter({INVALID: 1, EMPTY: 2})
    with pytest.raises(PunaError, match=r"a.parquet row 2 is not valid UTF-8 at byte 3"):
        read(file, strict=True)
    pq.write_table(pa.table({"text": [1, 2]}), file)
    with pytest.raises(PunaError, match="row 1 has a number in its field 'text'"):
        read(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(PunaError, match=r"a.parquet is not a whole parquet file"):
        read(file)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_is_no_file(tmp_path, ending) -> None:
    data = packed(json.dumps({"text": "x " * 5000}).encode() * 3, ending)
    file = tmp_path / f"a.jsonl{ending}"
    for size in (len(data) - 3, len(data) // 2, 7):
        file.write_bytes(data[:size])
        with pytest.raises(PunaError, match="is not a whole"):
            read(file)
    file.write_bytes(data + b"junk after the end")
    with pytest.raises(PunaError, match="is not a whole"):
        read(file)


def test_domains(tmp_path) -> None:
    (tmp_path / "web" / "deep").mkdir(parents=True)
    (tmp_path / "web" / "deep" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    rows = [
        {"text": "c", "url": "https://Docs.Python.org:8080/3/?q=1", "source": "cc"},
        {"text": "d", "source": "wiki"},
        {"text": "e", "domain": "books\n"},
        {"text": "f"},
    ]
    (tmp_path / "web" / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.table({"text": ["g"], "url": ["http://x.org/"]}), tmp_path / "web" / "g.parquet")

    def domains(path, **rules) -> dict[str, str]:
        return {d.text: d.domain for d in read(path, tag=True, **rules).documents}

    name = tmp_path.name
    expected = {"a": "web", "b": name, "c": "docs.python.org", "d": "wiki", "e": "books", "f": "web", "g": "x.org"}
    assert domains(tmp_path) == expected
    assert domains(tmp_path / "b.txt") == {"b": "b"}
    assert domains(f"{tmp_path}/*/deep/*.txt") == {"a": "web"}
    assert domains(tmp_path / "web" / "c.jsonl", tag_field="text")["c"] == "c"
    with pytest.raises(PunaError, match=r"c.jsonl:2 has no field 'url'"):
        domains(tmp_path / "web" / "c.jsonl", tag_field="url")


def test_as_domain_takes_anything() -> None:
    assert as_domain("https://[broken") == ""
    assert as_domain(None) == ""
    assert as_domain(7) == "7"
    assert as_domain(b"http://x.org/a") == "x.org"
    assert len(as_domain("x" * 1000)) == 253


def test_kinds_by_name() -> None:
    assert file_kind("a.JSONL.gz") == ("lines", "gz")
    assert file_kind("s3://b/a.ndjson.zst") == ("lines", "zst")
    assert file_kind("a.parquet") == ("rows", "")
    assert file_kind("a.txt.gz") == ("text", "gz")
    assert file_kind("a.jsonl/b.py") == ("text", "")


def test_a_file_that_vanishes_or_changes(tmp_path) -> None:
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz"):
        file = tmp_path / name
        file.write_bytes(gzip.compress(b'{"text": "a"}') if name.endswith("gz") else b'{"text": "a"}')
        inputs = find_inputs([file])
        planned = [] if name.endswith("gz") else list(plan(inputs, Rules()))
        file.write_bytes(b'{"text": "longer than before, and not compressed"}')
        with pytest.raises(PunaError, match=rf"{name} changed \(\d+ bytes when it was listed, 50 now\)"):
            for block in planned or plan(inputs, Rules()):
                read_block(block, Rules())
        file.unlink()
        with pytest.raises(PunaError, match=f"{name} vanished while it was read"):
            for block in planned or plan(inputs, Rules()):
                read_block(block, Rules())


def test_inputs_are_sorted_once_each_and_not_the_output(tmp_path) -> None:
    for name in ("b.txt", "a.txt", "out/shard-000000.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    inputs = find_inputs([tmp_path / "b.txt", tmp_path], leave_out=tmp_path / "out")
    assert [(item.info.path, item.argument) for item in inputs] == [
        (f"{tmp_path}/a.txt", 1),
        (f"{tmp_path}/b.txt", 0),
    ]
