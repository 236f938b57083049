"""The writer of quantized folders: whole or absent, and continued after any interruption."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puna.base.console import PunaError
from puna.model.transformer import Transformer
from puna.ops.formats.scheme import Scheme
from puna.text.tokenizer import Tokenizer
from puna.weights import export, parts
from puna.weights.export import QuantizedWriter, check_space
from puna.weights.folder import load_model
from puna.weights.holding import linear_shapes, stored_bytes
from puna.weights.quantization import layer_format
from puna.weights.tensor_file import TensorFile
from weights.quantized_models import logits, parameters_of, parts_of, quantize, random_model, write

G32 = Scheme(4, "int", True, "group", 32)
CONFIG = {"weights": "int4_g32"}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(tied=False)


@pytest.fixture(scope="module")
def pieces(model) -> dict[str, dict]:
    """{part: {name: tensor or quantized weight}}."""
    quantized = quantize(model, G32)
    return {
        part: {name: quantized.get(name.removesuffix(".weight"), tensor) for name, tensor in tensors.items()}
        for part, tensors in parts_of(parameters_of(model)).items()
    }


def writer(out: Path, model: Transformer, **options) -> QuantizedWriter:
    return QuantizedWriter(out, model.spec, None, config=CONFIG, **options)


def test_a_whole_folder(model, pieces, tokenizer, tmp_path) -> None:
    with QuantizedWriter(tmp_path / "m", model.spec, tokenizer, config=CONFIG) as out:
        for part, tensors in pieces.items():
            out.add(part, tensors)
        staged = out.stage(provenance={"source": "here"})
        assert torch.equal(logits(load_model(staged)), logits(load_model(staged)))
        assert not (tmp_path / "m").exists()
        out.finish(provenance={"source": "here"})
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "puna_quant.json"} <= names
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert json.loads((tmp_path / "m" / "puna_quant.json").read_text()) == {"config": CONFIG, "source": "here"}
    again = Tokenizer.load(tmp_path / "m")
    assert again.encode("def f(x):") == tokenizer.encode("def f(x):")
    assert again.chat_template == tokenizer.chat_template


def test_large_models_stay_in_several_files(model, pieces, tmp_path) -> None:
    for largest in (10**9, 1000):
        with writer(tmp_path / str(largest), model, largest=largest) as out:
            for part, tensors in reversed(pieces.items()):  # the order of adding does not matter
                out.add(part, tensors)
            out.finish()
    files = sorted(file.name for file in (tmp_path / "1000").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    whole = load_file(tmp_path / "1000000000" / "model.safetensors")
    cut = {name: tensor for file in files for name, tensor in load_file(tmp_path / "1000" / file).items()}
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    index = json.loads((tmp_path / "1000" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert "model.embed_tokens.weight" in load_file(tmp_path / "1000" / files[0])
    assert torch.equal(logits(load_model(tmp_path / "1000")), logits(load_model(tmp_path / "1000000000")))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from weights.quantized_models import parameters_of, parts_of, quantize, random_model
    from puna.ops.formats.scheme import Scheme
    from puna.weights import tensor_file
    from puna.weights.export import QuantizedWriter

    model = random_model(tied=False)
    quantized = quantize(model, Scheme(4, "int", True, "group", 32))
    writes, plain = 0, tensor_file.TensorFile._write

    def write(self, data):
        global writes
        writes += 1
        if writes == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, data)

    tensor_file.TensorFile._write = write
    with QuantizedWriter(Path({out!r}), model.spec, None, config={config!r}) as out:
        for part, tensors in parts_of(parameters_of(model)).items():
            out.add(part, {{n: quantized.get(n.removesuffix(".weight"), t) for n, t in tensors.items()}})
        out.finish()
"""


@pytest.mark.parametrize(("at", "done"), [(4, 1), (40, 2), (62, 5)])
def test_killed_and_continued(model, pieces, tmp_path, at, done) -> None:
    """In the embedding's neighbour, in the second block, while all is merged: the result has the same bytes."""
    tests = str(Path(__file__).parent.parent)
    code = textwrap.dedent(KILLED.format(tests=tests, at=at, out=str(tmp_path / "m"), config=CONFIG))
    ended = subprocess.run([sys.executable, "-c", code], timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
    with writer(tmp_path / "m", model) as out:
        assert out.done() == list(pieces)[:done]
        assert out.done_layers() == set(range(min(2, done - 1)))
        for part, tensors in pieces.items():
            if part not in out.done():
                out.add(part, tensors)
        out.finish()
    with writer(tmp_path / "other", model) as out:
        for part, tensors in pieces.items():
            out.add(part, tensors)
        out.finish()
    for file in (tmp_path / "other").iterdir():
        assert (tmp_path / "m" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_line_cut_short_counts_as_not_written(model, pieces, tmp_path) -> None:
    names = list(pieces)
    with writer(tmp_path / "m", model) as out:
        for part in names[:2]:
            out.add(part, pieces[part])
    journal = tmp_path / "m.partial" / parts.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    with writer(tmp_path / "m", model) as out:
        assert out.done() == names[:1]
        out.add(names[1], pieces[names[1]])
    with writer(tmp_path / "m", model) as out:
        assert out.done() == names[:2]


def test_a_part_may_be_written_again(model, pieces, tmp_path) -> None:
    """The walk's own state is a step behind when it is killed between the two."""
    with writer(tmp_path / "m", model) as out:
        for part, tensors in pieces.items():
            out.add(part, tensors)
        changed = {"norm.weight": torch.full((128,), 2.0)}
        out.stage()
        out.add("norm", changed)
        out.finish()
    assert torch.equal(load_model(tmp_path / "m").norm.weight, changed["norm.weight"])


def test_what_is_there_is_never_overwritten(model, tmp_path) -> None:
    (tmp_path / "m").mkdir()
    writer(tmp_path / "m", model).__exit__()  # an empty folder may be taken
    (tmp_path / "m" / "precious").write_text("x")
    with pytest.raises(PunaError, match="exists and is not empty"):
        writer(tmp_path / "m", model)
    assert (tmp_path / "m" / "precious").read_text() == "x"


def test_another_model_does_not_continue_it(model, pieces, tmp_path) -> None:
    with writer(tmp_path / "m", model) as out:
        out.add("embed", pieces["embed"])
    other = random_model("qwen2")
    with pytest.raises(PunaError, match="interrupted run with another spec, config") as refused:
        QuantizedWriter(tmp_path / "m", other.spec, None, config={"weights": "int8"})
    assert "remove" in refused.value.hint
    with writer(tmp_path / "m", model, resume=False) as out:
        assert out.done() == []


def test_a_damaged_part_is_found(model, pieces, tmp_path) -> None:
    with writer(tmp_path / "m", model) as out:
        out.add("embed", pieces["embed"])
    file = tmp_path / "m.partial" / "embed.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(PunaError, match=r"embed\.safetensors is not what was written"):
        writer(tmp_path / "m", model)


def test_one_writer_at_a_time(model, tmp_path) -> None:
    with writer(tmp_path / "m", model), pytest.raises(PunaError, match="another process is writing"):
        writer(tmp_path / "m", model)


def test_a_full_disk(model, pieces, tmp_path, monkeypatch) -> None:
    """The part that did not fit is taken away; the others are used when there is space again."""
    plain, written = TensorFile._write, 0

    def write_some(self, data) -> None:
        nonlocal written
        written += len(data)
        if written > 300_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, data)

    monkeypatch.setattr(TensorFile, "_write", write_some)
    names = list(pieces)
    with writer(tmp_path / "m", model) as out:
        out.add(names[0], pieces[names[0]])
        with pytest.raises(PunaError, match="the disk is full"):
            out.add(names[1], pieces[names[1]])
    assert {file.name for file in (tmp_path / "m.partial").iterdir()} == {parts.JOURNAL, f"{names[0]}.safetensors"}
    monkeypatch.undo()
    with writer(tmp_path / "m", model) as out:
        for part in names[1:]:
            out.add(part, pieces[part])
        out.finish()
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_too_little_space_is_found_beforehand(model, tmp_path, monkeypatch) -> None:
    layers = dict.fromkeys(linear_shapes(model.spec), layer_format("compressed-tensors", G32))
    write(tmp_path / "m", model, quantize(model, G32, None, {"lm_head": G32}))
    needed = stored_bytes(layers, model.spec, 4, 4)
    there = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert needed < there < needed + 12_000  # the header
    assert check_space(tmp_path / "new" / "m", needed) == 2 * needed
    assert check_space(tmp_path / "new" / "m", needed, more=5, largest=1000) == needed + 5
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: _Usage())
    with pytest.raises(PunaError, match=r"needs .* MiB, 1000 B are free|needs .*, 1000 B are free"):
        check_space(tmp_path / "m2", needed)


class _Usage:
    free = 1000


def test_a_layer_the_format_cannot_hold_is_refused_when_it_comes(model, pieces, tmp_path) -> None:
    five = quantize(model, Scheme(5))["layers.0.attn.q_proj"]
    with QuantizedWriter(tmp_path / "m", model.spec, None, "gptq") as out, pytest.raises(PunaError, match="of 5 bits"):
        out.add("layer-0000", {"layers.0.attn.q_proj.weight": five})
