"""Meta's layout, written: consolidated.00.pth, params.json and the tokenizer; `source.MetaSource` reads it.

params.json has no words for the context length and the ids that end an answer: a reader takes its defaults.
Source: the model code of github.com/meta-llama (ModelArgs, FeedForward).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.base.storage import write_json
from puna.model.spec import Spec
from puna.text.tokenizer import Tokenizer
from puna.weights.names import META, names_on_disk, pairs_from_halves


def params_of(spec: Spec) -> dict[str, Any]:
    """params.json of a model. Errors: `PunaError` for what Meta's code cannot express, with its name."""
    plain = spec.replace(sliding_windows=(None,) * spec.num_hidden_layers)
    reasons = [
        reason
        for is_so, reason in (
            (spec.qkv_bias or spec.output_bias or spec.mlp_bias, "biases"),
            (spec.qk_norm, "q and k norms"),
            (spec.sliding_windows != plain.sliding_windows, "a sliding window"),
            (spec.head_dim * spec.num_attention_heads != spec.hidden_size, f"heads of width {spec.head_dim}"),
            (spec.rope.rope_type not in ("default", "llama3"), f"rope scaling '{spec.rope.rope_type}'"),
        )
        if is_so
    ]
    if reasons:
        raise PunaError(f"Meta's format has no place for {', '.join(reasons)}", "use --to hf or --to gguf")
    width = int(8 * spec.hidden_size / 3)
    params: dict[str, Any] = {
        "dim": spec.hidden_size,
        "n_layers": spec.num_hidden_layers,
        "n_heads": spec.num_attention_heads,
        "n_kv_heads": spec.num_key_value_heads,
        "vocab_size": spec.vocab_size,
        "multiple_of": 1,
        "ffn_dim_multiplier": (spec.intermediate_size + 0.5) / width,  # rounded down by the reader
        "norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope.rope_theta,
    }
    if spec.rope.rope_type == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": spec.rope.factor}
    _check_reads_back(spec, params)
    return params


def _check_reads_back(spec: Spec, params: dict[str, Any]) -> None:
    """The frequencies of rotary and the widths: what a reader cannot guess."""
    found, no_length = Spec.from_params(params), {"max_position_embeddings": spec.rope.max_position_embeddings}
    rope = type(spec.rope)(**{**vars(found.rope), **no_length})
    if rope != spec.rope:
        raise PunaError(f"Meta's code knows {rope}, the model has {spec.rope}", "use --to hf or --to gguf")
    assert found.intermediate_size == spec.intermediate_size


def save_meta(
    folder: Path,
    spec: Spec,
    names: list[str],
    read: Callable[[str], Tensor],
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    work: Path,
) -> None:
    """Write the files into `folder`. names: our parameters; read: name -> plain tensor. work: an empty folder.

    Tensors wait in `work` as mapped files until all are there, since torch writes them at once: memory holds one, and
    pages that the system can drop. A tied head is written out, as Meta's own files do.
    """
    write_json(folder / "params.json", params_of(spec))
    disk = names_on_disk(names, META)
    state: dict[str, Tensor] = {}
    for name in names:
        tensor = read(name).to("cpu", dtype)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = pairs_from_halves(tensor, spec.head_dim)
        state[disk[name]] = _on_disk(tensor, work / f"{len(state)}.bin")
    if "lm_head.weight" not in names:
        state[META["lm_head.{end}"].replace("{end}", "weight")] = state[disk["embed"]]
    torch.save(state, folder / "consolidated.00.pth")
    if tokenizer is not None:
        tokenizer.save(folder)


def _on_disk(tensor: Tensor, path: Path) -> Tensor:
    mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return mapped.copy_(tensor)
