"""weights/gguf*.py: models to GGUF and back, read alike by the gguf package, transformers and llama.cpp itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from puna.base.console import PunaError
from puna.engine.llm import LLM
from puna.engine.request import SamplingParams
from puna.model.rope import inverse_frequencies
from puna.model.spec import Rope, Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.weights.folder import empty_model
from puna.weights.gguf.file import GgufFile, write_gguf
from puna.weights.gguf.mix import MIXES, mix_named, types_of
from puna.weights.gguf.model import GgufSource, save_gguf, spec_of
from puna.weights.names import GGUF, names_on_disk

IDS = torch.arange(1, 33)
SMALL = Spec.preset("debug").replace(vocab_size=340, tie_word_embeddings=False)
WIDE = SMALL.replace(
    hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=4, sliding_windows=()
)  # room for K blocks
LLAMA3 = Rope("llama3", 500000.0, 8.0, 512, 64, 1.0, 4.0)
ANY_LLAMA3 = Rope("llama3", 10000.0, 32.0, 512, 100, 2.0, 5.0)
YARN = Rope("yarn", 10000.0, 4.0, 512, 128)
FAMILIES = {
    "llama": SMALL,
    "tied": SMALL.replace(tie_word_embeddings=True),
    "biases": SMALL.replace(qkv_bias=True, output_bias=True, mlp_bias=True),
    "wide_heads": SMALL.replace(head_dim=32),
    "mistral": SMALL.replace(model_type="mistral", sliding_windows=(512, 512)),
    "mistral_without_windows": SMALL.replace(model_type="mistral"),
    "qwen2": SMALL.replace(model_type="qwen2", qkv_bias=True),
    "qwen3": SMALL.replace(model_type="qwen3", qk_norm=True, head_dim=32, tie_word_embeddings=True),
    "llama3_rope": SMALL.replace(rope=LLAMA3, head_dim=64),
    "any_llama3_rope": SMALL.replace(rope=ANY_LLAMA3, head_dim=64),
    "linear_rope": SMALL.replace(rope=Rope("linear", 10000.0, 4.0, 512)),
    "yarn_rope": SMALL.replace(rope=YARN, head_dim=64),
    "yarn_attention": SMALL.replace(rope=Rope("yarn", 10000.0, 4.0, 512, 128, attention_factor=0.9), head_dim=64),
}
THEIRS = ("llama", "tied", "mistral", "qwen2", "qwen3")  # families that transformers reads from GGUF
QUANTIZED = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def made(spec: Spec, seed: int = 0) -> Transformer:
    """Random weights with logits far apart, norms and biases that are not their neutral values."""
    model = empty_model(spec, torch.float32, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        # Wide layers are kept small: large random ones multiply the rounding of llama.cpp's int8 activations.
        gain = 1 if "proj" in name and spec.hidden_size > 64 else 8
        parameter.data = parameter.data * gain if parameter.ndim > 1 else parameter.data + 0.2 * noise
    return model.eval()


def loaded(source: GgufSource) -> Transformer:
    model = empty_model(source.spec, torch.float32, torch.device("cpu"))
    parameters = dict(model.named_parameters())
    ours = {disk: name for name, disk in names_on_disk(parameters, source.table).items()}
    for disk, tensor in source.read():
        parameters[ours.pop(disk)].data.copy_(tensor)
    assert not ours
    return model.eval()


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS, torch.arange(len(IDS)), PackedCausal.of([len(IDS)])))


def saved(spec: Spec, path: Path, tokenizer=None, kind="F32", importance=None, seed=0) -> Transformer:
    model = made(spec, seed)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_gguf(path, spec, parameters.__getitem__, tokenizer, kind, importance)
    return model


def llama_cpp(jobs: list[dict], folder: Path) -> list[dict]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), str(folder / "jobs.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


needs_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with the xllamacpp wheel")


# --- our own round trip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_whole(family, tmp_path) -> None:
    spec = FAMILIES[family]
    model = saved(spec, tmp_path / "m.gguf")
    source = GgufSource(tmp_path / "m.gguf")
    again = loaded(source)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    found, expected = spec_of(source).to_config(), spec.to_config()
    scaling, original = found.pop("rope_scaling"), expected.pop("rope_scaling")
    assert found == expected
    frequencies = [inverse_frequencies(s.rope, s.head_dim) for s in (source.spec, spec)]
    torch.testing.assert_close(*frequencies, rtol=1e-4 if family == "any_llama3_rope" else 0, atol=0)
    if family != "any_llama3_rope":  # one function, but another of the many ways to write it
        assert (scaling or {}).keys() == (original or {}).keys()
        for key, value in (scaling or {}).items():
            assert value == (original[key] if isinstance(value, str) else pytest.approx(original[key], rel=1e-6)), key
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-3)


def test_reading_parts(tmp_path) -> None:
    saved(WIDE, tmp_path / "m.gguf", kind="Q4_K_M")
    source = GgufSource(tmp_path / "m.gguf")
    whole = dict(source.read())
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == source.shapes
    for name, tensor in whole.items():
        for box in ((slice(5, 29),), (slice(3, 40), slice(10, 50)), (), (slice(None), slice(2, 9))):
            if tensor.ndim >= len(box):
                assert torch.equal(source.read_box(name, box), tensor[box])
    assert source.type_of("blk.0.attn_q.weight") == "Q4_K"
    assert source.raw("blk.0.attn_q.weight").shape == (256, 144)


@pytest.mark.parametrize("kind", list(MIXES))
def test_the_gguf_package_reads_the_same(kind, tmp_path) -> None:
    """Types, shapes, bytes and numbers; bytes are what the package's own quantizer writes, where it has one."""
    saved(WIDE, tmp_path / "m.gguf", kind=kind)
    source = GgufSource(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }.keys() == source.metadata.keys()
    assert len(reader.tensors) == len(source.shapes)
    written = made(WIDE).state_dict()
    ours = {disk: name for name, disk in names_on_disk(written, GGUF).items()}
    for tensor in reader.tensors:
        name = tensor.name
        assert (tensor.tensor_type.name, tuple(tensor.shape)[::-1]) == (source.type_of(name), source.shapes[name])
        numbers = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        assert torch.equal(numbers, source._dequantize(name))
        if "K" not in tensor.tensor_type.name and not name.endswith(("attn_q.weight", "attn_k.weight")):
            data = gguf.quantize(written[ours[name]].numpy(), tensor.tensor_type)
            assert np.array_equal(data.reshape(-1).view(np.uint8), tensor.data.reshape(-1).view(np.uint8))


# --- mixes ------------------------------------------------------------------------------------------------------------


def test_mixes() -> None:
    """Choices of llama.cpp's src/llama-quant.cpp, worked out by hand for 32 layers."""
    spec = WIDE.replace(num_hidden_layers=32, sliding_windows=())
    with torch.device("meta"):
        shapes = {
            GGUF_NAME: tuple(p.shape)
            for GGUF_NAME, p in zip(
                names_on_disk(dict(Transformer(spec).named_parameters()), GGUF).values(),
                Transformer(spec).parameters(),
                strict=True,
            )
        }
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for mix, base in (("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")):
        types = types_of(spec, mix, shapes)
        for part in ("attn_v", "ffn_down"):
            assert [i for i in range(32) if types[f"blk.{i}.{part}.weight"] == "Q6_K"] == more
            assert {types[f"blk.{i}.{part}.weight"] for i in range(32) if i not in more} == {base}
        assert types["output.weight"] == "Q6_K"
        assert types["token_embd.weight"] == types["blk.5.attn_q.weight"] == types["blk.0.ffn_up.weight"] == base
        assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    types = types_of(spec, "Q4_K_S", shapes)
    for part in ("attn_v", "ffn_down"):
        assert [i for i in range(32) if types[f"blk.{i}.{part}.weight"] != "Q4_K"] == [0, 1, 2, 3]
        assert types[f"blk.0.{part}.weight"] == "Q5_K"
    assert set(types_of(spec, "Q8_0", shapes).values()) == {"Q8_0", "F32"}
    assert set(types_of(spec, "Q4_0", shapes).values()) == {"Q4_0", "Q6_K", "F32"}
    assert types_of(spec, "Q4_0", shapes, has_importance=True)["blk.3.ffn_down.weight"] == "Q4_1"
    tied = {name: shape for name, shape in shapes.items() if name != "output.weight"}
    assert types_of(spec, "Q4_K_M", tied)["token_embd.weight"] == "Q6_K"
    large = spec.replace(num_hidden_layers=80, sliding_windows=())
    values = {f"blk.{i}.attn_v.weight": (128, 256) for i in range(80)}
    assert set(types_of(large, "Q4_K_M", values).values()) == {"Q6_K", "Q5_K"}
    assert mix_named("q4_k") == "Q4_K_M"
    with pytest.raises(PunaError, match="'Q3_K_M' is no GGUF type"):
        mix_named("Q3_K_M")


@pytest.mark.parametrize(("width", "expected"), [(256, "Q4_K"), (96, "Q5_0"), (40, "F16")])
def test_formats_that_stand_in(width, expected) -> None:
    assert types_of(SMALL, "Q4_K_M", {"blk.0.ffn_up.weight": (8, width)})["blk.0.ffn_up.weight"] == expected
    head = {"Q4_K": "Q6_K", "Q5_0": "Q8_0", "F16": "F16"}[expected]
    assert types_of(SMALL, "Q4_K_M", {"output.weight": (8, width)})["output.weight"] == head
    assert types_of(SMALL, "Q4_0", {"blk.0.ffn_up.weight": (8, width)})["blk.0.ffn_up.weight"] == {"F16": "F16"}.get(
        expected, "Q4_0"
    )


def test_importance_reaches_its_layer(tmp_path) -> None:
    """Columns that count come back closer; q's and k's rows are reordered, their columns are not."""
    counts = torch.where(torch.arange(256) % 8 == 0, 100.0, 1.0)
    model = saved(WIDE, tmp_path / "plain.gguf", kind="Q4_K_S")
    saved(WIDE, tmp_path / "wise.gguf", kind="Q4_K_S", importance={"layers.3.attn.q_proj": counts})
    plain, wise = (loaded(GgufSource(tmp_path / f"{name}.gguf")) for name in ("plain", "wise"))
    errors = [
        ((m.layers[3].attn.q_proj.weight - model.layers[3].attn.q_proj.weight).square() * counts).sum()
        for m in (plain, wise)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert torch.equal(plain.layers[2].attn.q_proj.weight, wise.layers[2].attn.q_proj.weight)


# --- other programs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [*((f, "F32") for f in THEIRS), ("wide", "Q4_K_M"), ("wide", "Q5_0")])
def test_transformers_computes_the_same(family, kind, tmp_path, tokenizer, monkeypatch) -> None:
    """transformers 5.23 reads neither rotary scaling nor biases of a llama from GGUF files, so those are left out."""
    spec = {**FAMILIES, "wide": WIDE}[family].replace(vocab_size=max(340, tokenizer.vocab_size))
    spec = spec.replace(head_dim=128) if family == "qwen3" else spec  # transformers takes it for granted
    saved(spec, tmp_path / "m.gguf", tokenizer, kind)
    model = loaded(GgufSource(tmp_path / "m.gguf"))
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)  # asked for, not used
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert theirs.config.model_type == {"mistral": "llama"}.get(spec.model_type, spec.model_type)
    with torch.no_grad():
        assert (theirs(IDS[None]).logits[0] - logits(model)).abs().max() < 1e-4
    text = "def alpha_beta(alpha, beta=3):\n    return <|im_end|> x"
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert read(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, specials=True)


PROMPTS = [IDS.tolist(), [7, 300, 12, 5], [200], list(range(250, 270)), [3, 3, 3], [311, 44, 9]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tokenizer) -> dict[str, tuple[dict, Path]]:
    """{name: (llama.cpp's answer, file)} for every family in F32 and every format, from one process."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    for family, spec in FAMILIES.items():
        saved(spec, folder / f"{family}.gguf")
    for kind in QUANTIZED:
        saved(WIDE, folder / f"{kind}.gguf", tokenizer, kind)
    files = [folder / f"{name}.gguf" for name in (*FAMILIES, *QUANTIZED)]
    results = llama_cpp([{"file": str(file), "prompts": PROMPTS, "new_tokens": 8} for file in files], folder)
    return {file.stem: (result, file) for file, result in zip(files, results, strict=True)}


@needs_llama_cpp
@pytest.mark.parametrize("name", [*FAMILIES, *QUANTIZED])
def test_llama_cpp_answers_the_same(answers, name) -> None:
    """Logits and greedy tokens. llama.cpp's cache is fp16, its activations beside quantized weights are int8."""
    result, path = answers[name]
    assert "error" not in result, result["log"]
    model = loaded(GgufSource(path))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    tolerance, alike = (0.06 if name.startswith("Q") else 0.02), 0
    for prompt, tokens, theirs in zip(PROMPTS, result["answers"], result["logits"], strict=True):
        with torch.no_grad():
            positions = torch.arange(len(prompt))
            ours = model.logits(model(torch.tensor(prompt), positions, PackedCausal.of([len(prompt)])))[-1]
        assert (torch.tensor(theirs) - ours).abs().max() < tolerance * ours.std()
        answer = LLM.of(model, None).generate([prompt], params)[0]
        first = next((i for i in range(8) if answer.token_ids[i] != tokens[i]), 8)
        if first < 8:  # only a choice that was near a tie may fall the other way, and then the texts part
            likeliest = answer.top_logprobs[first].values()
            assert max(likeliest) - min(likeliest) < 2 * tolerance * ours.std()
        alike += first
    assert alike >= 36, f"only {alike} of 48 tokens were alike"


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (SMALL.replace(rope=Rope("dynamic", factor=2.0)), "no rope_type 'dynamic'"),
        (
            SMALL.replace(rope=Rope("yarn", factor=2.0, original_max_position_embeddings=64, truncate=False)),
            "truncation",
        ),
        (SMALL.replace(model_type="qwen2", qkv_bias=True, rope=LLAMA3), "qwen2 has no rope_type 'llama3'"),
        (SMALL.replace(model_type="qwen2"), "missing biases"),
        (SMALL.replace(model_type="qwen3", qk_norm=True, qkv_bias=True), "qkv_bias"),
        (SMALL.replace(sliding_windows=(64, 32)), "windows of"),
    ],
)
def test_models_that_llama_cpp_cannot_run(spec, match, tmp_path) -> None:
    with pytest.raises(PunaError, match=match):
        saved(spec, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_tensors_that_do_not_fit(tmp_path) -> None:
    parameters = {name: p.detach() for name, p in made(SMALL).named_parameters()}
    (tmp_path / "m.gguf").write_text("what was here before")
    bad = {**parameters, "layers.1.mlp.up_proj.weight": parameters["embed"]}
    with pytest.raises(PunaError, match=r"up_proj.weight has shape \[340, 64\]"):
        save_gguf(tmp_path / "m.gguf", SMALL, bad.__getitem__, None, "Q8_0")
    bad = {**parameters, "norm.weight": torch.full((64,), torch.inf)}
    with pytest.raises(PunaError, match="64 of 64 numbers"):
        save_gguf(tmp_path / "m.gguf", SMALL, bad.__getitem__, None, "Q8_0")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was here before"]


def rewritten(path: Path, changes: dict, drop: str = "") -> GgufSource:
    """The file once more with other metadata, or without some tensors."""
    source = GgufFile(path)
    metadata = {key: value for key, value in {**source.metadata, **changes}.items() if value is not None}
    entries = {name: (e.type, e.shape) for name, e in source.tensors.items() if not drop or drop not in name}
    write_gguf(path.with_name("other.gguf"), metadata, entries, source.raw)
    return GgufSource(path.with_name("other.gguf"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general.architecture": "gemma2"}, "architecture is 'gemma2'"),
        ({"llama.block_count": None}, "no key llama.block_count"),
        ({"llama.expert_count": 8}, "8 experts"),
        ({"llama.rope.dimension_count": 8}, "rotary turns 8 of 64 channels"),
        ({"llama.attention.value_length": 32}, "keys have 64 channels, values 32"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"llama.attention.head_count_kv": np.array([2, 4])}, "differ in num_key_value_heads"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.rope.freq_base": 1234.5}, "no scaling that puna knows"),
    ],
)
def test_files_that_puna_cannot_run(changes, match, tmp_path) -> None:
    saved(FAMILIES["llama3_rope"], tmp_path / "m.gguf")
    with pytest.raises(PunaError, match=match):
        rewritten(tmp_path / "m.gguf", changes)


def test_files_of_others(tmp_path) -> None:
    """Without the keys that only puna writes: Meta's own scaling is recognised, heads and widths follow."""
    meta = Rope("llama3", 500000.0, 8.0, 512, 8192)
    saved(SMALL.replace(rope=meta), tmp_path / "m.gguf")
    absent = ["rope.scaling.original_context_length", "attention.key_length", "attention.value_length", "vocab_size"]
    found = rewritten(tmp_path / "m.gguf", {f"llama.{key}": None for key in absent}).spec
    assert found == SMALL.replace(rope=meta)
    listed = {
        "llama.attention.head_count_kv": np.array([2, 2], np.int32),
        "llama.feed_forward_length": np.array([192, 192], np.uint32),
    }
    assert rewritten(tmp_path / "m.gguf", listed).spec == found
    assert rewritten(tmp_path / "m.gguf", {}, drop="rope_freqs").spec.rope == Rope(
        rope_theta=500000.0, max_position_embeddings=512
    )
