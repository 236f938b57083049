"""`puna tokenize`: the same bytes whatever the workers and the kills, and nothing half done is taken for whole."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from puna.__main__ import main
from puna.base.console import PunaError
from puna.base.files import list_files, read_file, write_file
from puna.corpus import blocks, tokenize, tokenize_job
from puna.corpus.blocks import STANDARD_LIBRARY, find_inputs
from puna.corpus.documents import Rules
from puna.corpus.encode import encode_documents
from puna.corpus.read_blocks import read_all
from puna.corpus.tokenize import tokenize_corpus
from puna.data import shards
from puna.data.shards import read_manifest
from puna.text.train_tokenizer import train_bpe

BLOCK = 1 << 16


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    """Many blocks of little text. Workers are told what to read, so this process is enough."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, tokenize):
            patch.setattr(module, "BLOCK", BLOCK)
        patch.setattr(blocks, "WIDE", 2 * BLOCK)
        yield


def write_corpus(folder: Path, size: int = 1_000_000) -> Path:
    """A file of every kind, with copies, near copies, blank and damaged documents."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("al", "be", "ga", "de", "ep", "ze") for b in ("pha", "ta", "mma", "lta", "na", "xi")]
    texts, total = [" ", "caf\u00e9 \u4e2d\u6587"], 0
    while total < size:
        text = texts[-1] if draw.random() < 0.1 else " ".join(draw.choices(words, k=draw.choice((3, 60, 400))))
        texts.append(text + "." if draw.random() < 0.05 else text)
        total += len(text)
    parts = [texts[i::5] for i in range(5)]
    (folder / "code").mkdir(parents=True)
    for number, text in enumerate(parts[0]):
        (folder / "code" / f"{number:03d}.txt").write_text(text)
    (folder / "large.md").write_text("\n".join(parts[1]))
    rows = [{"text": text, "url": f"https://{i % 3}.org/{i}"} for i, text in enumerate(parts[2])]
    (folder / "web.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"text": "cut')
    (folder / "zipped.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": t}) for t in parts[3]).encode())
    )
    pq.write_table(pa.table({"text": parts[4]}), folder / "wide.parquet")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("inputs") / "in")


@pytest.fixture
def run(tokenizer_folder, tmp_path):
    """tokenize_corpus into a folder of the test, of shards of 20,000 tokens, in this process."""

    def call(paths, out="out", **options) -> dict:
        paths = paths if isinstance(paths, list) else [paths]
        options = {"workers": 1, "shard_tokens": 20_000, **options}
        where = out if "://" in str(out) else tmp_path / out
        return tokenize_corpus(paths, tokenizer_folder, where, **options)

    return call


EVERYTHING = {"tag": True, "dedup": "near", "val_fraction": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(inputs, tokenizer_folder, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted run in one process writes with every option."""
    out = tmp_path_factory.mktemp("whole") / "out"
    tokenize_corpus([inputs], tokenizer_folder, out, workers=1, shard_tokens=20_000, **EVERYTHING)
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def documents_of(folder: Path) -> list[list[int]]:
    manifest, rows = read_manifest(folder), []
    for shard in manifest.shards:
        tokens = np.fromfile(folder / f"{shard.name}.bin", dtype=manifest.dtype)
        starts = np.fromfile(folder / f"{shard.name}.docs", dtype=np.int64, count=shard.documents + 1)
        rows += [part.tolist() for part in np.split(tokens, starts[1:-1])]
    return rows


# ---- what is written ----


def test_shards_hold_the_tokens_of_the_documents(run, inputs, tokenizer, tmp_path) -> None:
    figures = run(inputs)
    expected = encode_documents(read_all(find_inputs([inputs]), Rules()).documents, tokenizer)
    found = [token for row in documents_of(tmp_path / "out") for token in row]
    assert figures["documents"] == len(expected.text_bytes)
    assert figures["text_bytes"] == expected.text_bytes.sum()
    differ = abs(len(found) - len(expected.shard.tokens))
    assert differ <= 2 * (inputs / "large.md").stat().st_size // BLOCK  # at the seams of large.md
    assert found[:20_000] == expected.shard.tokens[:20_000].tolist()  # code/ comes first
    assert figures["left_out"]["empty"] == 1
    assert figures["left_out"]["broken lines"] == 1


def test_a_large_text_is_one_document_with_the_tokens_of_its_text(run, tokenizer, tmp_path) -> None:
    text = "\n".join(f"def alpha_{i}(beta):\n    return beta" for i in range(8000))
    (tmp_path / "large.py").write_text(text)
    run(tmp_path / "large.py", tag=True, dedup="near")
    tag = tokenizer.encode("large\n")
    expected = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tag, *tokenizer.encode(text)]
    assert documents_of(tmp_path / "out") == [expected + tokenizer.eos_ids[:1]]
    assert (tmp_path / "out" / "shard-000000.docs").read_bytes()[16:] == np.uint16(len(tag)).tobytes()


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(run, inputs, uninterrupted, workers, tmp_path) -> None:
    figures = run(inputs, workers=workers, **EVERYTHING)
    assert figures["workers"] == workers
    assert content(tmp_path / "out") == uninterrupted


def test_the_manifest_says_what_was_read(run, inputs, tmp_path) -> None:
    run([inputs / "code", inputs / "web.jsonl"])
    manifest = read_manifest(tmp_path / "out")
    code, web = manifest.sources
    assert code["path"] == str(inputs / "code")
    assert code["files"] == len(list((inputs / "code").iterdir()))
    assert code["bytes"] == sum(f.stat().st_size for f in (inputs / "code").iterdir())
    assert code["documents"] + web["documents"] == manifest.documents
    lines = [json.loads(line) for line in (tmp_path / "out" / "sources.jsonl").read_text().splitlines()]
    assert len(lines) == code["files"] + 1
    assert lines[-1] == {"path": web["path"], "bytes": web["bytes"], "documents": web["documents"]}
    assert sum(line["documents"] for line in lines) == manifest.documents
    assert not list((tmp_path / "out").glob("progress*"))


def test_validation_takes_its_share_and_nothing_twice(run, inputs, tmp_path) -> None:
    run(inputs, "all")
    figures = run(inputs, val_fraction=0.1)
    everything, train = documents_of(tmp_path / "all"), documents_of(tmp_path / "out")
    held = documents_of(tmp_path / "out" / "validation")
    assert sorted(train + held) == sorted(everything)
    assert not {tuple(row) for row in train} & {tuple(row) for row in held}  # nor do copies come apart
    different = len({tuple(row) for row in everything})
    assert len({tuple(row) for row in held}) == pytest.approx(0.1 * different, abs=4 * (0.09 * different) ** 0.5)
    assert figures["validation"]["documents"] == len(held)
    sources = read_manifest(tmp_path / "out" / "validation").sources
    assert sources[0]["documents"] == len(held)


def test_duplicates_are_counted(run, tmp_path) -> None:
    draw = random.Random(1)
    texts = [" ".join(draw.choices(("alpha", "beta", "gamma", "delta", "value"), k=200)) for _ in range(20)]
    near = [text.replace("alpha beta", "alpha, beta", 1) for text in texts[:5]]
    rows = [*texts, *near, *texts[:7], "short", "short"]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    assert run(tmp_path / "in.jsonl", "none")["documents"] == 34
    exact = run(tmp_path / "in.jsonl", "exact", dedup="exact")
    assert (exact["documents"], exact["left_out"]["exact duplicates"]) == (26, 8)
    both = run(tmp_path / "in.jsonl", "near", dedup="near")
    assert both["documents"] == 21
    assert (both["left_out"]["exact duplicates"], both["left_out"]["near duplicates"]) == (8, 5)
    assert (
        documents_of(tmp_path / "near") == documents_of(tmp_path / "exact")[:20] + documents_of(tmp_path / "exact")[-1:]
    )


def test_duplicates_among_documents_of_many_blocks(run, tmp_path) -> None:
    """A copy, one with a change in every part, and one that begins alike and goes on differently."""
    draw = random.Random(2)

    def lines(count: int) -> list[str]:
        return [" ".join(f"{draw.getrandbits(40):x}" for _ in range(9)) for _ in range(count)]

    text = lines(2000)
    edited = [line if i % 100 else "changed" for i, line in enumerate(text)]
    large = {"a": text, "b": text, "c": edited, "d": text[:700] + lines(1300)}
    (tmp_path / "in").mkdir()
    for name, content_lines in large.items():
        (tmp_path / "in" / f"{name}.txt").write_text("\n".join(content_lines))
    figures = run(tmp_path / "in", dedup="near")
    assert (figures["left_out"]["exact duplicates"], figures["left_out"]["near duplicates"]) == (1, 1)
    files = [json.loads(line) for line in (tmp_path / "out" / "sources.jsonl").read_text().splitlines()]
    assert [file["documents"] for file in files] == [1, 0, 0, 1]
    alike = tmp_path / "alike"
    alike.mkdir()
    (alike / "a.txt").write_text("\n".join(text))
    (alike / "b.txt").write_text("\n".join([*text[:-1], "another end"]))
    assert run(alike, "exact", dedup="exact")["documents"] == 2


def test_copies_are_known_whatever_their_tag(run, tmp_path) -> None:
    rows = [{"text": "the same text as before", "url": f"https://{host}.org"} for host in ("a", "longer")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(tmp_path / "in.jsonl", tag=True, dedup="exact")["documents"] == 1


def test_the_verb(inputs, tokenizer_folder, monkeypatch, capsys, tmp_path) -> None:
    """One JSON object on stdout, the summary and the next command on stderr; every flag reaches its option."""
    words = [
        "tokenize",
        str(inputs / "web.jsonl"),
        "--tokenizer",
        str(tokenizer_folder),
        "--out",
        str(tmp_path / "out"),
    ]
    words += ["--workers", "1", "--shard-tokens", "9999", "--tag", "--tag-field", "url", "--dedup", "exact", "--json"]
    monkeypatch.setattr(sys, "argv", ["puna", *words, "--val-fraction", "0.2", "--text-field", "text"])
    assert main() == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert {"tokens", "documents", "bytes_per_token", "shards", "left_out", "mb_per_s", "validation"} <= set(figures)
    assert f"puna train RECIPE.toml --data.shards {tmp_path / 'out'}" in err
    assert "left out: broken lines" in err
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert {"shard_tokens": 9999, "tag": True, "tag_field": "url", "dedup": "exact"}.items() <= settings.items()
    assert (settings["val_fraction"], settings["strict"]) == (0.2, False)
    monkeypatch.setattr(sys, "argv", ["puna", *words, "--strict"])
    assert main() == 2
    assert "strict: False then, True now" in capsys.readouterr().err


# ---- a job that is killed goes on ----

SCRIPT = """  # slowed down, so that the kill comes before the end
import sys, time
from puna.corpus import blocks, tokenize
blocks.BLOCK = tokenize.BLOCK = 1 << 16
blocks.WIDE = 2 << 16
plain = tokenize.Job.add
tokenize.Job.add = lambda *arguments: (time.sleep(0.03), plain(*arguments))
tokenize.tokenize_corpus([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2, shard_tokens=20_000, tag=True,
                         dedup="near", val_fraction=0.1)
"""


def start(inputs: Path, tokenizer_folder: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(inputs), str(tokenizer_folder), str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def descendants(process: int) -> list[int]:
    children = [int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def is_alive(process: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("lines", [1, 3, 6])
def test_killed_and_started_again(inputs, tokenizer_folder, run, uninterrupted, lines, tmp_path) -> None:
    """SIGKILL when the journal has so many lines; then the same work with another number of workers."""
    out = tmp_path / "out"
    job = start(inputs, tokenizer_folder, out)
    journal = out / "progress.jsonl"
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= lines)
    workers = descendants(job.pid)
    job.kill()
    job.communicate(timeout=60)
    assert not (out / "manifest.json").exists()
    with pytest.raises(PunaError, match=r"never finished|holds no manifest"):
        read_manifest(out)
    kept = {name: data for name, data in content(out).items() if name.startswith("shard-00000") and lines > 1}
    assert run(inputs, workers=1, **EVERYTHING)["resumed"] == (lines > 1)
    assert content(out) == uninterrupted
    assert all(uninterrupted[name] == data for name, data in kept.items())
    wait_until(lambda: not any(map(is_alive, workers)))  # nobody told them to end


def test_ctrl_c_does_not_reach_the_workers(inputs, tokenizer_folder, uninterrupted, tmp_path) -> None:
    """A terminal sends it to all processes; the workers leave it to the main one."""
    out = tmp_path / "out"
    job = start(inputs, tokenizer_folder, out)
    wait_until(lambda: (out / "progress.jsonl").exists() and (out / "shard-000000.bin").exists())
    for worker in descendants(job.pid):
        os.kill(worker, signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    assert content(out) == uninterrupted


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Ctrl-C at the block of that number."""
    plain, taken = tokenize_job.Job.add, []

    def add(self, block, result) -> None:
        taken.append(block)
        if len(taken) > after:
            raise KeyboardInterrupt
        plain(self, block, result)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize_job.Job, "add", add)
        yield


def test_killed_twice_with_a_cut_line_and_a_lost_shard(inputs, run, uninterrupted, tmp_path) -> None:
    out = tmp_path / "out"
    for after in (9, 4):
        with interrupted(after):
            run(inputs, **EVERYTHING)
        with open(out / "progress.jsonl", "a") as journal:
            journal.write('{"after": [3, 1], "shard": {"na')
        (out / ".shard-000009.bin.123.tmp").write_bytes(b"cut")
    last = sorted(out.glob("shard-*.bin"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    assert run(inputs, **EVERYTHING)["resumed"]
    assert content(out) == uninterrupted


@pytest.mark.parametrize("name", ["validation/shard-000001.docs", "sources.jsonl", "settings.json", "/manifest.json"])
def test_killed_while_it_finishes(inputs, run, uninterrupted, name, tmp_path) -> None:
    """The writes of the end are all done again."""

    def write(path, data) -> None:
        if str(path).endswith(f"out/{name.strip('/')}"):
            raise KeyboardInterrupt
        write_file(path, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for module in (tokenize_job, shards):
            patch.setattr(module, "write_file", write)
        run(inputs, **EVERYTHING)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(inputs, **EVERYTHING)["resumed"]
    assert content(tmp_path / "out") == uninterrupted


def test_killed_before_the_journal_is_gone(inputs, run, uninterrupted, tmp_path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_job.Journal, "close", lambda self: None)
        run(inputs, **EVERYTHING)
    assert list((tmp_path / "out").glob("progress*"))
    run(inputs, **EVERYTHING)
    assert content(tmp_path / "out") == uninterrupted


def test_ctrl_c_keeps_finished_shards_and_ends_with_130(inputs, tokenizer_folder, tmp_path) -> None:
    command = [sys.executable, "-m", "puna", "tokenize", STANDARD_LIBRARY, "--tokenizer", str(tokenizer_folder)]
    command += ["--out", str(tmp_path / "out"), "--workers", "2", "--shard-tokens", "100000"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    journal = tmp_path / "out" / "progress.jsonl"
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 2)
    os.killpg(job.pid, signal.SIGINT)  # as the terminal does: to the workers, too
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "finished shards are kept; run the same command to go on" in err
    assert "Traceback" not in err


def test_a_worker_that_dies_is_one_clear_error(inputs, run, tmp_path) -> None:
    class Deadly(blocks.Block):
        def __reduce__(self):
            return os._exit, (9,)

    plain = blocks.plan

    def plan(*arguments):
        for number, block in enumerate(plain(*arguments)):
            yield Deadly(**vars(block)) if number == 4 else block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "plan", plan)
        with pytest.raises(PunaError, match="a worker process died") as caught:
            run(inputs, workers=2)
    assert "fewer than 2 --workers" in caught.value.hint
    assert run(inputs, workers=1)["documents"]


# ---- what is refused ----


def test_an_output_that_is_whole_is_left_alone(run, inputs, capsys, tmp_path) -> None:
    first = run(inputs)
    before = content(tmp_path / "out")
    again = run(inputs)
    assert "is whole already" in capsys.readouterr().err
    assert again["tokens"] == first["tokens"]
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("whole", [True, False])
def test_other_settings_files_or_tokenizer_are_refused(run, inputs, whole, tmp_path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_bytes((inputs / "web.jsonl").read_bytes())
    with nullcontext() if whole else interrupted(2):
        run(source)
    for options, what in (
        ({"dedup": "exact"}, "dedup: none then, exact now"),
        ({"shard_tokens": 30_000}, "shard_tokens: 20000 then, 30000 now"),
        ({"tag": True}, "tag: False then, True now"),
    ):
        with pytest.raises(PunaError, match=what) as caught:
            run(source, **options)
        assert f"delete {tmp_path / 'out'}" in caught.value.hint
    train_bpe(["other words " * 9], 270).save(tmp_path / "other")
    with pytest.raises(PunaError, match=r"tokenizer: .* then, .* now"):
        tokenize_corpus([source], tmp_path / "other", tmp_path / "out", workers=1, shard_tokens=20_000)
    (source / "b.txt").write_text("one more")
    with pytest.raises(PunaError, match=r"inputs: files 1, bytes .* then, files 2"):
        run(source)


def test_a_folder_with_something_else_in_it_is_refused(run, inputs, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(PunaError, match=r"is not empty: it holds thesis.tex"):
        run(inputs)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(PunaError, match="file"):
        run(inputs, "file")


def test_two_jobs_do_not_write_one_folder(run, inputs, tmp_path) -> None:
    with (
        tokenize.only_writer(str(tmp_path / "out")),
        pytest.raises(PunaError, match="another puna tokenize is writing"),
    ):
        run(inputs)


def test_nothing_to_tokenize(run, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(PunaError, match="no files in"):
        run(tmp_path / "in")
    (tmp_path / "in" / "blank.txt").write_text(" \n")
    (tmp_path / "in" / "binary.bin").write_bytes(b"\0\1")
    with pytest.raises(PunaError, match=r"no text in .*: 2 files, 1 binary files, 1 empty"):
        run(tmp_path / "in")
    assert content(tmp_path / "out") == {}
    (tmp_path / "in" / "a.txt").write_text("text")
    with pytest.raises(PunaError, match="all 1 documents fell into validation"):
        run(tmp_path / "in", val_fraction=0.999999)
    with pytest.raises(PunaError, match="does not exist"):
        run(tmp_path / "nowhere")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_refused_line_is_named_from_the_beginning_of_its_file(run, workers, tmp_path) -> None:
    lines = [json.dumps({"text": "alpha beta " * 50})] * 1000 + ['{"body": "x"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(PunaError, match=r"in.jsonl:1001 has no field 'text'") as caught:
        run(tmp_path / "in.jsonl", workers=workers)
    assert caught.value.hint == "its fields are body; for instance --text-field body"


def test_a_refused_line_is_named_after_an_interruption(run, tmp_path) -> None:
    lines = [json.dumps({"text": "alpha beta " * 50})] * 1000 + ['{"body": "x"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with interrupted(4):
        run(tmp_path / "in.jsonl")
    with pytest.raises(PunaError, match=r"in.jsonl:1001 has no field 'text'"):
        run(tmp_path / "in.jsonl")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_source_deleted_meanwhile(run, inputs, monkeypatch, workers, tmp_path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in "ab":
        (source / f"{name}.jsonl").write_bytes((inputs / "web.jsonl").read_bytes())
    plain = tokenize.plan

    def plan(*arguments):
        for number, block in enumerate(plain(*arguments)):
            if number == 2:
                (source / "b.jsonl").unlink()
            yield block

    monkeypatch.setattr(tokenize, "plan", plan)
    with pytest.raises(PunaError, match=r"b.jsonl vanished while it was read"):
        run(source, workers=workers)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_options_out_of_range(run, inputs) -> None:
    for options in (
        {"val_fraction": 1.0},
        {"shard_tokens": 0},
        {"workers": -1},
        {"dedup": "fuzzy"},
        {"tag_field": "x"},
    ):
        name = "--" + next(iter(options)).replace("_", "-")
        with pytest.raises(PunaError, match=name):
            run(inputs, **options)


def test_strict_refuses_what_is_else_counted(run, inputs) -> None:
    with pytest.raises(PunaError, match=r"web.jsonl:\d+ is not a line of JSON"):
        run(inputs, strict=True)


# ---- object stores ----


@pytest.mark.parametrize("workers", [1, 2])
def test_from_and_to_a_bucket(run, inputs, s3_bucket, workers, tmp_path) -> None:
    for name in ("large.md", "web.jsonl", "zipped.jsonl.gz", "wide.parquet", "code/000.txt", "code/001.txt"):
        write_file(f"{s3_bucket}/in/{name}", (inputs / name).read_bytes())
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes((inputs / name).read_bytes())
    run(tmp_path / "in", "local", dedup="near", val_fraction=0.1)
    out = f"{s3_bucket}/out"
    with interrupted(7):
        run(f"{s3_bucket}/in", out, workers=workers, dedup="near", val_fraction=0.1)
    assert run(f"{s3_bucket}/in", out, workers=workers, dedup="near", val_fraction=0.1)["resumed"]
    found = {info.path.removeprefix(f"{out}/"): read_file(info.path) for info in list_files(out) if info.size}
    shards = {name: data for name, data in found.items() if "shard-" in name}
    assert shards == {name: data for name, data in content(tmp_path / "local").items() if "shard-" in name}
    assert not [name for name in found if name.startswith("progress")]
    assert read_manifest(out).documents == read_manifest(tmp_path / "local").documents
