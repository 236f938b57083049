"""`puna info`: what a model is and costs. Counts come from its Spec, so a 405B answers as fast as a toy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puna.base.console import count, flops, size, table
from puna.base.storage import read_json
from puna.model.spec import Spec
from puna.serve.stored import stored_quantization, weight_bytes
from puna.weights.fetch import local_folder

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CONVENTION = "training, 6 N + 12 L H Q T (PaLM appendix B): N without the embedding look-up, attention over T x T"


def model_card(model: str, seq_len: int = 0) -> dict[str, Any]:
    """Figures of a model folder, a GGUF file, a save's URL or a preset, as plain values."""
    folder = local_folder(model, state=False)
    spec = _spec(folder)
    length = seq_len or min(spec.max_len, 8192)
    width = _DTYPE_BYTES.get(spec.dtype, 2)
    quantization = stored_quantization(folder, spec)
    kv_dtype = "bfloat16" if quantization is None or quantization["kv"] is None else quantization["kv"].split()[0]
    return {
        "model": model,
        "model_type": spec.model_type,
        "parameters": spec.num_params(),
        "groups": spec.group_params(),
        "dtype": spec.dtype,
        "weight_bytes": weight_bytes(folder) or spec.num_params() * width,
        "quantization": quantization,
        "layers": spec.num_hidden_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "heads": [spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim],
        "vocab_size": spec.vocab_size,
        "context": spec.max_len,
        "rope": {"type": spec.rope.rope_type, "theta": spec.rope.rope_theta, "factor": spec.rope.factor},
        "sliding_window": next((w for w in spec.sliding_windows if w), None),
        "flops_per_token": spec.flops_per_token(length),
        "flops_seq_len": length,
        "flops_convention": CONVENTION,
        "kv_bytes_per_token": spec.kv_bytes_per_token(2 if kv_dtype == "bfloat16" else 1),
        "kv_dtype": kv_dtype,
        "files": _files(folder) if folder.is_dir() else {folder.name: weight_bytes(folder)} if folder.is_file() else {},
        "checks": _checks(folder) if folder.is_dir() else {},
    }


def print_card(card: dict[str, Any]) -> None:
    """The card on stdout."""
    heads, kv, head_dim = card["heads"]
    total = card["parameters"]
    rows = [
        ("family", card["model_type"]),
        ("parameters", f"{count(total)} ({total:,}), {_stored(card)}"),
        *_quantization(card["quantization"]),
        *((f"  {name}", f"{count(n)} ({n / total:.1%})") for name, n in card["groups"].items()),
        ("shape", f"{card['layers']} layers, width {card['hidden_size']}, feed-forward {card['intermediate_size']}"),
        ("attention", f"{heads} heads, {kv} key/value heads, head width {head_dim}{_window(card)}"),
        ("vocabulary", f"{card['vocab_size']:,}"),
        ("context", f"{card['context']:,} tokens, rope {card['rope']['type']}, theta {card['rope']['theta']:g}"),
        ("FLOPs/token", f"{flops(card['flops_per_token'])} at T = {card['flops_seq_len']:,}"),
        ("", card["flops_convention"]),
        (
            "KV bytes/token",
            f"{card['kv_bytes_per_token']:,} in {card['kv_dtype']} ({_full_context(card)} for the whole context)",
        ),
        *(("" if i else "files", f"{name}  {size(n)}") for i, (name, n) in enumerate(card["files"].items())),
        *(("check", f"{name}: {result}") for name, result in card["checks"].items()),
    ]
    print(table([(name.ljust(16), value) for name, value in rows], title=card["model"]))


def _spec(place: Path) -> Spec:
    if place.is_file() and place.suffix == ".gguf":
        from puna.weights.model_files import find_spec

        return find_spec(place)
    return Spec.load(str(place))


def _stored(card: dict[str, Any]) -> str:
    if card["quantization"] is None:
        return f"{size(card['weight_bytes'])} in {card['dtype']}"
    return f"{size(card['weight_bytes'])} stored, {8 * card['weight_bytes'] / card['parameters']:.2f} bits each"


def _quantization(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    formats = ", ".join(f"{name} x {layers}" for name, layers in found["formats"].items())
    bits = "" if found["bits_per_weight"] is None else f" ({found['bits_per_weight']:.2f} bits, scales included)"
    rows = [("quantization", f"{found['method']}: {formats}{bits}")]
    rows += [("  inputs", found["inputs"])] if found["inputs"] else []
    return rows + ([("  KV cache", found["kv"])] if found["kv"] else [])


def _window(card: dict[str, Any]) -> str:
    return f", window {card['sliding_window']}" if card["sliding_window"] else ""


def _full_context(card: dict[str, Any]) -> str:
    return size(card["kv_bytes_per_token"] * card["context"])


def _files(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith(".")
    }


def _checks(folder: Path) -> dict[str, str]:
    """What can be said without loading the weights."""
    checks = {}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(read_json(index)["weight_map"].values())
        absent = sorted(name for name in names if not (folder / name).exists())
        checks["shards"] = f"missing {', '.join(absent)}" if absent else f"all {len(names)} there"
    has_template = (folder / "chat_template.jinja").exists()
    checks["tokenizer"] = "there" if (folder / "tokenizer.json").exists() else "no tokenizer.json"
    checks["chat template"] = "there" if has_template else "none"
    return checks
