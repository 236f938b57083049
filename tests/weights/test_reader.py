"""Any box of any parameter equals that box of the loaded model, whatever the folder's format."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.weights import source
from puna.weights.folder import empty_model, hf_state, load_model, save_model
from puna.weights.names import META, names_on_disk
from puna.weights.reader import WeightReader


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = empty_model(Spec.preset("debug").replace(tie_word_embeddings=False), torch.float32, torch.device("cpu"))
    made.init_weights(torch.Generator().manual_seed(1))
    return made


def written(model: Transformer, form: str, folder: Path) -> Path:
    """The model in one of the formats that `load_model` knows."""
    if form in ("one", "shards"):
        return save_model(model, folder / "m", max_shard_bytes=10**9 if form == "one" else 60_000)
    if form == "bin":
        torch.save(hf_state(model), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(model.spec.to_config()))
        return folder
    names = names_on_disk(dict(model.named_parameters()), META)
    for rank in range(2):
        part = {}
        for name, parameter in model.named_parameters():
            dim = 1 if names[name].endswith(("wo.weight", "w2.weight")) else 0
            part[names[name]] = parameter.detach() if parameter.ndim == 1 else parameter.detach().chunk(2, dim)[rank]
        torch.save({key: value.clone() for key, value in part.items()}, folder / f"consolidated.{rank:02d}.pth")
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 64, "norm_eps": 1e-5,
              "ffn_dim_multiplier": 1.1, "vocab_size": 512}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize("form", ["one", "shards", "bin", "meta"])
def test_boxes_of_every_format(model, tmp_path, form) -> None:
    folder = written(model, form, tmp_path)
    expected = dict(load_model(folder).named_parameters())
    reader, draw = WeightReader(folder), random.Random(0)
    assert reader.spec.hidden_size == 64
    for name, parameter in expected.items():
        for _ in range(3):
            ends = [sorted((draw.randint(0, n), draw.randint(0, n))) for n in parameter.shape]
            box = tuple(slice(*pair) for pair in ends)
            assert torch.equal(reader.read(name, box), parameter.detach()[box])


def test_only_the_bytes_of_the_box_are_read(model, tmp_path, monkeypatch) -> None:
    folder = written(model, "one", tmp_path)

    def never(*_) -> None:
        raise AssertionError("a whole tensor was read")

    monkeypatch.setattr(source, "_read_safetensors", never)
    part = WeightReader(folder).read("embed", (slice(8, 16), slice(0, 64)))
    assert part.untyped_storage().nbytes() <= 8 * 64 * 4 or is_mapped(part, folder / "model.safetensors")


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's numbers are a view of the file itself: then only the pages that are looked at are read."""
    place = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= place < last:
            return line.endswith(str(file))
    return False


def test_what_load_model_refuses_is_refused(model, tmp_path) -> None:
    folder = written(model, "one", tmp_path)
    state = load_file(folder / "model.safetensors")
    box = (slice(0, 4),)
    changes = [
        ("1 missing", {"model.norm.weight": None}),
        ("mis-shaped model.norm.weight", {"model.norm.weight": torch.ones(3)}),
        ("not floating point", {"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
    ]
    for message, change in changes:
        changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(PunaError, match=message):
            WeightReader(folder).read("norm.weight", box)


def test_a_stale_tied_head_is_refused(tmp_path) -> None:
    folder = save_model(load_model("preset:debug"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    box = (slice(2, 5), slice(0, 64))
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert torch.equal(WeightReader(folder).read("embed", box), state["model.embed_tokens.weight"][box])
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(PunaError, match="differs from the embedding"):
        WeightReader(folder).read("embed", box)
