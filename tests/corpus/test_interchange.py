"""Files of Megatron-LM and nanoGPT to shards and back, against a writer and a reader of their formats of our own."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from puna.base.console import PunaError
from puna.base.files import join, read_file, write_file
from puna.corpus import interchange
from puna.corpus.documents import Document
from puna.corpus.encode import encode_documents
from puna.corpus.interchange import export_megatron, export_nanogpt, import_megatron, import_nanogpt, import_tokens
from puna.corpus.text_bytes import TextBytes
from puna.corpus.verify import read_shards, verify_shards
from puna.data.reader import ShardReader
from puna.data.shards import Manifest, Shard, is_shards, read_manifest, write_manifest, write_shard
from puna.text.tokenizer import Settings, Tokenizer
from shard_folders import write_folder

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8, "uint32": 9, "uint64": 10}


def joined(parts: list[list[int]]) -> list[int]:
    return [i for part in parts for i in part]


# ---- the published layouts, byte by byte ----


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16", modes: bool = False) -> None:
    """Documents of sequences of ids as PREFIX.bin and PREFIX.idx."""
    sequences = [sequence for document in documents for sequence in document]
    width, lengths = np.dtype(dtype).itemsize, [len(sequence) for sequence in sequences]
    ends = np.cumsum([0, *(len(document) for document in documents)])
    Path(f"{prefix}.bin").write_bytes(np.array(joined(sequences), dtype=dtype).tobytes())
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<QQ", len(sequences), len(ends))
    index += struct.pack(f"<{len(sequences)}i", *lengths)
    index += struct.pack(f"<{len(sequences)}q", *(sum(lengths[:i]) * width for i in range(len(sequences))))
    index += struct.pack(f"<{len(ends)}q", *ends)
    Path(f"{prefix}.idx").write_bytes(index + bytes(len(sequences) * modes))


def read_megatron(prefix: Path) -> list[list[int]]:
    """The ids of each document, with struct alone."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    magic, version, code, n, m = struct.unpack("<9sQBQQ", index[:34])
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
    sizes = struct.unpack(f"<{n}i", index[34 : 34 + 4 * n])
    pointers = struct.unpack(f"<{n}q", index[34 + 4 * n : 34 + 12 * n])
    ends = struct.unpack(f"<{m}q", index[34 + 12 * n :])
    sequences = [
        list(struct.unpack(f"<{s}{letter}", data[p : p + s * width])) for s, p in zip(sizes, pointers, strict=True)
    ]
    assert len(data) == sum(sizes) * width
    return [joined(sequences[a:b]) for a, b in pairwise(ends)]


def documents_of(folder) -> list[list[int]]:
    """Every document of a shard folder, as the training reads it."""
    manifest = read_manifest(folder)
    reader = ShardReader(str(folder), manifest)
    shards = [reader.shard(number) for number in range(len(manifest.shards))]
    return [s.tokens[a:b].tolist() for s in shards for a, b in zip(s.starts[:-1], s.starts[1:], strict=True)]


# ---- tokenizers ----


@pytest.fixture(scope="session")
def large() -> Tokenizer:
    """70,000 words: ids need uint32. The last one is eos; there is no bos."""
    engine = Engine(models.WordLevel({f"w{i}": i for i in range(69_999)}, unk_token="w0"))
    engine.add_special_tokens([AddedToken("</s>", special=True)])
    return Tokenizer(engine, Settings({"eos_token": "</s>"}))


@pytest.fixture
def gpt2(tokenizer_folder) -> Tokenizer:
    """One token is both bos and eos."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    tokenizer._settings.names |= {"bos_token": "<|eos|>", "eos_token": "<|eos|>"}
    return tokenizer


def without(tokenizer_folder, *names: str) -> Tokenizer:
    tokenizer = Tokenizer.load(tokenizer_folder)
    for name in names:
        tokenizer._settings.names.pop(name)
    tokenizer._settings.stops = []
    return tokenizer


@pytest.fixture
def documents(corpus, tokenizer) -> list[list[int]]:
    """[bos] text [eos] of the small corpus."""
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    return [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_ids[0]] for text in texts]


@pytest.fixture
def shards(corpus, tokenizer, tmp_path) -> Path:
    """What `puna tokenize` makes of the corpus: three shards of four documents."""
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    folder, infos = tmp_path / "shards", []
    for number in range(3):
        encoded = encode_documents([Document("", text) for text in texts[4 * number : 4 * number + 4]], tokenizer)
        infos.append(write_shard(folder, f"shard-{number:06d}", encoded.shard, int(encoded.text_bytes.sum())))
    ids = (tokenizer.vocab_size, tokenizer.vocab_hash, tokenizer.bos_id, tokenizer.eos_ids[0])
    write_manifest(folder, Manifest("uint16", *ids, False, infos))
    return folder


# ---- Megatron ----


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("modes", [False, True])
def test_megatron_documents_are_their_sequences_joined(tokenizer, tmp_path, dtype, modes) -> None:
    documents = [[[1, 2], [3]], [[4, 5, 6, 7]], [[8], [9], [10, 100]], [[11]]]
    write_megatron(tmp_path / "m", documents, dtype, modes)
    figures = import_megatron(tmp_path / "m.idx", tokenizer, tmp_path / "out", shard_tokens=4)
    assert documents_of(tmp_path / "out") == [joined(document) for document in documents]
    assert (figures["tokens"], figures["documents"], figures["shards"], figures["left_out"]) == (12, 4, 3, {})
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.dtype, manifest.vocab_hash) == ("uint16", tokenizer.vocab_hash)
    assert manifest.sources[0]["dtype"] == dtype
    ShardReader.open(tmp_path / "out", tokenizer)  # is not refused


def test_empty_megatron_documents_are_left_out_and_counted(tokenizer, tmp_path) -> None:
    write_megatron(tmp_path / "m", [[[]], [[1, 2]], [], [[3], []], [[]]])
    figures = import_megatron(tmp_path / "m", tokenizer, tmp_path / "out")
    assert documents_of(tmp_path / "out") == [[1, 2], [3]]
    assert figures["left_out"] == {"empty": 3}


def test_megatron_in_and_out_is_the_same_bytes(tokenizer, large, documents, tmp_path) -> None:
    draw = np.random.default_rng(0)
    many = [draw.integers(0, 70_000, draw.integers(1, 90)).tolist() for _ in range(300)]
    for name, vocabulary, ids, dtype in (("a", tokenizer, documents, "uint16"), ("b", large, many, "int32")):
        write_megatron(tmp_path / name, [[document] for document in ids], dtype)
        figures = import_megatron(tmp_path / f"{name}.bin", vocabulary, tmp_path / name, shard_tokens=2000)
        assert figures["shards"] > 3
        exported = export_megatron(tmp_path / name, tmp_path / "exported" / name)
        assert exported["dtype"] == dtype
        for ending in ("bin", "idx"):
            ours = (tmp_path / "exported" / f"{name}.{ending}").read_bytes()
            assert ours == (tmp_path / f"{name}.{ending}").read_bytes()


def test_shards_through_megatron_keep_tokens_boundaries_and_text(tokenizer, shards, documents, tmp_path) -> None:
    figures = export_megatron(shards, tmp_path / "m")
    assert figures["paths"] == {"bin": f"{tmp_path}/m.bin", "idx": f"{tmp_path}/m.idx"}
    assert read_megatron(tmp_path / "m") == documents == documents_of(shards)
    import_megatron(tmp_path / "m", tokenizer, tmp_path / "again")
    assert documents_of(tmp_path / "again") == documents
    assert read_manifest(tmp_path / "again").text_bytes == read_manifest(shards).text_bytes


def damage(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


# 3 documents of 2, 3 and 1 uint16 ids: header 34, lengths 12, pointers 24, documents 32 = 102 bytes of .idx, 12 of .bin.
BAD = {
    "magic": (lambda i, b: damage(i, 0, b"X"), "is no Megatron index"),
    "empty index": (lambda i, b: i.write_bytes(b""), "is no Megatron index"),
    "cut header": (lambda i, b: i.write_bytes(i.read_bytes()[:20]), "20 bytes, not 34"),
    "version": (lambda i, b: damage(i, 9, b"\x02"), "version 2 and type code 8"),
    "float ids": (lambda i, b: damage(i, 17, b"\x07"), "version 1 and type code 7"),
    "cut index": (lambda i, b: cut(i, 1), "101 bytes, not 102"),
    "longer index": (lambda i, b: i.write_bytes(i.read_bytes() + b"\0\0"), "104 bytes, not 102"),
    "huge count": (lambda i, b: damage(i, 18, b"\xff" * 8), f"for its {2**64 - 1} sequences"),
    "negative length": (lambda i, b: damage(i, 34, struct.pack("<i", -2)), "sequence 0 has -2 tokens"),
    "pointer": (lambda i, b: damage(i, 46 + 8, struct.pack("<q", 6)), "sequence 1 has 3 tokens at byte 6, after 2"),
    "document order": (lambda i, b: damage(i, 70 + 8, struct.pack("<q", 3)), "not in order from 0 to 3"),
    "document end": (lambda i, b: damage(i, 70 + 24, struct.pack("<q", 9)), "from sequence 0 to 9"),
    "cut data": (lambda i, b: cut(b, 2), "10 bytes, not 12 for the 6 tokens"),
    "longer data": (lambda i, b: b.write_bytes(b.read_bytes() + b"\0\0"), "14 bytes, not 12"),
    "no index": (lambda i, b: i.unlink(), "m.idx does not exist"),
    "no data": (lambda i, b: b.unlink(), "m.bin does not exist"),
    "foreign id": (lambda i, b: damage(b, 8, b"\x40\x01"), "token 4 has id 320, the tokenizer has 320 tokens"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_megatron_files_are_refused_before_anything_is_written(tokenizer, tmp_path, what) -> None:
    write_megatron(tmp_path / "m", [[[1, 2]], [[3, 4, 5]], [[6]]])
    assert ((tmp_path / "m.idx").stat().st_size, (tmp_path / "m.bin").stat().st_size) == (102, 12)
    change, message = BAD[what]
    change(tmp_path / "m.idx", tmp_path / "m.bin")
    with pytest.raises(PunaError, match=message) as error:
        import_megatron(tmp_path / "m", tokenizer, tmp_path / "out")
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_negative_ids_and_files_without_tokens_are_refused(tokenizer, tmp_path) -> None:
    write_megatron(tmp_path / "m", [[[1, -5]]], "int32")
    with pytest.raises(PunaError, match="token 1 has id -5"):
        import_megatron(tmp_path / "m", tokenizer, tmp_path / "out")
    write_megatron(tmp_path / "e", [])
    with pytest.raises(PunaError, match="holds no tokens"):
        import_megatron(tmp_path / "e", tokenizer, tmp_path / "out")


# ---- nanoGPT ----


def write_ids(path: Path, ids: list[int], dtype: str = "uint16", header: tuple[int, ...] = ()) -> Path:
    head = struct.pack("<256i", *header, *[0] * (256 - len(header))) if header else b""
    path.write_bytes(head + np.array(ids, dtype=dtype).tobytes())
    return path


def test_nanogpt_in_and_out_is_the_same_bytes(tokenizer, large, documents, tmp_path) -> None:
    eos = large.eos_ids[0]
    for name, vocabulary, docs, dtype in (
        ("a", tokenizer, documents, "uint16"),
        ("b", large, [[3, 4, eos], [69_000, eos], [5] * 30], "uint32"),
    ):
        path = write_ids(tmp_path / f"{name}.bin", joined(docs), dtype)
        figures = import_tokens(path, vocabulary, tmp_path / name, shard_tokens=20)
        assert documents_of(tmp_path / name) == docs
        assert figures["sources"][0]["documents_by"] == "end after eos"
        export_nanogpt(tmp_path / name, tmp_path / "exported.bin")
        assert (tmp_path / "exported.bin").read_bytes() == path.read_bytes()
        (tmp_path / "exported.bin").unlink()


def test_shards_through_nanogpt_keep_tokens_boundaries_and_text(tokenizer, shards, documents, tmp_path, capsys) -> None:
    figures = export_nanogpt(shards, tmp_path / "n.bin")
    assert figures["unmarked_documents"] == 0
    ids = struct.unpack(f"<{figures['tokens']}H", (tmp_path / "n.bin").read_bytes())
    assert list(ids) == joined(documents)
    assert "cannot be seen" not in capsys.readouterr().err
    import_nanogpt(tmp_path / "n.bin", tokenizer, tmp_path / "again")
    assert documents_of(tmp_path / "again") == documents
    assert read_manifest(tmp_path / "again").text_bytes == read_manifest(shards).text_bytes


def test_boundaries_where_one_token_is_bos_and_eos(gpt2, tmp_path) -> None:
    e = gpt2.eos_ids[0]
    layouts = {
        "end after eos": [[9, 10, e], [11, e], [12]],
        "begin with eos": [[e, 9, 10], [e, 11], [e, 12, 13]],
        "stand between two eos": [[e, 9, 10, e], [e, 11, e]],
    }
    for number, (rule, documents) in enumerate(layouts.items()):
        path, out = write_ids(tmp_path / f"{number}.bin", joined(documents)), tmp_path / f"out{number}"
        figures = import_nanogpt(path, gpt2, out)
        assert figures["sources"][0]["documents_by"] == rule
        assert documents_of(out) == documents
        exported = export_nanogpt(out, tmp_path / f"again{number}.bin")
        assert (tmp_path / f"again{number}.bin").read_bytes() == path.read_bytes()
        assert exported["unmarked_documents"] == (1 if number == 0 else 0)  # its last document has no eos


def test_files_without_eos(tokenizer_folder, tokenizer, tmp_path, capsys) -> None:
    bos = tokenizer.bos_id
    path = write_ids(tmp_path / "bos.bin", [bos, 9, 10, bos, 11, bos, 12])
    import_nanogpt(path, tokenizer, tmp_path / "bos")
    assert documents_of(tmp_path / "bos") == [[bos, 9, 10], [bos, 11], [bos, 12]]
    assert export_nanogpt(tmp_path / "bos", tmp_path / "bos2.bin")["unmarked_documents"] == 0

    nothing = without(tokenizer_folder, "bos_token", "eos_token")
    path = write_ids(tmp_path / "none.bin", list(range(10, 20)))
    import_nanogpt(path, nothing, tmp_path / "none", shard_tokens=4)
    assert documents_of(tmp_path / "none") == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]
    assert "pieces of 4 tokens" in capsys.readouterr().err
    assert export_nanogpt(tmp_path / "none", tmp_path / "none2.bin")["unmarked_documents"] == 3
    assert "3 of 3 documents cannot be seen" in capsys.readouterr().err


@pytest.mark.parametrize(("header", "dtype"), [((20240520, 1, 6), "uint16"), ((20240801, 7, 6), "uint32")])
def test_llm_c_headers_are_recognised(tokenizer, tmp_path, header, dtype) -> None:
    eos = tokenizer.eos_ids[0]
    path = write_ids(tmp_path / "h.bin", [9, 10, eos, 11, 12, eos], dtype, header)
    figures = import_nanogpt(path, tokenizer, tmp_path / "out", dtype="uint16")  # the header knows better
    assert documents_of(tmp_path / "out") == [[9, 10, eos], [11, 12, eos]]
    assert (figures["sources"][0]["format"], figures["sources"][0]["dtype"]) == ("llm.c", dtype)


def test_bad_nanogpt_files_are_refused(tokenizer, tmp_path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(PunaError, match=message) as error:
            import_nanogpt(path, tokenizer, tmp_path / "out")
        assert error.value.hint
        assert not (tmp_path / "out").exists()

    refused(
        write_ids(tmp_path / "count.bin", [9, 10], header=(20240520, 1, 3)), "1028 bytes, not 1030 for the 3 tokens"
    )
    refused(write_ids(tmp_path / "version.bin", [9, 10], header=(20240520, 2, 2)), "header of version 2")
    refused(write_ids(tmp_path / "no.bin", [], header=(20240520, 1, 0)), "holds 0 bytes")
    refused(write_ids(tmp_path / "empty.bin", []), "holds 0 bytes")
    refused(write_ids(tmp_path / "odd.bin", [1, 2, 3], "uint8"), "3 bytes of ids, which is no whole number of uint16")
    refused(write_ids(tmp_path / "ids.bin", [1, 2, 400]), "token 2 has id 400, the tokenizer has 320 tokens")
    refused(tmp_path / "absent.bin", "does not exist")


def test_remote_files_and_bad_shard_sizes_are_refused(tokenizer, tmp_path) -> None:
    with pytest.raises(PunaError, match=r"s3://bucket/x\.bin is not on this machine"):
        import_nanogpt("s3://bucket/x.bin", tokenizer, tmp_path / "out")
    with pytest.raises(PunaError, match="--shard-tokens is 0"):
        import_nanogpt(write_ids(tmp_path / "a.bin", [1]), tokenizer, tmp_path / "out", shard_tokens=0)


# ---- whole or absent ----


def test_an_interrupted_import_has_no_manifest_and_is_not_mixed(tokenizer, tmp_path, monkeypatch) -> None:
    write_megatron(tmp_path / "m", [[[1, 2]], [[3, 4]], [[5, 6]]])
    write, seen = interchange.write_shard, []

    def interrupt(*arguments):
        seen.append(arguments[1])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(interchange, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_megatron(tmp_path / "m", tokenizer, tmp_path / "out", shard_tokens=2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["shard-000000.bin", "shard-000000.docs"]
    assert not is_shards(tmp_path / "out")
    with pytest.raises(PunaError, match="is not empty"):
        import_megatron(tmp_path / "m", tokenizer, tmp_path / "out")


def test_an_import_refuses_a_file_in_its_place(tokenizer, tmp_path) -> None:
    path = write_ids(tmp_path / "a.bin", [1, 2])
    with pytest.raises(PunaError, match=r"out is not empty|a\.bin is not empty"):
        import_nanogpt(path, tokenizer, path)
    (tmp_path / "empty").mkdir()
    import_nanogpt(path, tokenizer, tmp_path / "empty")  # an empty folder is fine


@pytest.mark.parametrize("export", [export_megatron, export_nanogpt])
def test_an_export_of_a_damaged_shard_leaves_nothing(shards, tmp_path, export) -> None:
    damage(shards / "shard-000002.bin", 100, b"\xff\x00")
    with pytest.raises(PunaError, match=r"shard-000002\.bin is damaged"):
        export(shards, tmp_path / "to" / "x.bin")
    assert list((tmp_path / "to").iterdir()) == []


def test_the_index_comes_after_the_whole_data(shards, tmp_path, monkeypatch) -> None:
    """A kill between the two leaves a .bin that no reader opens."""

    def killed(path, data):
        assert (tmp_path / "m.bin").stat().st_size == 2 * read_manifest(shards).tokens
        raise KeyboardInterrupt

    monkeypatch.setattr(interchange, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        export_megatron(shards, tmp_path / "m")
    assert not (tmp_path / "m.idx").exists()


def test_exports_do_not_overwrite(shards, tmp_path) -> None:
    for name in ("m.bin", "m.idx"):
        (tmp_path / name).write_bytes(b"old")
        with pytest.raises(PunaError, match=f"{name} exists already"):
            export_megatron(shards, tmp_path / "m")
        assert (tmp_path / name).read_bytes() == b"old"
        (tmp_path / name).unlink()
    (tmp_path / "n.bin").write_bytes(b"old")
    with pytest.raises(PunaError, match=r"n\.bin exists already"):
        export_nanogpt(shards, tmp_path / "n.bin")


def test_uint32_ids_for_nanogpt_come_with_a_notice(large, tmp_path, capsys) -> None:
    path = write_ids(tmp_path / "a.bin", [3, 69_999], "uint32")
    import_nanogpt(path, large, tmp_path / "out")
    export_nanogpt(tmp_path / "out", tmp_path / "b.bin")
    assert "holds uint32 ids, nanoGPT's own reader takes uint16" in capsys.readouterr().err


# ---- bytes of text ----


def byte_fallback() -> Tokenizer:
    """A little Llama 2: every text begins with a space that was not there; é is two bytes."""
    words = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "▁a", "▁b", "ab", "▁ab"]
    engine = Engine(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    engine.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    engine.decoder = decoders.Sequence(parts)
    return Tokenizer(engine, Settings({"bos_token": "<s>", "eos_token": "</s>"}))


def metaspace() -> Tokenizer:
    engine = Engine(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5}, []))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return Tokenizer(engine)


def shard_of(documents: list[list[int]]) -> Shard:
    starts = np.cumsum([0, *map(len, documents)])
    return Shard(np.array(joined(documents), dtype=np.uint16), starts.astype(np.int64))


def test_text_bytes_are_exact_for_every_kind_of_tokenizer(tokenizer) -> None:
    texts = ["def é(日本):\n", "", "  😀 ok\r\n", "<|eos|> as text"]
    framed = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_ids[0]] for text in texts]
    assert TextBytes(tokenizer)(shard_of(framed)) == sum(len(text.encode()) for text in texts)

    llama = byte_fallback()
    documents = [[1, 8, 9, 2], [11, 3, 4], [5, 5, 6], [1, 2], [6, 8], [3, 4, 2], [2]]
    expected = ["a b", "abé", " a", "", "a a", "é", ""]
    assert [llama.decode(d, skip_specials=True) for d in documents] == expected
    assert TextBytes(llama)(shard_of(documents)) == sum(len(text.encode()) for text in expected)

    assert metaspace().byte_lengths is None
    assert TextBytes(metaspace())(shard_of([[4, 5], [2, 4]])) == len("a b") + len("a a")


# ---- verify ----


def test_verify_returns_a_card(shards, tokenizer, tmp_path) -> None:
    manifest = read_manifest(shards)
    card = verify_shards(shards, tokenizer)
    assert (card["tokens"], card["documents"], card["shards"]) == (manifest.tokens, 12, 3)
    lengths = sorted(len(document) for document in documents_of(shards))
    assert (card["length_percentiles"]["1"], card["length_percentiles"]["100"]) == (lengths[0], lengths[-1])
    assert card["length_percentiles"]["50"] == lengths[5]
    assert card["best_fit_rows"]["1024"] == sum(info.bins["1024"] for info in manifest.shards)
    assert card["validation"] is None
    assert json.loads(json.dumps(card)) == card


def test_verify_names_every_problem(shards, tokenizer) -> None:
    damage(shards / "shard-000000.bin", 40, b"\xff\xff")
    cut(shards / "shard-000001.docs", 8)
    (shards / "shard-000002.bin").unlink()
    with pytest.raises(PunaError) as error:
        verify_shards(shards, tokenizer)
    message = error.value.message
    assert "3 problems" in message
    assert "shard-000000.bin is damaged: sha256" in message
    assert "shard-000001.docs has 32 bytes, the manifest says 40" in message
    assert "shard-000002.bin is gone" in message


def test_verify_reads_what_a_hash_cannot_tell(tmp_path) -> None:
    """Files that are as they were written, by a program that wrote them wrongly."""

    def problem(shard: Shard, **changes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        info = write_shard(folder, "shard-000000", replace(shard, starts=good), 10)
        write_file(
            join(folder, "shard-000000.docs"), shard.starts.tobytes() + (b"" if tags is None else tags.tobytes())
        )
        digest = hashlib.sha256(read_file(join(folder, "shard-000000.docs"))).hexdigest()
        info = replace(info, documents_sha256=digest, **changes)
        write_manifest(folder, Manifest("uint16", 20, "v" * 64, 0, 1, tags is not None, [info]))
        with pytest.raises(PunaError) as error:
            verify_shards(folder)
        return error.value.message

    good, tokens, tags = np.array([0, 3, 5, 9]), np.arange(9, dtype=np.uint16), None
    assert "from token 0 to 8, not from 0 to 9" in problem(Shard(tokens, np.array([0, 3, 5, 8])))
    assert "document 1 ends at token 2, before it begins at 3" in problem(Shard(tokens, np.array([0, 3, 2, 9])))
    assert "holds id 20, the vocabulary has 20 tokens" in problem(Shard(tokens + np.uint16(12), good))
    assert "have bits [1, 2, 1]" in problem(Shard(tokens, good), bits=[3])
    assert "best-fit rows" in problem(Shard(tokens, good), bins={"256": 7})
    tags = np.array([0, 3, 0], dtype=np.uint16)
    assert "document 1 has 2 tokens, but a tag of 3" in problem(Shard(tokens, good, tags))


def test_verify_refuses_another_tokenizer_and_a_folder_without_a_manifest(shards, large) -> None:
    with pytest.raises(PunaError, match="was tokenized with another tokenizer"):
        verify_shards(shards, large)
    (shards / "manifest.json").unlink()
    with pytest.raises(PunaError, match="never finished"):
        verify_shards(shards)


def test_verify_looks_into_validation(shards, tmp_path) -> None:
    held = shards / "validation"
    held.mkdir()
    write_folder(held, [Shard(np.arange(5, dtype=np.uint16), np.array([0, 5]))])
    assert verify_shards(shards)["validation"]["tokens"] == 5
    damage(held / "shard-000000.bin", 0, b"\x07")
    with pytest.raises(PunaError, match=r"validation/shard-000000\.bin is damaged"):
        verify_shards(shards)


def test_a_bucket_is_imported_to_verified_and_exported(tokenizer, documents, s3_bucket, tmp_path) -> None:
    write_megatron(tmp_path / "m", [[document] for document in documents])
    out = f"{s3_bucket}/shards"
    import_megatron(tmp_path / "m", tokenizer, out, shard_tokens=3000)
    card = verify_shards(out, tokenizer)
    assert (card["documents"], card["tokens"]) == (12, sum(map(len, documents)))
    assert [len(shard.tokens) for shard in read_shards(out, read_manifest(out))]
    export_megatron(out, tmp_path / "back")
    assert (tmp_path / "back.idx").read_bytes() == (tmp_path / "m.idx").read_bytes()
    with pytest.raises(PunaError, match="is not empty"):
        import_megatron(tmp_path / "m", tokenizer, out)
    data = bytearray(read_file(join(out, "shard-000001.bin")))
    data[10] ^= 1
    write_file(join(out, "shard-000001.bin"), bytes(data))
    with pytest.raises(PunaError, match=r"shard-000001\.bin is damaged"):
        verify_shards(out)


# ---- the command line ----


def puna(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "puna", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_three_verbs_from_a_shell(tokenizer_folder, shards, documents, tmp_path) -> None:
    exported = puna("shards", "export", shards, "--to", "megatron", "--out", tmp_path / "m", "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["documents"] == 12
    words = ("--tokenizer", tokenizer_folder, "--out", tmp_path / "again", "--json")
    imported = puna("shards", "import", tmp_path / "m.bin", *words)  # an .idx lies beside it
    assert json.loads(imported.stdout)["sources"][0]["format"] == "megatron"
    assert documents_of(tmp_path / "again") == documents
    verified = puna("shards", "verify", tmp_path / "again", "--tokenizer", tokenizer_folder)
    assert verified.returncode == 0
    assert "is whole" in verified.stdout
    damage(tmp_path / "again" / "shard-000000.bin", 0, b"\xff\xff")
    bad = puna("shards", "verify", tmp_path / "again", "--json")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "is damaged" in bad.stderr
    assert "hint" in bad.stderr
    assert "Traceback" not in bad.stderr
