"""Name tables: what each tensor of our model is called on disk. One table per origin, used in both directions.

Llama, Mistral, Qwen2 and Qwen3 share Hugging Face's names; what a family lacks (biases, q/k norms) its model lacks too.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

# ours -> theirs; {i} is the layer, {end} is 'weight' or 'bias'.
HUGGINGFACE = {
    "embed": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.{end}": "lm_head.{end}",
    "layers.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.attn.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.attn.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "layers.{i}.attn.q_proj.{end}": "model.layers.{i}.self_attn.q_proj.{end}",
    "layers.{i}.attn.k_proj.{end}": "model.layers.{i}.self_attn.k_proj.{end}",
    "layers.{i}.attn.v_proj.{end}": "model.layers.{i}.self_attn.v_proj.{end}",
    "layers.{i}.attn.o_proj.{end}": "model.layers.{i}.self_attn.o_proj.{end}",
    "layers.{i}.mlp.gate_proj.{end}": "model.layers.{i}.mlp.gate_proj.{end}",
    "layers.{i}.mlp.up_proj.{end}": "model.layers.{i}.mlp.up_proj.{end}",
    "layers.{i}.mlp.down_proj.{end}": "model.layers.{i}.mlp.down_proj.{end}",
}

META = {
    "embed": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "lm_head.{end}": "output.{end}",
    "layers.{i}.attn_norm.weight": "layers.{i}.attention_norm.weight",
    "layers.{i}.mlp_norm.weight": "layers.{i}.ffn_norm.weight",
    "layers.{i}.attn.q_proj.{end}": "layers.{i}.attention.wq.{end}",
    "layers.{i}.attn.k_proj.{end}": "layers.{i}.attention.wk.{end}",
    "layers.{i}.attn.v_proj.{end}": "layers.{i}.attention.wv.{end}",
    "layers.{i}.attn.o_proj.{end}": "layers.{i}.attention.wo.{end}",
    "layers.{i}.mlp.gate_proj.{end}": "layers.{i}.feed_forward.w1.{end}",
    "layers.{i}.mlp.up_proj.{end}": "layers.{i}.feed_forward.w3.{end}",
    "layers.{i}.mlp.down_proj.{end}": "layers.{i}.feed_forward.w2.{end}",
}

GGUF = {
    "embed": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.{end}": "output.{end}",
    "layers.{i}.attn_norm.weight": "blk.{i}.attn_norm.weight",
    "layers.{i}.mlp_norm.weight": "blk.{i}.ffn_norm.weight",
    "layers.{i}.attn.q_norm.weight": "blk.{i}.attn_q_norm.weight",
    "layers.{i}.attn.k_norm.weight": "blk.{i}.attn_k_norm.weight",
    "layers.{i}.attn.q_proj.{end}": "blk.{i}.attn_q.{end}",
    "layers.{i}.attn.k_proj.{end}": "blk.{i}.attn_k.{end}",
    "layers.{i}.attn.v_proj.{end}": "blk.{i}.attn_v.{end}",
    "layers.{i}.attn.o_proj.{end}": "blk.{i}.attn_output.{end}",
    "layers.{i}.mlp.gate_proj.{end}": "blk.{i}.ffn_gate.{end}",
    "layers.{i}.mlp.up_proj.{end}": "blk.{i}.ffn_up.{end}",
    "layers.{i}.mlp.down_proj.{end}": "blk.{i}.ffn_down.{end}",
}

# Tensors that old checkpoints carry and that follow from the config: not an error when left over.
DERIVED = ("rotary_emb.inv_freq", "rope.freqs")


def names_on_disk(ours: Iterable[str], table: dict[str, str]) -> dict[str, str]:
    """{our parameter name: its name on disk}; a parameter without an entry is a KeyError (a hole in the table)."""
    return {name: _translate(name, table) for name in ours}


def _translate(name: str, table: dict[str, str]) -> str:
    parts = name.split(".")
    layer = parts[1] if parts[0] == "layers" else ""
    end = parts[-1]
    pattern = ".".join("{i}" if i == 1 and layer else part for i, part in enumerate(parts))
    found = table.get(pattern) or table[pattern.removesuffix(end) + "{end}"]
    return found.replace("{i}", layer).replace("{end}", end)


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of Meta's q and k, where rotary turns neighbours (0,1)(2,3).., reordered for halves (i, i + K/2).

    Shapes: weight (heads * K, D) or (heads * K,). Forgetting it gives fluent nonsense.
    """
    rows = weight.unflatten(0, (-1, head_dim // 2, 2))
    return rows.transpose(1, 2).reshape(weight.shape)


def pairs_from_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The way back: from halves (i, i + K/2) to neighbours (0,1)(2,3).., for Meta's and llama.cpp's rotary."""
    rows = weight.unflatten(0, (-1, 2, head_dim // 2))
    return rows.transpose(1, 2).reshape(weight.shape)
