"""The shape of a model: one frozen dataclass, read from every family's config.json and written back to it.

A family difference is a field here, never a branch on a name in the model.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.base.console import PunaError
from puna.base.storage import read_json
from puna.model.presets import HF_PRESETS, META_PRESETS, NAMES

# model_type in config.json -> the architecture transformers builds for it.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """Frequencies of a rotary embedding, in config.json's terms.

    `rope_type`: default (plain), linear, dynamic (NTK), yarn or llama3; the fields below `factor` belong to the last
    two. `max_position_embeddings` is the trained length, used by dynamic (and by yarn when `factor` is 0).
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # 0: from mscale, mscale_all_dim and factor
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True)
class Spec:
    """Everything that decides a dense Llama-family model's function. Names are config.json's.

    `sliding_windows` holds one entry per layer: the window in tokens, or None for full attention.
    Raises PunaError from the constructor when the numbers cannot make a model.
    """

    model_type: str = "llama"
    vocab_size: int = 512
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 192
    rms_norm_eps: float = 1e-5
    rope: Rope = field(default_factory=Rope)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_hidden_layers)
        for problem, hint in _problems(self):
            raise PunaError(problem, hint)

    @staticmethod
    def load(path_or_preset: str | Path) -> Spec:
        """From a model folder, a config.json / params.json file, `preset:NAME` or a bare preset name."""
        name = str(path_or_preset)
        path = Path(name)
        if name.startswith("preset:") or (name in NAMES and not path.exists()):
            return Spec.preset(name.removeprefix("preset:"))
        if path.is_dir():
            found = [path / n for n in ("config.json", "params.json") if (path / n).exists()]
            if not found:
                raise PunaError(f"{path} holds neither config.json nor params.json", "point at a model folder")
            path = found[0]
        elif not path.exists():
            known = difflib.get_close_matches(name, NAMES, 1) or ["debug"]
            raise PunaError(f"no model at {name}", f"give a model folder, or a preset such as preset:{known[0]}")
        config = read_json(path)
        return Spec.from_params(config) if "dim" in config else Spec.from_config(config)

    @staticmethod
    def preset(name: str) -> Spec:
        """A published shape by its name."""
        if name in META_PRESETS:
            return Spec.from_params(META_PRESETS[name])
        if name in HF_PRESETS:
            return Spec.from_config(HF_PRESETS[name])
        near = difflib.get_close_matches(name, NAMES, 1)
        raise PunaError(
            f"no preset is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            f"presets: {', '.join(NAMES)}",
        )

    @staticmethod
    def from_config(config: dict[str, Any]) -> Spec:
        """Read Hugging Face's config.json, in the spelling of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
        _refuse_unsupported(config)
        try:
            return _read_config(config)
        except KeyError as error:
            raise PunaError(
                f"config.json has no {error.args[0]!r}", "restore the file from the model's source"
            ) from error

    @staticmethod
    def from_params(params: dict[str, Any]) -> Spec:
        """Read Meta's params.json: the feed-forward width follows from `multiple_of` and `ffn_dim_multiplier`."""
        heads = params["n_heads"]
        max_len = params.get("max_seq_len", 2048)
        scaling = params.get("rope_scaling") or _meta_scaling(params)
        rope = _read_rope({"rope_theta": params.get("rope_theta", 10000.0), "rope_scaling": scaling}, max_len)
        return Spec(
            vocab_size=params["vocab_size"],
            hidden_size=params["dim"],
            num_hidden_layers=params["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=params.get("n_kv_heads") or heads,
            head_dim=params["dim"] // heads,
            intermediate_size=_ffn_width(params),
            rms_norm_eps=params.get("norm_eps", 1e-5),
            rope=rope,
            tie_word_embeddings=params.get("tied", False),
            dtype="bfloat16",
            **(_LLAMA3_IDS if params["vocab_size"] == 128256 else {"bos_token_id": 1, "eos_token_ids": (2,)}),
        )

    def to_config(self) -> dict[str, Any]:
        """The config.json that transformers 4 and 5, vLLM and llama.cpp's converter read."""
        eos = list(self.eos_token_ids)
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            **{name: getattr(self, name) for name in _SAME_NAME},
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "max_position_embeddings": self.max_len,
            "rope_theta": self.rope.rope_theta,
            "rope_scaling": _write_rope(self.rope),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": self.dtype,
            "dtype": self.dtype,
            "use_cache": True,
        }
        return config | _write_family(self)

    @property
    def max_len(self) -> int:
        """Longest sequence the positions were made for (max_position_embeddings)."""
        return self.rope.max_position_embeddings

    def group_params(self) -> dict[str, int]:
        """Parameters by group; a tied head counts once, under 'embedding'."""
        d, kv, q = self.hidden_size, self.num_key_value_heads * self.head_dim, self.num_attention_heads * self.head_dim
        attention = d * (q + 2 * kv) + q * d
        attention += (q + 2 * kv) * self.qkv_bias + d * self.output_bias
        mlp = 3 * d * self.intermediate_size + (2 * self.intermediate_size + d) * self.mlp_bias
        norms = 2 * d + 2 * self.head_dim * self.qk_norm
        return {
            "embedding": self.vocab_size * d,
            "attention": attention * self.num_hidden_layers,
            "mlp": mlp * self.num_hidden_layers,
            "norms": norms * self.num_hidden_layers + d,
            "lm_head": 0 if self.tie_word_embeddings else self.vocab_size * d,
        }

    def num_params(self) -> int:
        """All parameters, tied ones once."""
        return sum(self.group_params().values())

    def active_matmul_params(self) -> int:
        """Weights a token is multiplied by: all but the embedding table (a look-up); a tied head counts."""
        groups = self.group_params()
        return groups["attention"] + groups["mlp"] + groups["norms"] + self.vocab_size * self.hidden_size

    def flops_per_token(self, length: int) -> int:
        """Training FLOPs per token at sequence length T: 6 N + 12 L H Q T, N without the embedding look-up.

        Convention of PaLM appendix B (arXiv:2204.02311) and nanoGPT: attention over the full square, not its causal
        half; forward only is a third of it.
        """
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_dim * length
        return 6 * self.active_matmul_params() + 12 * attention

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values one token leaves in the cache; 2 bytes per value is bf16."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value

    def replace(self, **changes: Any) -> Spec:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


_LLAMA3_IDS: dict[str, Any] = {"bos_token_id": 128000, "eos_token_ids": (128001,)}

# Fields that config.json spells as we do.
_SAME_NAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip

# config.json keys that change the function in ways this model does not implement, with the one value it accepts.
_FIXED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "num_local_experts": None}

# What `quantization_config` may say the weights are stored as; `weights/quantization` reads the rest of it.
QUANT_METHODS = ("compressed-tensors", "gptq", "awq", "puna")


def _refuse_unsupported(config: dict[str, Any]) -> None:
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise PunaError(f"model_type {family!r} is not one puna reads", f"families: {', '.join(ARCHITECTURES)}")
    for key, accepted in _FIXED.items():
        if config.get(key, accepted) not in (accepted, None):
            raise PunaError(
                f"config.json has {key} = {config[key]!r}, puna supports {accepted!r} only", "use another model"
            )
    method = (config.get("quantization_config") or {"quant_method": "gptq"}).get("quant_method")
    if method not in QUANT_METHODS:
        raise PunaError(
            f"the weights are quantized by {method!r}, which puna does not read",
            f"quantization methods: {', '.join(QUANT_METHODS)}; ask for another copy of the model, or the original",
        )


def _read_config(config: dict[str, Any]) -> Spec:
    family, heads = config["model_type"], config["num_attention_heads"]
    eos = config.get("eos_token_id")
    bias = bool(config.get("attention_bias", False))
    return Spec(
        model_type=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
        intermediate_size=config["intermediate_size"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=_read_rope(config, config.get("max_position_embeddings", 2048)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias and family in ("llama", "qwen3"),
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        sliding_windows=_read_windows(config),
        initializer_range=config.get("initializer_range", 0.02),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_token_id=config.get("pad_token_id"),
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
    )


def _read_rope(config: dict[str, Any], max_len: int) -> Rope:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    if kind not in ROPE_TYPES:
        raise PunaError(f"rope_type {kind!r} is not one puna knows", f"rope types: {', '.join(ROPE_TYPES)}")
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    names = {f.name for f in dataclasses.fields(Rope)} - {"rope_type", "rope_theta", "max_position_embeddings"}
    given = {k: v for k, v in scaling.items() if k in names and v is not None}
    if kind == "yarn":
        given.setdefault("factor", 0.0)
    if kind in ("yarn", "llama3"):
        given.setdefault("original_max_position_embeddings", max_len)
    return Rope(rope_type=kind, rope_theta=float(theta), max_position_embeddings=max_len, **given)


def _write_rope(rope: Rope) -> dict[str, Any] | None:
    """rope_scaling: only what differs from the defaults, so that other readers meet no unknown key."""
    if rope.rope_type == "default":
        return None
    default = Rope()
    always = {"factor"} | ({"low_freq_factor", "high_freq_factor"} if rope.rope_type == "llama3" else set())
    skip = {"rope_type", "rope_theta", "max_position_embeddings"}
    written = {
        f.name: getattr(rope, f.name)
        for f in dataclasses.fields(rope)
        if f.name not in skip and (f.name in always or getattr(rope, f.name) != getattr(default, f.name))
    }
    if not rope.factor:  # yarn's "from the two lengths", spelt out for readers without that rule
        written["factor"] = rope.max_position_embeddings / rope.original_max_position_embeddings
    return {"rope_type": rope.rope_type, **written}


def _read_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if config["model_type"] == "mistral":
        return (window,) * layers
    if config["model_type"] == "llama" or not config.get("use_sliding_window", False):
        return (None,) * layers
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _write_family(spec: Spec) -> dict[str, Any]:
    """The keys in which the families differ."""
    windows = [w for w in spec.sliding_windows if w is not None]
    if spec.model_type == "llama":
        return {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    if spec.model_type == "mistral":
        return {"sliding_window": windows[0] if windows else None}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in spec.sliding_windows]
    return {
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        "max_window_layers": kinds.index("sliding_attention") if windows else spec.num_hidden_layers,
        "layer_types": kinds,
        **({"attention_bias": spec.qkv_bias} if spec.model_type == "qwen3" else {}),
    }


def _meta_scaling(params: dict[str, Any]) -> dict[str, Any] | None:
    """Meta marks Llama 3.1+ by `use_scaled_rope`; the constants stand in llama-models' code, not in the file."""
    if not params.get("use_scaled_rope"):
        return None
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factor = float(params.get("rope_scaling_factor", 8.0))
    return {**scaling, "factor": factor, "original_max_position_embeddings": 8192}


def _ffn_width(params: dict[str, Any]) -> int:
    width = int(2 * 4 * params["dim"] / 3)
    width = int((params.get("ffn_dim_multiplier") or 1.0) * width)
    multiple = params.get("multiple_of", 256)
    return multiple * ((width + multiple - 1) // multiple)


def _problems(spec: Spec) -> list[tuple[str, str]]:
    """What makes these numbers no model, each with the way out."""
    heads, kv = spec.num_attention_heads, spec.num_key_value_heads
    found = [
        (f"{name} is {getattr(spec, name)}", f"{name} must be at least 1")
        for name in _SAME_NAME[:7]
        if getattr(spec, name) < 1
    ]
    if kv >= 1 and heads % kv:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        found.append((f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv}",
                      f"use {', '.join(map(str, divisors))} key/value heads"))  # fmt: skip
    if spec.head_dim % 2:
        found.append((f"head_dim {spec.head_dim} is odd; rotary embedding turns pairs", "use an even head_dim"))
    if len(spec.sliding_windows) != spec.num_hidden_layers:
        layers = spec.num_hidden_layers
        found.append((f"{len(spec.sliding_windows)} window entries for {layers} layers", "give one per layer"))
    if spec.rope.max_position_embeddings < 1:
        found.append((f"max_position_embeddings is {spec.rope.max_position_embeddings}", "it must be at least 1"))
    return found
