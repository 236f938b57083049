"""Published shapes by name, as their config.json or params.json would say it: only a table."""

from __future__ import annotations

from typing import Any

LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _meta(
    dim: int, layers: int, heads: int, kv_heads: int, multiple_of: int, ffn: float, **rest: Any
) -> dict[str, Any]:
    return {"dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads, "multiple_of": multiple_of,
            "ffn_dim_multiplier": ffn, "norm_eps": 1e-5, **rest}  # fmt: skip


def _llama2(*shape: Any) -> dict[str, Any]:
    return _meta(*shape, vocab_size=32000, rope_theta=10000.0, max_seq_len=4096)


def _llama3(*shape: Any, **rest: Any) -> dict[str, Any]:
    return _meta(*shape, vocab_size=128256, rope_theta=500000.0, **{"max_seq_len": 8192, **rest})


def _qwen3(hidden: int, layers: int, heads: int, ffn: int, tied: bool) -> dict[str, Any]:
    return {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": ffn,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
            "tie_word_embeddings": tied, "dtype": "bfloat16", "bos_token_id": 151643,
            "eos_token_id": 151645}  # fmt: skip


def _plain_llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> dict[str, Any]:
    """Llama 2's vocabulary and an untied head, as TinyLlama has them."""
    return {"model_type": "llama", "vocab_size": 32000, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def _rope(factor: float) -> dict[str, Any]:
    """Llama 3.1's and 3.2's scaling from 8,192 to 131,072 positions."""
    scaling = {**LLAMA3_ROPE, "factor": factor, "original_max_position_embeddings": 8192}
    return {"rope_scaling": scaling, "max_seq_len": 131072}


# In Meta's own terms (params.json): dim, layers, heads, kv heads, multiple_of, ffn_dim_multiplier.
META_PRESETS: dict[str, dict[str, Any]] = {
    "llama2_7b": _llama2(4096, 32, 32, 32, 256, 1.0),
    "llama2_13b": _llama2(5120, 40, 40, 40, 256, 1.0),
    "llama2_70b": _llama2(8192, 80, 64, 8, 4096, 1.3),
    "llama3_8b": _llama3(4096, 32, 32, 8, 1024, 1.3),
    "llama3_70b": _llama3(8192, 80, 64, 8, 4096, 1.3),
    "llama3_405b": _llama3(16384, 126, 128, 8, 4096, 1.2, **_rope(8.0)),
    "llama3.2_1b": _llama3(2048, 16, 32, 8, 256, 1.5, **_rope(32.0), tied=True),
    "llama3.2_3b": _llama3(3072, 28, 24, 8, 256, 1.0, **_rope(32.0), tied=True),
}

# In Hugging Face's terms (config.json).
HF_PRESETS: dict[str, dict[str, Any]] = {
    "qwen3_0.6b": _qwen3(1024, 28, 16, 3072, True),
    "qwen3_8b": _qwen3(4096, 36, 32, 12288, False),
    # Small enough to measure on a laptop: `puna bench`, benchmarks/engine.py.
    "bench_134m": _plain_llama(768, 12, 12, 12, 2048),
    "tinyllama_1.1b": _plain_llama(2048, 22, 32, 4, 5632),
    "debug": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}

NAMES = (*META_PRESETS, *HF_PRESETS)
