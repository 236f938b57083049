"""`puna quantize`: every preset from folder to folder, what is refused, what survives a kill, ranks that share the text."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import puna.serve.quantize as service
from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.ops.attention import PackedCausal, RoundedKV
from puna.quant.config import PRESETS, QuantConfig
from puna.serve.quantize import Request, choose_config, run_quantize
from puna.weights.folder import empty_model, load_model, save_model
from puna.weights.gguf.model import save_gguf

TEXT = (ast.__file__, str(Path(ast.__file__).with_name("argparse.py")))
SMALL = {"samples": 10, "seq_len": 32}
IDS = list(range(3, 40))


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch) -> None:
    """Speed has a test of its own."""
    monkeypatch.setattr(service, "_measure_speed", lambda *_: None)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    """Wide enough for groups of 32, its head apart from the embedding."""
    spec = Spec.preset("debug").replace(vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
    net = empty_model(spec, torch.float32, torch.device("cpu"))
    net.init_weights(torch.Generator().manual_seed(0))
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)
    return save_model(net, tmp_path_factory.mktemp("quantize") / "m", tokenizer)


def request(model: Path, out: Path, preset: str = "int4_gptq", **changes) -> Request:
    more = {"weights": "int4_g32"} if PRESETS[preset]["weights"].startswith("int4") else {}
    more |= {"low_rank": 4} if preset == "int4_lorc" else {}
    config = choose_config(str(model), preset, SMALL | more | changes)
    return Request(str(model), str(out), config, TEXT, eval_tokens=256)


def logits(folder: Path) -> torch.Tensor:
    net = load_model(folder)
    scales = getattr(net, "kv_scales", None)
    attend = PackedCausal.of([len(IDS)])
    with torch.no_grad():
        ids, positions = torch.tensor(IDS), torch.arange(len(IDS))
        return net.logits(net(ids, positions, attend if scales is None else RoundedKV(attend, scales)))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "int3_gptq"])
def test_presets_make_folders_that_load(model, tmp_path, preset) -> None:
    report = run_quantize(request(model, tmp_path / "q", preset), quiet=True)
    assert report["derived"]["reload_passed"]
    assert report["reload"]["max_difference"] < 1e-4
    assert report["after"]["kl"]["value"] < 0.2
    assert report["derived"]["bits_per_weight"] < 9
    assert report["size_after"] < report["size_before"]
    assert {layer["name"] for layer in report["layers"]} >= {"layers.0.attn.q_proj", "layers.1.mlp.down_proj"}
    saved = json.loads((tmp_path / "q" / "quant_report.json").read_text())
    assert saved["after"] == report["after"]
    assert "<svg" in (tmp_path / "q" / "quant_report.html").read_text()
    assert QuantConfig.of(json.loads((tmp_path / "q" / "puna_quant.json").read_text())["config"]).weights
    error = float((logits(tmp_path / "q") - logits(model)).abs().mean() / logits(model).abs().mean())
    assert 0 < error < 0.6


@pytest.mark.parametrize("kv", ["int8", "fp8_head"])
def test_kv_cache(model, tmp_path, kv) -> None:
    report = run_quantize(request(model, tmp_path / "q", "int8_wo", kv=kv), quiet=True)
    assert report["reload"]["max_difference"] < 1e-4
    scales = load_model(tmp_path / "q").kv_scales
    assert scales.heads == (2 if kv == "fp8_head" else None)


def test_overrides_head_and_target(model, tmp_path) -> None:
    """Layers get what was asked for, the head too; a target is met from below."""
    changes = {"overrides": ("*.down_proj=int8", "lm_head=int8", "model.layers.0.self_attn.o_proj=none")}
    report = run_quantize(request(model, tmp_path / "a", **changes), quiet=True)
    formats = {layer["name"]: layer["format"] for layer in report["layers"]}
    assert formats["layers.1.mlp.down_proj"] == formats["lm_head"] == "int8"
    assert "layers.0.attn.o_proj" not in formats
    assert formats["layers.1.attn.o_proj"] == "int4_g32"
    report = run_quantize(request(model, tmp_path / "b", target_bits=5.0), quiet=True)
    assert 4.6 < report["derived"]["bits_per_weight"] <= 5.0
    assert len({layer["format"] for layer in report["layers"]}) > 1
    changes = {"target_bits": 6.0, "overrides": ("*.down_proj=int8", "layers.0.attn.*=none")}
    report = run_quantize(replace(request(model, tmp_path / "c", **changes), format="gptq"), quiet=True)
    formats = {layer["name"]: layer["format"] for layer in report["layers"]}
    assert formats["layers.1.mlp.down_proj"] == "int8"
    assert set(formats.values()) <= {"int3_g32", "int4_g32", "int8_g32", "int8"}  # what GPTQ files hold
    assert 5.4 < report["derived"]["bits_per_weight"] <= 6.1


def test_speed_is_measured(model, tmp_path, monkeypatch) -> None:
    monkeypatch.undo()
    report = run_quantize(request(model, tmp_path / "q", "int8_wo"), quiet=True)
    assert report["speed_before"]["tokens_per_second"] > 0
    assert 0 < report["speed_after"]["bytes_per_token"] < report["speed_before"]["bytes_per_token"]
    assert all(layer["kernel"] for layer in report["layers"])


def test_without_text(model, tmp_path) -> None:
    """Formats that need no calibration work on a model without a tokenizer; nothing is then claimed."""
    bare = tmp_path / "bare"
    save_model(load_model(model), bare)
    report = run_quantize(replace(request(bare, tmp_path / "q", "int8_wo"), eval_tokens=0), quiet=True)
    assert report["after"] is None
    assert all(0 < layer["error"] < 0.02 for layer in report["layers"])
    with pytest.raises(PunaError, match="no tokenizer"):
        run_quantize(request(bare, tmp_path / "r"), quiet=True)
    report = run_quantize(replace(request(model, tmp_path / "s"), eval_tokens=0), quiet=True)
    assert report["after"] is None  # calibrated, but not judged
    with pytest.raises(PunaError, match="0 tokens to measure"):
        asked = replace(request(model, tmp_path / "t"), eval_tokens=0, max_ppl_increase="1%")
        run_quantize(asked, quiet=True)


def test_half_precision_model(model, tokenizer, tmp_path) -> None:
    """bf16 folders stay bf16: scales and norms too, and the files still say what was computed."""
    half = tmp_path / "half"
    save_model(load_model(model, "bfloat16"), half, tokenizer)
    report = run_quantize(request(half, tmp_path / "q", "int4_awq"), quiet=True)
    assert report["derived"]["reload_passed"]
    assert report["reload"]["max_difference"] < 1e-3  # folded norms were chosen among bf16's numbers


HALF_SCALES = [
    (f, w) for f in ("gptq", "gptq_v2", "awq") for w in ("int4_g32", "int4", "int8") if (f, w) != ("awq", "int8")
]


@pytest.mark.parametrize(("format", "weights"), HALF_SCALES)
def test_formats_with_fp16_scales_lose_nothing(model, tmp_path, format, weights) -> None:
    """Codes are chosen for the scales that the file can hold."""
    asked = replace(request(model, tmp_path / "q", "int4_gptq", weights=weights), format=format)
    assert run_quantize(asked, quiet=True)["reload"]["max_difference"] < 1e-4


def test_worse_than_allowed_is_set_aside(model, tmp_path) -> None:
    asked = replace(request(model, tmp_path / "q", "int4_wo", weights="int2_g32"), max_ppl_increase="0.001%")
    with pytest.raises(PunaError, match=r"set aside in .*q\.rejected: perplexity"):
        run_quantize(asked, quiet=True)
    assert not (tmp_path / "q").exists()
    assert not (tmp_path / "q.partial").exists()
    assert (tmp_path / "q.rejected" / "quant_report.html").exists()
    load_model(tmp_path / "q.rejected")


class _Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "q"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "_measure_speed", lambda *_: None)
        run_quantize(request(model, out), quiet=True)
    return out


@pytest.mark.parametrize(
    ("part", "when"), [("layer-0000", "after"), ("layer-0001", "before"), ("layer-0001", "after"), ("ends", "before")]
)
def test_interrupted_run_goes_on_at_its_layer(model, whole, tmp_path, monkeypatch, part, when) -> None:
    """Whatever was being written, the result has the bytes of an undisturbed run, and finished layers are not redone."""
    asked = request(model, tmp_path / "q")
    add = service.QuantizedWriter.add
    seen: list[str] = []

    def stumble(self, name, tensors):
        seen.append(name)
        if name == part and when == "before":
            raise _Killed
        add(self, name, tensors)
        if name == part:
            raise _Killed

    monkeypatch.setattr(service.QuantizedWriter, "add", stumble)
    with pytest.raises(_Killed):
        run_quantize(asked, quiet=True)
    first = list(seen)
    monkeypatch.setattr(
        service.QuantizedWriter, "add", lambda self, name, tensors: (seen.append(name), add(self, name, tensors))
    )
    run_quantize(asked, quiet=True)
    assert seen[len(first)] == part  # the unfinished one is the first to be done again
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (whole / name).read_bytes()


def test_other_settings_do_not_go_on(model, tmp_path, monkeypatch) -> None:
    add = service.QuantizedWriter.add

    def stumble(self, name, tensors):
        add(self, name, tensors)
        raise _Killed

    monkeypatch.setattr(service.QuantizedWriter, "add", stumble)
    with pytest.raises(_Killed):
        run_quantize(request(model, tmp_path / "q"), quiet=True)
    monkeypatch.setattr(service.QuantizedWriter, "add", add)
    with pytest.raises(PunaError, match="another config"):
        run_quantize(request(model, tmp_path / "q", damping=0.5), quiet=True)
    with pytest.raises(PunaError, match="other text"):
        run_quantize(replace(request(model, tmp_path / "q"), calib=TEXT[:1]), quiet=True)


BAD = {
    "group": ({"weights": "int4_g48"}, "groups of 48 do not divide the 64 inputs"),
    "pattern": ({"overrides": ("*.dwn_proj=int8",)}, "names no layer"),
    "text": ({"samples": 10**6}, r"1,?000,?000|needs|too little"),
    "few": ({"samples": 2}, "2 calibration sequences of 32 tokens are fewer than the 192 inputs"),
    "length": ({"seq_len": 10**6}, "context"),
    "nothing": ({"overrides": ("*=none",)}, "no layer would be quantized"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(model, tmp_path, name) -> None:
    changes, message = BAD[name]
    with pytest.raises(PunaError, match=message) as caught:
        run_quantize(request(model, tmp_path / "q", **changes), quiet=True)
    assert caught.value.hint
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("preset", "format"),
    [("fp8", "gptq"), ("int4_hqq", "awq"), ("int4_lorc", "compressed-tensors"), ("int3_gptq", "awq")],
)
def test_pairs_that_cannot_be(model, tmp_path, preset, format) -> None:
    """Refused before anything runs; hqq's groups of 64 with zero points do go into AWQ, its groups of 32 too."""
    changes = {"weights": "int3_g32"} if preset == "int3_gptq" else {}
    asked = replace(request(model, tmp_path / "q", preset, **changes), format=format)
    if preset == "int4_hqq":
        run_quantize(asked, quiet=True)
        return
    with pytest.raises(PunaError, match=f"{format} cannot hold") as caught:
        run_quantize(asked, quiet=True)
    assert "supported" in str(caught.value.hint)


def test_damaged_and_dead_weights(model, tmp_path) -> None:
    net = load_model(model)
    net.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    save_model(net, tmp_path / "nan")
    with pytest.raises(PunaError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        run_quantize(replace(request(tmp_path / "nan", tmp_path / "q", "int8_wo"), eval_tokens=0), quiet=True)
    net.layers[1].mlp.up_proj.weight.data.zero_()
    save_model(net, tmp_path / "zero", None)
    with pytest.raises(PunaError, match=r"layers\.1\.mlp\.up_proj\.weight are 0"):
        run_quantize(replace(request(tmp_path / "zero", tmp_path / "r", "int8_wo"), eval_tokens=0), quiet=True)


def test_dead_activations(model, tmp_path, tokenizer) -> None:
    net = load_model(model)
    net.layers[1].mlp.gate_proj.weight.data.zero_()  # silu(0) = 0: nothing reaches down_proj
    save_model(net, tmp_path / "m", tokenizer)
    changes = {"overrides": ("layers.1.mlp.gate_proj=none",)}
    with pytest.raises(PunaError, match=r"inputs of layers\.1\.mlp\.down_proj are 0"):
        run_quantize(request(tmp_path / "m", tmp_path / "q", **changes), quiet=True)


def test_quantized_already_and_tied(model, model_folder, tmp_path) -> None:
    run_quantize(request(model, tmp_path / "q", "int8_wo"), quiet=True)
    with pytest.raises(PunaError, match="quantized already") as caught:
        run_quantize(request(tmp_path / "q", tmp_path / "r", "int8_wo"), quiet=True)
    assert "puna convert" in caught.value.hint
    with pytest.raises(PunaError, match="exists"):
        run_quantize(request(model, tmp_path / "q", "int8_wo"), quiet=True)
    net = load_model(model)
    weights = dict(net.named_parameters())
    for kind in ("Q8_0", "F16"):  # a GGUF file of plain numbers is a model like any other
        save_gguf(tmp_path / f"{kind}.gguf", net.spec, lambda name: weights[name].detach(), None, kind)
    with pytest.raises(PunaError, match=r"quantized already \(gguf: Q8_0"):
        run_quantize(replace(request(tmp_path / "Q8_0.gguf", tmp_path / "r", "int8_wo"), eval_tokens=0), quiet=True)
    run_quantize(replace(request(tmp_path / "F16.gguf", tmp_path / "r", "int8_wo"), eval_tokens=0), quiet=True)
    load_model(tmp_path / "r")
    assert load_model(model_folder).spec.tie_word_embeddings
    with pytest.raises(PunaError, match="tie_word_embeddings"):
        run_quantize(request(model_folder, tmp_path / "s", "int8_wo", overrides=("lm_head=int8",)), quiet=True)


def test_full_disk_is_refused_before_the_work(model, tmp_path, monkeypatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10_000, 10_000))
    with pytest.raises(PunaError, match="are free"):
        run_quantize(request(model, tmp_path / "q"), quiet=True)
    assert not (tmp_path / "q.partial").exists()


def test_no_preset(model, tmp_path) -> None:
    with pytest.raises(PunaError, match="no preset"):
        choose_config(str(model), "", {})
    with pytest.raises(PunaError, match="did you mean 'int4_gptq'"):
        choose_config(str(model), "int4_gtpq", {})
    (tmp_path / "puna_quant.json").write_text(
        json.dumps({"config": QuantConfig.preset("int4_wo").to_dict(), "qat": True})
    )
    assert choose_config(str(tmp_path), "", {"kv": "int8"}).weights == "int4_g128"


def run_cli(*words: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.run(
        [sys.executable, *start, "-m", "puna", *words], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_ranks_share_the_calibration(model, tmp_path) -> None:
    """Each sees half of the text, both together what one process sees: the same scales, nearly all codes."""
    words = ["quantize", str(model), "--preset", "int4_gptq", "--weights", "int4_g32", "--samples", "10", "--seq-len", "32",
             "--eval-tokens", "256", "--calib", *TEXT, "--json"]  # fmt: skip
    done = run_cli(*words, "--out", str(tmp_path / "two"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    assert report["derived"]["reload_passed"]
    alone = run_quantize(replace(request(model, tmp_path / "one", samples=10)), quiet=True)
    assert report["calibration"]["calibration_sha256"] == alone["calibration"]["calibration_sha256"]
    assert report["after"]["kl"]["value"] == pytest.approx(alone["after"]["kl"]["value"], rel=0.05)
    one, two = load_model(tmp_path / "one", dequantize=True), load_model(tmp_path / "two", dequantize=True)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (a == b).float().mean() > 0.97, name


def test_command_line(model, tmp_path) -> None:
    done = run_cli("quantize", str(model), "--preset", "int4_wo", "--weights", "int4_g32", "--out", str(tmp_path / "q"),
                   "--calib", *TEXT, "--eval-tokens", "256", "--seq-len", "32", "--max-ppl-increase", "0.0001%")  # fmt: skip
    assert done.returncode in (0, 2), done.stderr
    assert "perplexity" in done.stdout
    assert "Traceback" not in done.stderr
    done = run_cli("quantize", str(model), "--preset", "int5_magic", "--out", str(tmp_path / "r"))
    assert done.returncode == 2
    assert "hint: presets" in done.stderr
