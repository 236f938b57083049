"""weights/adapter.py: PEFT's folders in and out, everything checked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.ops.attention import PackedCausal
from puna.weights.adapter import Adapter, Delta, read_adapter, save_adapter
from puna.weights.folder import load_model

SPEC = Spec.preset("debug")
SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (192, 64), "mlp.up_proj": (192, 64), "mlp.down_proj": (64, 192),
}  # fmt: skip
ALL = tuple(SHAPES)
# As PEFT 0.21 writes it for LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").
CONFIG = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "someone/a-model", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "v_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip


def pair(module: str, rank: int) -> dict[str, torch.Tensor]:
    """The two tensors of `2.self_attn.q_proj` (layer and module) under PEFT's names."""
    outputs, inputs = SHAPES[module.partition(".")[2]]
    name = f"base_model.model.model.layers.{module}"
    return {f"{name}.lora_A.weight": torch.randn(rank, inputs), f"{name}.lora_B.weight": torch.randn(outputs, rank)}


def tensors_of(modules, rank=8, layers=range(SPEC.num_hidden_layers)) -> dict[str, torch.Tensor]:
    return {name: t for i in layers for module in modules for name, t in pair(f"{i}.{module}", rank).items()}


def write(folder: Path, tensors, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


QV = ("self_attn.q_proj", "self_attn.v_proj")


def test_a_folder_as_peft_writes_it(tmp_path):
    tensors = tensors_of(QV)
    adapter = read_adapter(write(tmp_path / "a", tensors), SPEC)
    assert list(adapter.deltas) == sorted(f"layers.{i}.attn.{m}" for i in range(2) for m in ("q_proj", "v_proj"))
    delta = adapter.deltas["layers.1.attn.v_proj"]
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    assert torch.equal(delta.down_RK, tensors[f"{name}.lora_A.weight"])
    assert torch.equal(delta.up_NR, tensors[f"{name}.lora_B.weight"])
    assert (delta.rank, delta.scaling) == (8, 2.0)
    assert adapter.nbytes == sum(t.nbytes for t in tensors.values())
    merged = 2.0 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    torch.testing.assert_close(delta.weight(), merged)


def test_scaling_and_patterns(tmp_path):
    tensors = tensors_of(QV) | pair("1.self_attn.q_proj", 4)
    folder = write(
        tmp_path / "a", tensors, rank_pattern={"layers.1.self_attn.q_proj": 4}, alpha_pattern={"^.*v_proj": 2}
    )
    found = {name: (delta.rank, delta.scaling) for name, delta in read_adapter(folder, SPEC).deltas.items()}
    assert found == {"layers.0.attn.q_proj": (8, 2.0), "layers.0.attn.v_proj": (8, 0.25),
                     "layers.1.attn.q_proj": (4, 4.0), "layers.1.attn.v_proj": (8, 0.25)}  # fmt: skip
    rslora = read_adapter(write(tmp_path / "b", tensors_of(QV), use_rslora=True), SPEC)
    assert rslora.deltas["layers.0.attn.q_proj"].scaling == 16 / math.sqrt(8)


@pytest.mark.parametrize(
    ("modules", "layers", "changes"),
    [
        (ALL, (0, 1), {"target_modules": "all-linear"}),
        (("mlp.up_proj",), (0, 1), {"target_modules": r"model\.layers\.\d\.mlp\.(up)_proj"}),
        (("mlp.up_proj",), (1,), {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
        (("mlp.up_proj",), (1,), {"target_modules": ["up_proj"], "layers_to_transform": 1}),
        (("mlp.up_proj",), (0,), {"target_modules": ["model.layers.0.mlp.up_proj"]}),
        (("mlp.up_proj",), (0, 1), {"target_modules": ["up_proj", "down_proj"], "exclude_modules": ["down_proj"]}),
        (("mlp.up_proj",), (0,), {"target_modules": ["up_proj"], "exclude_modules": r".*\.1\..*"}),
        (("mlp.up_proj",), (0,), {"target_modules": None}),  # before PEFT wrote them down
    ],
)
def test_target_modules(tmp_path, modules, layers, changes):
    folder = write(tmp_path / "a", tensors_of(modules, layers=layers), **changes)
    assert len(read_adapter(folder, SPEC).deltas) == len(modules) * len(layers)
    if changes["target_modules"]:
        elsewhere = [module for module in ALL if module not in modules] or ["self_attn.q_proj"]
        other = tensors_of(modules, layers=layers) | tensors_of(elsewhere[:1], layers=(0,))
        with pytest.raises(PunaError, match=r"unnamed|lacks"):
            read_adapter(write(folder, other if len(modules) < 7 else tensors_of(ALL[:6]), **changes), SPEC)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_TENSORS = {
    "lora_B": lambda t: {n: x for n, x in t.items() if n != NAME.replace("_A", "_B")},
    "lora_A": lambda t: {n: x for n, x in t.items() if n != NAME},
    "lacks 1 modules of the 4": lambda t: {n: x for n, x in t.items() if "1.self_attn.v" not in n},
    r"\[4, 64\], not \[8, 64\]": lambda t: t | {NAME: torch.randn(4, 64)},
    r"\[8, 32\], not \[8, 64\]": lambda t: t | {NAME: torch.randn(8, 32)},
    r"\[512\], not": lambda t: t | {NAME: torch.randn(512)},
    "not finite": lambda t: t | {NAME: t[NAME].index_fill(0, torch.tensor([3]), float("nan"))},
    "finite": lambda t: t | {NAME: t[NAME] * float("inf")},
    "torch.int8": lambda t: t | {NAME: torch.ones(8, 64, dtype=torch.int8)},
    "DoRA": lambda t: t | {NAME.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)},
    "embed_tokens": lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.ones(512, 64)},
    "embedding_A": lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(8, 512)},
    "lm_head": lambda t: (
        t | {f"base_model.model.lm_head.lora_{x}.weight": torch.ones(s) for x, s in (("A", (8, 64)), ("B", (512, 8)))}
    ),
    "no part of a LoRA": lambda t: t | {"something": torch.ones(2)},
    "modules that the model lacks: model.layers.7": lambda t: t | tensors_of(QV, layers=(7,)),
    "no tensors": lambda t: {},
}


@pytest.mark.parametrize("says", BAD_TENSORS)
def test_broken_weights(tmp_path, says):
    folder = write(tmp_path / "a", BAD_TENSORS[says](tensors_of(QV)))
    with pytest.raises(PunaError, match=says) as caught:
        read_adapter(folder, SPEC)
    assert caught.value.hint


BAD_CONFIGS = {
    "IA3": {"peft_type": "IA3"},
    "None": {"peft_type": None},
    "biases": {"bias": "lora_only"},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "target_parameters": {"target_parameters": ["mlp.experts"]},
    "begins at certain tokens": {"alora_invocation_tokens": [5, 6]},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "the rank of .* is 2.5": {"r": 2.5},
    "the rank of .* is 0": {"r": 0},
    "not a number": {"lora_alpha": "16"},
    "True, not a number": {"r": True},
    "not an object": {"rank_pattern": ["q_proj"]},
    "no regular expression": {"target_modules": "*("},
    "r is no": {"rank_pattern": {"(": 2}},
    "not a list of names": {"target_modules": 7},
    "rank 16": {"r": 16},
}
BAD_CONFIGS["is no regular"] = BAD_CONFIGS.pop("r is no")


@pytest.mark.parametrize("says", BAD_CONFIGS)
def test_a_config_that_is_not_done_or_wrong(tmp_path, says):
    folder = write(tmp_path / "a", tensors_of(QV), **BAD_CONFIGS[says])
    with pytest.raises(PunaError, match=says) as caught:
        read_adapter(folder, SPEC)
    assert caught.value.hint


def test_files_that_are_missing_or_cut(tmp_path):
    with pytest.raises(PunaError, match="no adapter folder"):
        read_adapter(tmp_path / "none", SPEC)
    folder = write(tmp_path / "a", tensors_of(QV))
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for part in (b"", whole[:5], whole[:100], whole[:-9], b"\xff" * 64):
        weights.write_bytes(part)
        with pytest.raises(PunaError, match="not a whole safetensors file"):
            read_adapter(folder, SPEC)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(PunaError, match=r"only adapter_model\.bin"):
        read_adapter(folder, SPEC)
    for text, says in (("{", "not readable JSON"), ("[]", "holds no object"), ("\xff", "not readable JSON")):
        config.write_bytes(text.encode("latin-1"))
        with pytest.raises(PunaError, match=says):
            read_adapter(folder, SPEC)


def test_a_base_of_another_width(tmp_path):
    wide = SPEC.replace(hidden_size=128)
    with pytest.raises(PunaError, match=r"\[8, 64\], not \[8, 128\] \(rank 8, a layer of 128 inputs"):
        read_adapter(write(tmp_path / "a", tensors_of(QV)), wide)


def test_saving_and_reading_again(tmp_path):
    tensors = tensors_of(ALL) | pair("1.mlp.up_proj", 3)
    changes = {"target_modules": "all-linear", "rank_pattern": {"1.mlp.up_proj": 3}, "alpha_pattern": {"v_proj": 5}}
    adapter = read_adapter(write(tmp_path / "a", tensors, **changes), SPEC)
    again = read_adapter(save_adapter(adapter, tmp_path / "b", "the/base"), SPEC)
    assert again.digest == adapter.digest
    assert load_file(tmp_path / "b" / "adapter_model.safetensors").keys() == tensors.keys()
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, "the/base")
    assert config["rank_pattern"] == {"model.layers.1.mlp.up_proj": 3}
    assert set(config) <= set(CONFIG)


def test_the_digest_stands_for_what_is_computed():
    down, up = torch.randn(2, 8), torch.randn(4, 2)

    def digest(layer="layers.0.attn.q_proj", down=down, up=up, scaling=2.0) -> bytes:
        return Adapter.of({layer: Delta(down, up, scaling)}).digest

    nudged = up.clone()
    nudged[3, 1] += 1e-6
    assert digest() == digest(down=down.clone())
    others = [digest("layers.1.attn.q_proj"), digest(scaling=1.0), digest(up=nudged), digest(down=down.half())]
    assert len({digest(), *others}) == 5


@torch.no_grad()
def test_peft_computes_the_same_both_ways(model_folder, tmp_path):
    """PEFT's folder read here, and ours opened by PEFT, on the same base model."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    ids = torch.arange(5, 25)
    base = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM",
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 3},
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=ids[None]).logits[0]

    model = load_model(model_folder)
    plain = model.logits(model(ids, torch.arange(20), PackedCausal.of([20])))
    adapter = read_adapter(tmp_path / "theirs", model.spec)
    for name, delta in adapter.deltas.items():
        model.get_submodule(name).weight += delta.weight()
    merged = model.logits(model(ids, torch.arange(20), PackedCausal.of([20])))
    assert (plain - expected).abs().max() > 0.1
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)

    save_adapter(adapter, tmp_path / "ours", str(model_folder))
    again = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    opened = peft.PeftModel.from_pretrained(again, tmp_path / "ours")
    torch.testing.assert_close(opened(input_ids=ids[None]).logits[0], expected, rtol=1e-5, atol=1e-5)
