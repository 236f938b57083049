"""`puna convert`: between every two formats the numbers and the token ids stay, and nothing is half written."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from puna.base.console import PunaError
from puna.cli.front import run
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.formats.kv import KV_INT8, KVScales
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.scheme import INT8, INT8_TOKEN, Scheme
from puna.serve import compare
from puna.serve.convert import Conversion, run_convert
from puna.text.tokenizer import Tokenizer
from puna.weights.folder import empty_model, load_model, save_model
from puna.weights.importance import read_importance
from puna.weights.meta import params_of
from puna.weights.model_files import find_spec, find_tokenizer
from puna.weights.quantization import LayerFormat
from puna.weights.quantized import to_stored
from puna.weights.tensor_file import TensorFile
from weights.quantized_models import logits, parameters_of, quantize, random_model, write

G32 = Scheme(4, "int", True, "group", 32)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(tied=False)


@pytest.fixture(scope="module")
def folders(model, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """The model plain, and in int4 groups of 32 with fp16 scales in each format."""
    home = tmp_path_factory.mktemp("formats")
    quantized = quantize(model, G32, scale_dtype=torch.float16)
    found = {"hf": save_model(model, home / "hf", tokenizer)}
    for format in ("compressed-tensors", "gptq", "gptq_v2", "awq"):
        found[format] = write(home / format, model, quantized, format, tokenizer=tokenizer)
    return found


def convert(source: Path, to: str, out: Path, **more) -> dict:
    return run_convert(Conversion(str(source), to, str(out), **more))


@pytest.mark.parametrize("source", ["compressed-tensors", "gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "gptq_v2", "awq"])
def test_packed_codes_are_moved(folders, tmp_path, source, to) -> None:
    """What comes out is what would have been written in that format at once, to the byte."""
    found = convert(folders[source], to, tmp_path / "m")
    assert (found["from"], found["to"], found["max_difference"]) == (source.removesuffix("_v2"), to, 0.0)
    assert found["tokenizer"].startswith("same ids")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "m" / name).read_bytes() == (folders[to] / name).read_bytes(), name
    assert sorted(map(str, (tmp_path / "m").iterdir())) == found["paths"]
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("source", ["hf", "compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_plain_targets(folders, tmp_path, source, to, tokenizer) -> None:
    """Logits of the result are those of the dequantized source; the tokenizer comes along."""
    out = tmp_path / ("m.gguf" if to == "gguf" else "m")
    found = convert(folders[source], to, out, type="F32")
    assert found["max_difference"] == 0.0
    assert torch.equal(logits(load_model(out)), logits(load_model(folders[source], dequantize=True)))
    words = find_tokenizer(out)
    assert words is not None
    assert words.encode(compare.SAMPLE) == tokenizer.encode(compare.SAMPLE)
    assert [file.name for file in tmp_path.iterdir()] == [out.name]
    if to == "hf":
        theirs = AutoModelForCausalLM.from_pretrained(out)(torch.arange(40)[None]).logits[0]
        assert (theirs - logits(load_model(out))).abs().max() < 1e-4


@pytest.mark.parametrize("source", ["gguf", "meta"])
def test_and_back(folders, tmp_path, source) -> None:
    there, back = tmp_path / "there.gguf" if source == "gguf" else tmp_path / "there", tmp_path / "back"
    convert(folders["hf"], source, there, type="F32")
    found = convert(there, "hf", back)
    assert (found["from"], found["max_difference"]) == (source, 0.0)
    assert torch.equal(logits(load_model(back)), logits(load_model(folders["hf"])))
    config = json.loads((back / "config.json").read_text())
    original = json.loads((folders["hf"] / "config.json").read_text())
    differs = {key for key in original if config.get(key) != original[key]}
    # Meta's file does not say these; a GGUF file says all but how the numbers were stored
    assert differs <= {"max_position_embeddings", "bos_token_id", "eos_token_id", "dtype", "torch_dtype",
                       "initializer_range", "pad_token_id"}  # fmt: skip


def test_gguf_is_rounded_and_says_by_how_much(folders, tmp_path) -> None:
    found = convert(folders["hf"], "gguf", tmp_path / "m.gguf", type="Q8_0")
    assert 0 < found["relative_error"] < 0.01
    assert 0 < found["max_difference"] < 0.02
    assert found["bytes_after"] < 0.4 * found["bytes_before"]


def test_smaller_dtype(folders, tmp_path) -> None:
    found = convert(folders["gptq"], "hf", tmp_path / "m", dtype="bfloat16")
    assert 0 < found["relative_error"] < 0.003
    assert Spec.load(tmp_path / "m").dtype == "bfloat16"


def test_what_plain_weights_cannot_say_is_said(model, tmp_path) -> None:
    scales = KVScales(KV_INT8, (torch.ones(1),) * 2, (torch.ones(1),) * 2)
    write(tmp_path / "q", model, quantize(model, INT8, INT8_TOKEN), kv=scales)
    notes = convert(tmp_path / "q", "hf", tmp_path / "m")["notes"]
    assert [any(word in note for note in notes) for word in ("inputs of layers", "KV cache")] == [True, True]
    assert load_model(tmp_path / "m").kv_scales is None


@pytest.mark.parametrize(
    ("source", "to", "message", "hint"),
    [
        ("hf", "gptq", "is not quantized; converting never rounds anew", "puna quantize .* --format gptq"),
        ("nothing", "hf", "no model at", "model folder"),
        ("empty", "hf", "no weights in", "expected"),
        ("fp32", "gptq", r"gptq keeps scales in float16: \d+ of 512 of layers.0.attn.q_proj.weight", "puna quantize"),
        ("int8", "awq", "awq cannot hold this model\n.*does not know int of 8 bits", "supported"),
        ("w8a8", "gptq", "inputs are never rounded", "supported"),
        ("kv", "gptq", "no place for scales of a quantized KV cache", "supported"),
        ("qwen2", "meta", "no place for biases", "--to hf"),
        ("broken.gguf", "hf", r"broken\.gguf", ""),
        ("hf", "zip", "converts to no 'zip'", "gguf"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(model, folders, tmp_path, source, to, message, hint) -> None:
    made = {
        "fp32": lambda out: write(out, model, quantize(model, G32)),
        "int8": lambda out: write(out, model, quantize(model, INT8, scale_dtype=torch.float16)),
        "w8a8": lambda out: write(out, model, quantize(model, INT8, INT8_TOKEN, scale_dtype=torch.float16)),
        "kv": lambda out: write(out, model, quantize(model, G32, scale_dtype=torch.float16), kv=KVScales(
            KV_INT8, (torch.ones(1),) * 2, (torch.ones(1),) * 2)),
        "qwen2": lambda out: save_model(random_model("qwen2"), out),
        "empty": lambda out: out.mkdir(),
        "broken.gguf": lambda out: out.write_bytes(b"GGUF" + bytes(40)),
    }  # fmt: skip
    if source in made:
        made[source](tmp_path / source)
    place = folders.get(source, tmp_path / source)
    before = {file.name for file in tmp_path.iterdir()}
    with pytest.raises(PunaError, match=message) as refused:
        convert(place, to, tmp_path / "out")
    assert re.search(hint, refused.value.hint)
    left = {file.name for file in tmp_path.iterdir()} - before
    assert not (tmp_path / "out").exists()
    assert left <= {"out.partial"}  # of a refusal in the middle: removed by the next try


def test_what_is_there_is_not_touched(folders, tmp_path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    (tmp_path / "m.gguf").write_text("x")
    for to, name in (("hf", "m"), ("meta", "m"), ("awq", "m"), ("gguf", "m.gguf")):
        with pytest.raises(PunaError, match="exists and is not empty"):
            convert(folders["gptq"], to, tmp_path / name)
    assert (tmp_path / "m.gguf").read_text() == (tmp_path / "m" / "precious").read_text() == "x"
    with pytest.raises(PunaError, match=r"does not end in \.gguf"):
        convert(folders["gptq"], "gguf", tmp_path / "other")


@pytest.mark.parametrize("to", ["hf", "gguf", "meta", "awq"])
def test_a_full_disk_leaves_nothing_half(folders, tmp_path, monkeypatch, to) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFile, "_write", full)
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / ("m.gguf" if to == "gguf" else "m")
    with pytest.raises(PunaError, match="the disk is full"):
        convert(folders["gptq"], to, out)
    assert not out.exists()


def test_other_numbers_are_found_before_the_result_has_its_name(folders, tmp_path, monkeypatch) -> None:
    """Some columns negated on their way: an error of ours that must not reach anyone."""
    plain = compare.plain

    def other(weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
        return plain(weight) * torch.where(torch.arange(plain(weight).shape[-1]) < 32, -1.0, 1.0)

    monkeypatch.setattr("puna.serve.convert.plain", other)
    for to in ("hf", "gguf", "meta"):
        with pytest.raises(PunaError, match="does not say what its source says: embed differs"):
            run_convert(Conversion(str(folders["awq"]), to, str(tmp_path / f"m.{to}"), "Q4_0"))
        assert not (tmp_path / f"m.{to}").exists()


def test_other_codes_are_found(folders, tmp_path, monkeypatch) -> None:
    def other(weight: QuantizedWeight, form: LayerFormat) -> dict[str, torch.Tensor]:
        tensors = to_stored(weight, form)
        tensors["qweight"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr("puna.weights.export.to_stored", other)
    with pytest.raises(PunaError, match=r"its source says: layers\.0\.attn\.q_proj\.weight differs"):
        convert(folders["compressed-tensors"], "gptq", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_words_are_found(folders, tmp_path, monkeypatch) -> None:
    class Other(Tokenizer):
        def encode(self, text: str, specials: bool = False, bos: bool = False) -> list[int]:
            return super().encode(text, specials, bos)[:-1]

    tokenizer = Tokenizer.load(folders["hf"])
    tokenizer.__class__ = Other
    monkeypatch.setattr("puna.serve.convert.find_tokenizer", lambda _: tokenizer)
    with pytest.raises(PunaError, match="does not split text"):
        convert(folders["hf"], "hf", tmp_path / "m")
    assert not (tmp_path / "m").exists()


KILLED = """
    import os, signal, sys
    from puna.serve import convert
    from puna.serve.convert import Conversion
    plain, calls = convert.plain, 0

    def killing(weight):
        global calls
        calls += 1
        if calls == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(weight)

    convert.plain = killing
    convert.run_convert(Conversion(*sys.argv[1:4]))
"""


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_killed_in_the_middle(folders, tmp_path, to) -> None:
    out = tmp_path / ("m.gguf" if to == "gguf" else "m")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folders["awq"]), to, str(out)]
    ended = subprocess.run(command, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    convert(folders["awq"], to, out, type="F32")
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("form", ["gguf", "old"])
def test_importance_matrices(folders, model, tmp_path, form) -> None:
    """Both of llama.cpp's formats; inputs that do not matter get the errors."""
    spec, calls = model.spec, 4
    sums = {f"blk.{i}.ffn_down.weight": torch.rand(256) ** 8 * 10 for i in range(2)}
    path = tmp_path / "imatrix"
    if form == "old":
        data = struct.pack("<i", 2)
        for name, values in sums.items():
            data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, 256)
            data += struct.pack("<256f", *values.tolist())
        path.write_bytes(data + struct.pack("<i", 4))
    else:
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(path, "imatrix")
        for name, values in sums.items():
            writer.add_tensor(f"{name}.in_sum2", values[None].numpy())
            writer.add_tensor(f"{name}.counts", torch.full((1, 1), float(calls)).numpy())
        for part in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
            getattr(writer, f"write_{part}")()
        writer.close()
    found = read_importance(path, spec)
    assert set(found) == {"layers.0.mlp.down_proj", "layers.1.mlp.down_proj"}
    assert torch.allclose(found["layers.1.mlp.down_proj"], sums["blk.1.ffn_down.weight"] / calls)
    convert(folders["hf"], "gguf", tmp_path / "m.gguf", type="Q4_K_S", imatrix=str(path))
    convert(folders["hf"], "gguf", tmp_path / "n.gguf", type="Q4_K_S")
    weight = parameters_of(model)["layers.0.mlp.down_proj.weight"]
    errors = []
    for name in ("m", "n"):
        got = parameters_of(load_model(tmp_path / f"{name}.gguf", dequantize=True))["layers.0.mlp.down_proj.weight"]
        errors.append(float(((got - weight).square() * found["layers.0.mlp.down_proj"]).sum()))
    assert errors[0] < errors[1]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PunaError):
        read_importance(path, spec)
    with pytest.raises(PunaError, match="no importance matrix at"):
        read_importance(tmp_path / "none", spec)


def test_meta_says_what_it_cannot(tmp_path) -> None:
    for name in ("llama3_8b", "llama3_70b", "llama3_405b", "llama3.2_1b"):
        spec = Spec.preset(name)
        again = Spec.from_params(params_of(spec))
        assert (again.intermediate_size, again.hidden_size) == (spec.intermediate_size, spec.hidden_size)
        assert again.rope.factor == spec.rope.factor
    spec = Spec.preset("debug")
    for change, word in (({"qkv_bias": True}, "biases"), ({"head_dim": 32}, "heads of width 32"),
                         ({"sliding_windows": (8, 8)}, "sliding window")):  # fmt: skip
        with pytest.raises(PunaError, match=word):
            params_of(spec.replace(**change))


def test_a_tied_head_is_written_out_for_meta(tmp_path) -> None:
    model = random_model()
    save_model(model, tmp_path / "hf")
    convert(tmp_path / "hf", "meta", tmp_path / "m")
    assert torch.equal(logits(load_model(tmp_path / "m")), logits(model))
    assert load_model(tmp_path / "m").lm_head is not None


def test_the_verb(folders, tmp_path, capsys) -> None:
    run(["convert", str(folders["gptq"]), "--to", "awq", "--out", str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert all(word in said for word in ("gptq", "every number as it was", "same ids"))
    run(["convert", str(tmp_path / "a"), "--to", "gguf", "--out", str(tmp_path / "a.gguf"), "--type", "Q8_0", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["paths"] == [str(tmp_path / "a.gguf")]
    assert 0 < found["relative_error"] < 0.01
    assert find_spec(tmp_path / "a.gguf").hidden_size == 128
    run(["convert", str(folders["hf"]), "--to", "hf", "--out", str(tmp_path / "b"), "--no-tokenizer"])
    assert not (tmp_path / "b" / "tokenizer.json").exists()


def test_bf16_models_stay_as_they_are(tmp_path) -> None:
    model = empty_model(Spec.preset("debug"), torch.bfloat16, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "hf")
    for to in ("hf", "meta"):
        assert convert(tmp_path / "hf", to, tmp_path / to / "m")["max_difference"] == 0.0
    assert Spec.load(tmp_path / "hf" / "m").dtype == "bfloat16"
