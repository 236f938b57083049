"""weights/gguf/packed.py: a GGUF file runs as it is stored, with the numbers of its dequantized self."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from puna.model.linear import QuantizedLinear
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.weights.folder import empty_model, load_model
from puna.weights.gguf.mix import MIXES
from puna.weights.gguf.model import GgufSource, save_gguf

SPEC = Spec.preset("debug").replace(
    vocab_size=340, hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=4, sliding_windows=(),
    tie_word_embeddings=False,
)  # fmt: skip
IDS = torch.arange(1, 33)
QUANTIZED = [kind for kind in MIXES if kind not in ("F32", "F16", "BF16")]


def saved(path: Path, kind: str, spec: Spec = SPEC) -> Path:
    model = empty_model(spec, torch.float32, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        gain = 1 if "proj" in name else 8
        parameter.data = parameter.data * gain if parameter.ndim > 1 else parameter.data + 0.2 * noise
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return save_gguf(path, spec, parameters.__getitem__, None, kind)


@torch.no_grad()
def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids, torch.arange(len(ids)), PackedCausal.of([len(ids)])))


@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in MIXES), ("Q4_K_M", True), ("Q8_0", True)])
def test_numbers_are_those_of_the_dequantized_model(kind, tied, tmp_path) -> None:
    """Few rows (the native kernels) and many; the llama architecture's q and k are reordered on the way."""
    spec = SPEC.replace(tie_word_embeddings=tied, qkv_bias=True)
    path = saved(tmp_path / "m.gguf", kind, spec)
    packed, plain = load_model(path), load_model(path, dequantize=True)
    layers = {name for name, module in packed.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == (29 if kind in QUANTIZED else 0)
    for name in layers - {"lm_head"}:
        assert torch.equal(packed.get_submodule(name).dequantize(), plain.get_submodule(name).weight)
    assert torch.equal(packed.head_weight, plain.head_weight)
    for ids in (IDS, IDS[:3]):
        expected = logits(plain, ids)
        assert (logits(packed, ids) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_other_architectures_keep_their_rows(tmp_path) -> None:
    path = saved(tmp_path / "m.gguf", "Q4_K_M", SPEC.replace(model_type="qwen2", qkv_bias=True))
    packed, plain = load_model(path), load_model(path, dequantize=True)
    assert (logits(packed, IDS[:3]) - logits(plain, IDS[:3])).abs().max() < 1e-5 * logits(plain, IDS[:3]).abs().max()


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0"])
def test_memory_is_the_files(kind, tmp_path) -> None:
    path = saved(tmp_path / "m.gguf", kind, SPEC.replace(intermediate_size=2048))
    model = load_model(path)
    layers = sum(module.nbytes for module in model.modules() if isinstance(module, QuantizedLinear))
    plain = sum(parameter.nbytes for name, parameter in model.named_parameters() if name != "embed")
    assert layers + plain < 1.15 * path.stat().st_size
    assert model.embed.dtype is torch.float32


def test_blocks_are_the_mapped_file(tmp_path) -> None:
    """But for q and k of the llama architecture, whose rows are moved."""
    path = saved(tmp_path / "m.gguf", "Q4_K_M")
    model = load_model(path)
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines if line.endswith(str(path))]

    def is_mapped(layer: QuantizedLinear) -> bool:
        return any(begin <= layer.weight.data.data_ptr() < end for begin, end in spans)

    attention, mlp = model.layers[1].attn, model.layers[1].mlp
    assert is_mapped(attention.o_proj)
    assert is_mapped(mlp.down_proj)
    assert not is_mapped(attention.q_proj)
    path.unlink()  # replaced by another file, the old one lives on until the model goes
    assert logits(model, IDS).isfinite().all()


def test_a_tied_head_is_read_packed(tmp_path) -> None:
    path = saved(tmp_path / "m.gguf", "Q4_K_M", SPEC.replace(tie_word_embeddings=True))
    model = load_model(path, "bfloat16")
    assert isinstance(model.lm_head, QuantizedLinear)
    assert GgufSource(path).type_of("token_embd.weight") == "Q6_K"
    assert model.lm_head.bits_per_weight < 7
    assert model.embed.dtype is torch.bfloat16
    assert logits(model, IDS).dtype is torch.bfloat16
    assert {name for name, _ in model.named_parameters() if "lm_head" in name} == set()  # saved once, as the embedding


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with the xllamacpp wheel")
def test_llama_cpp_answers_the_same(tmp_path) -> None:
    """Greedy tokens and logits; llama.cpp's cache is fp16, and its activations beside quantized weights are int8."""
    kinds, prompts = ("Q4_K_M", "Q8_0", "Q5_1"), [IDS.tolist(), [7, 300, 12, 5], [200]]
    files = [saved(tmp_path / f"{kind}.gguf", kind) for kind in kinds]
    (tmp_path / "jobs.json").write_text(
        json.dumps([{"file": str(file), "prompts": prompts, "new_tokens": 6} for file in files])
    )
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), str(tmp_path / "jobs.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    alike = 0
    for file, result in zip(files, json.loads(done.stdout), strict=True):
        model = load_model(file)
        for prompt, tokens, theirs in zip(prompts, result["answers"], result["logits"], strict=True):
            ours = logits(model, torch.tensor(prompt))[-1]
            assert (torch.tensor(theirs) - ours).abs().max() < 0.06 * ours.std()
            alike += _greedy_alike(model, prompt, tokens, 0.12 * float(ours.std()))
    assert alike >= 42, f"only {alike} of 54 tokens were alike"


def _greedy_alike(model: Transformer, prompt: list[int], tokens: list[int], tie: float) -> int:
    """How many greedy tokens agree; where they part the choice must have been near a tie."""
    for count, token in enumerate(tokens):
        top = logits(model, torch.tensor(prompt + tokens[:count]))[-1].topk(2)
        if int(top.indices[0]) != token:
            assert float(top.values[0] - top.values[1]) < tie
            return count
    return len(tokens)
