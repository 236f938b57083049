"""Folders in and out: every origin gives the same logits, and anything incomplete is refused with names and shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import puna
from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.text.train_tokenizer import train_bpe
from puna.weights.folder import empty_model, hf_state, load_model, save_model
from puna.weights.names import META, names_on_disk

IDS = torch.arange(40)


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS, IDS, PackedCausal.of([40])))


def same(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def model() -> Transformer:
    spec = Spec.preset("debug").replace(tie_word_embeddings=False)
    made = empty_model(spec, torch.float32, torch.device("cpu"))
    made.init_weights(torch.Generator().manual_seed(1))
    return made.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [10**9, 60_000])
def test_saving_loading_and_saving_again_is_bit_exact(model, tmp_path, dtype, shard) -> None:
    cast = puna.load_model("preset:debug", dtype)
    save_model(cast, tmp_path / "a", max_shard_bytes=shard)
    again = load_model(tmp_path / "a", dtype)
    assert same(cast, again)
    save_model(again, tmp_path / "b", max_shard_bytes=shard)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert len([f for f in files if f.endswith(".safetensors")]) == (1 if shard == 10**9 else len(files) - 3)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("shard", [10**9, 60_000])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_our_folder(tmp_path, shard, tied) -> None:
    spec = Spec.preset("debug").replace(tie_word_embeddings=tied)
    ours = empty_model(spec, torch.float32, torch.device("cpu"))
    ours.init_weights()
    tokenizer = train_bpe(["def f(x):\n    return x + 1\n" * 50, "class A: pass\n" * 20], 300)
    save_model(ours, tmp_path / "m", tokenizer, max_shard_bytes=shard)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert (theirs(IDS[None]).logits[0] - logits(ours)).abs().max() < 1e-5
    text = "def g(y):  return y"
    assert AutoTokenizer.from_pretrained(tmp_path / "m")(text)["input_ids"] == tokenizer.encode(text, bos=True)


def test_pytorch_bin_shards(model, tmp_path) -> None:
    state = hf_state(model)
    names = list(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    (tmp_path / "config.json").write_text(json.dumps(model.spec.to_config()))
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(load_model(tmp_path), model)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(PunaError, match="1 are missing: pytorch_model-00002"):
        load_model(tmp_path)


def test_old_torch_files_without_zip(model, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model.spec.to_config()))
    torch.save(hf_state(model), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(load_model(tmp_path), model)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/puna-evil-ran"),))


def test_a_pickle_that_runs_code_is_never_run(model, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model.spec.to_config()))
    torch.save({**hf_state(model), "x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PunaError, match="holds more than tensors"):
        load_model(tmp_path)
    assert not Path("/tmp/puna-evil-ran").exists()


def pairs_from_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("embedding_cut", [0, 1])
def test_meta_shards(model, tmp_path, ranks, embedding_cut) -> None:
    """Meta's layout, cut as its model parallelism cuts: Llama 2 the embedding by width, Llama 3 by vocabulary."""
    spec = model.spec
    names = names_on_disk(dict(model.named_parameters()), META)
    state = {names[n]: p.detach() for n, p in model.named_parameters()}
    for name in state:
        if name.endswith(("wq.weight", "wk.weight")):
            state[name] = pairs_from_halves(state[name], spec.head_dim)
    for rank in range(ranks):
        part = {}
        for name, tensor in state.items():
            dim = embedding_cut if "tok_emb" in name else 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            part[name] = tensor if tensor.ndim == 1 else tensor.chunk(ranks, dim)[rank].clone()
        torch.save({**part, "rope.freqs": torch.ones(8)}, tmp_path / f"consolidated.{rank:02d}.pth")
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 64, "norm_eps": 1e-5,
              "ffn_dim_multiplier": 1.1, "vocab_size": -1 if embedding_cut == 1 else 512}  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    loaded = load_model(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.norm.weight"),
            r"1 missing, 0 surplus, 0 mis-shaped.*\n.*missing model.norm.weight \[64\]",
        ),
        (lambda s: s.update(x=torch.ones(2)), r"1 surplus.*\n.*surplus x \[2\]"),
        (lambda s: s.update({"model.norm.weight": torch.ones(3)}), r"file \[3\], config \[64\]"),
        (lambda s: s.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "not floating point"),
    ],
)
def test_incomplete_weights_are_refused(model, tmp_path, change, message) -> None:
    save_model(model, tmp_path / "m")
    rewrite(tmp_path / "m", change)
    with pytest.raises(PunaError, match=message):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("keep", [4, 100, 0.5, -1])
def test_truncated_safetensors(model, tmp_path, keep) -> None:
    save_model(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(PunaError, match="not a whole safetensors file") as caught:
        load_model(tmp_path / "m")
    assert "iB" in caught.value.message or " B" in caught.value.message


def test_corrupted_header(model, tmp_path) -> None:
    save_model(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:40] = b"\xff" * 20
    file.write_bytes(data)
    with pytest.raises(PunaError, match="not a whole safetensors"):
        load_model(tmp_path / "m")


def test_tied_head_saved_stale_is_refused(tmp_path) -> None:
    tied = load_model("preset:debug")
    save_model(tied, tmp_path / "m")
    rewrite(tmp_path / "m", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert same(load_model(tmp_path / "m"), tied)
    rewrite(tmp_path / "m", lambda s: s["lm_head.weight"].add_(1))
    with pytest.raises(PunaError, match="differs from the embedding"):
        load_model(tmp_path / "m")


def test_empty_and_missing_folders(tmp_path) -> None:
    with pytest.raises(PunaError, match="no model folder"):
        load_model(tmp_path / "none")
    with pytest.raises(PunaError, match="no weights in"):
        load_model(tmp_path)


PEAK = """
import sys, puna, torch
from pathlib import Path
def peak(): return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
warm = puna.load_model("preset:debug")  # imports and thread pools are not the model's
before = peak()
model = puna.load_model(sys.argv[1], sys.argv[2])
size = sum(p.nbytes for p in model.parameters()) / 1024
print((peak() - before) / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("form", "dtype"), [("one", "float32"), ("shards", "float32"), ("bin", "float32"), ("one", "bfloat16")]
)
def test_peak_memory_while_loading(tmp_path, form, dtype) -> None:
    spec = Spec(vocab_size=8000, hidden_size=1024, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8,
                head_dim=128, intermediate_size=3072)  # fmt: skip
    big = empty_model(spec, torch.float32, torch.device("cpu"))  # 900 MB
    for parameter in big.parameters():
        parameter.data.fill_(0.5)
    if form == "bin":
        tmp_path.joinpath("config.json").write_text(json.dumps(spec.to_config()))
        torch.save(hf_state(big), tmp_path / "pytorch_model.bin")
    else:
        save_model(big, tmp_path, max_shard_bytes=10**10 if form == "one" else 3 * 10**8)
    del big
    command = [sys.executable, "-c", PEAK, str(tmp_path), dtype]
    ratio = float(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    assert ratio <= 1.2
