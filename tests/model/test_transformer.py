"""Our Transformer against transformers', family by family, on random weights: logits, gradients, caches, packing."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

import puna
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.basic import cross_entropy
from puna.ops.paged import PagedCausal, Pages
from puna.weights.folder import hf_state

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 112, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def rope(**parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": 1e4, **parameters}}


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama2": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "llama3": LlamaConfig(**SHAPE, **rope(rope_type="default", rope_theta=5e5)),
    "llama3.1": LlamaConfig(**SHAPE, **rope(**LLAMA3)),
    "llama3.2": LlamaConfig(**SHAPE, **rope(**LLAMA3), tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": LlamaConfig(**SHAPE, head_dim=24),
    "mistral": MistralConfig(**SHAPE, sliding_window=20),
    "mistral-no-window": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "linear": LlamaConfig(**SHAPE, **rope(rope_type="linear", factor=4.0)),
    "yarn": LlamaConfig(**SHAPE, **rope(**YARN)),
    "yarn-mscale": LlamaConfig(**SHAPE, **rope(**YARN, mscale=1.0, mscale_all_dim=0.5, truncate=False)),
    "dynamic": LlamaConfig(**{**SHAPE, "max_position_embeddings": 48}, **rope(rope_type="dynamic", factor=3.0)),
    "dynamic-short": LlamaConfig(**SHAPE, **rope(rope_type="dynamic", factor=3.0)),
}
TOKENS = 80


def randomize(model: torch.nn.Module) -> None:
    """Biases and norms too: transformers starts them at 0 and 1, where a wrong one would not show."""
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.15)
        if parameter.ndim == 1:
            parameter.data += 1.0


def run(model: Transformer, ids_T: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids_T, torch.arange(len(ids_T)), PackedCausal.of([len(ids_T)])))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name: str, tmp_path) -> None:
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").float()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = puna.load_model(tmp_path)
    ids_T = torch.randint(0, 96, (TOKENS,))
    expected = theirs(ids_T[None], use_cache=False).logits[0]
    logits = run(ours, ids_T)
    assert (logits - expected).abs().max() <= 1e-4

    target = torch.randint(0, 96, (TOKENS,))
    torch.nn.functional.cross_entropy(expected, target, reduction="sum").backward()
    hidden = ours(ids_T, torch.arange(TOKENS), PackedCausal.of([TOKENS]))
    cross_entropy(hidden, ours.head_weight, target, chunk=17)[0].backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters()}
    from_ours = dict(zip(hf_state(ours), ours.parameters(), strict=True))
    assert wanted.keys() == from_ours.keys()
    for parameter_name, gradient in wanted.items():
        error = (from_ours[parameter_name].grad - gradient).norm() / gradient.norm()
        assert error <= 1e-4, parameter_name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 7])
def test_cached_decoding_equals_full_recomputation(name: str, chunk: int) -> None:
    spec = Spec.from_config(CONFIGS[name].to_dict())
    model = Transformer(spec)
    randomize(model)
    ids_T = torch.randint(0, 96, (64,))
    pages = Pages.of(spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim, 9, page_size=8)
    pieces = []
    with torch.no_grad():
        full = run(model, ids_T)
        for start in range(0, 64, chunk):
            piece = ids_T[start : start + chunk]
            attend = PagedCausal.of(pages, [(range(1, 9), start, len(piece))], max_len=64)
            pieces.append(model.logits(model(piece, torch.arange(start, start + len(piece)), attend)))
    assert (torch.cat(pieces) - full).abs().max() <= 1e-5 * full.abs().max()


def test_packed_documents_do_not_see_each_other() -> None:
    model = Transformer(Spec.preset("debug"))
    model.init_weights()
    lengths = [5, 9, 9, 1, 30]
    documents = [torch.randint(0, 512, (n,)) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = model(torch.cat(documents), positions, PackedCausal.of(lengths))
    alone = [model(d, torch.arange(len(d)), PackedCausal.of([len(d)])) for d in documents]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-6)

    documents[1] = torch.randint(0, 512, (9,))  # a neighbour changes: nobody else may
    changed = model(torch.cat(documents), positions, PackedCausal.of(lengths))
    same = torch.ones(sum(lengths), dtype=torch.bool)
    same[5:14] = False
    assert torch.equal(changed[same], packed[same])


def test_meta_device_costs_no_memory() -> None:
    with torch.device("meta"):
        model = Transformer(Spec.preset("llama3_405b"))
    assert sum(p.numel() for p in model.parameters()) == Spec.preset("llama3_405b").num_params()


def test_same_seed_same_weights() -> None:
    first, second = (puna.load_model("preset:debug", seed=3) for _ in range(2))
    other = puna.load_model("preset:debug", seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embed, other.embed)
