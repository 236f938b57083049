"""Saves of one process: whole or absent whatever happens, every flipped bit found, and resumed exactly."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import puna
from puna.base import files
from puna.base.config import build, to_toml
from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.parallel import pieces
from puna.train.recipe import Recipe
from puna.weights import checkpoint, tensor_file
from puna.weights.agree import saver_group
from puna.weights.checkpoint import find_resume, list_steps, load_checkpoint, save_checkpoint, verify
from puna.weights.fetch import local_folder
from puna.weights.folder import empty_model, load_model
from puna.weights.manifest import FileDigest, manifest_bytes, read_manifest
from puna.weights.reader import WeightReader
from puna.weights.saver import Saver
from puna.weights.state import load_state

SPEC = Spec(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=96, tie_word_embeddings=True)  # fmt: skip


def trained(
    steps: int = 1, fused: bool = True, kind: type = torch.optim.AdamW
) -> tuple[Transformer, torch.optim.Optimizer]:
    model = empty_model(SPEC, torch.float32, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(5))
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-2, fused=fused, **settings)
    for step in range(steps):
        learn(model, optimizer, step)
    return model, optimizer


def learn(model: Transformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def copied(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{key}/{name}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def save(tmp_path, tokenizer) -> Path:
    model, optimizer = trained()
    return save_checkpoint(tmp_path / "run", 7, model, tokenizer, optimizer, {"x": [1, 2]}, 0)


# ---- bits ----


def test_a_thousand_flipped_bits_are_found(save) -> None:
    """Half of them spread over the files alike, so that small ones get their share, half over all bytes."""
    draw, found = random.Random(3), 0
    names = sorted(str(p.relative_to(save)) for p in save.rglob("*") if p.is_file())
    kinds = {"manifest.json", "state/.metadata", "state/__0_0.distcp", "state/trainer.json", "model.safetensors"}
    assert kinds | {"config.json", "tokenizer.json"} <= set(names)
    sizes = [(save / name).stat().st_size for name in names]
    assert verify(save) == []
    for number in range(1000):
        name = draw.choice(names) if number % 2 else draw.choices(names, sizes)[0]
        with open(save / name, "r+b") as file:
            place = draw.randrange(os.path.getsize(save / name))
            file.seek(place)
            before = file.read(1)
            file.seek(place)
            file.write(bytes([before[0] ^ 1 << draw.randrange(8)]))
            file.flush()
            found += verify(save) == [name]
            file.seek(place)
            file.write(before)
    assert found == 1000
    assert verify(save) == []


@pytest.mark.parametrize("damage", ["unlink", "truncate", "append"])
def test_missing_short_and_long_files_are_found(save, damage) -> None:
    for name in ("config.json", "state/.metadata", "model.safetensors"):
        path = save / name
        data = path.read_bytes()
        path.unlink() if damage == "unlink" else path.write_bytes(data[:-1] if damage == "truncate" else data + b" ")
        assert verify(save) == [name]
        path.write_bytes(data)


def test_helpers_share_the_files_of_a_save(save) -> None:
    for name in read_manifest(save):
        (save / name).write_bytes(b"damaged")
    shares = [verify(save, (i, 3)) for i in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(read_manifest(save))
    assert all(shares)


def test_a_manifest_is_refused_unless_it_is_what_was_written(tmp_path) -> None:
    data = manifest_bytes({"b": FileDigest(1, "0" * 64), "a": FileDigest(2, "1" * 64)})
    folder = tmp_path / "s"
    folder.mkdir()
    other = json.loads(data)
    other["files"]["a"]["size"] = 3
    bad = [b"", b"[]", b"{}", data[:-1], data + b"\n", data.replace(b'"b"', b'"c"'), json.dumps(other).encode()]
    bad += [manifest_bytes({"../escape": FileDigest(1, "0" * 64)}), manifest_bytes({"/etc/x": FileDigest(1, "0" * 64)})]
    for text in bad:
        (folder / "manifest.json").write_bytes(text)
        assert verify(folder) == ["manifest.json"]
        with pytest.raises(PunaError, match="damaged"):
            read_manifest(folder)
    with pytest.raises(PunaError, match="no complete save"):
        verify(tmp_path)


# ---- what is in a save ----


def test_transformers_opens_a_save(save, tokenizer) -> None:
    ids = torch.arange(20)
    theirs = AutoModelForCausalLM.from_pretrained(save)
    ours = load_model(save)
    with torch.no_grad():
        logits = ours.logits(ours(ids, ids, PackedCausal.of([20])))
        assert (theirs(ids[None]).logits[0] - logits).abs().max() < 1e-4
    assert puna.Tokenizer.load(save).encode("def f(x)") == tokenizer.encode("def f(x)")


@pytest.mark.parametrize(
    ("kind", "fused", "steps"),
    [
        (torch.optim.AdamW, True, 2),
        (torch.optim.AdamW, False, 2),
        (torch.optim.SGD, True, 1),
        (torch.optim.AdamW, True, 0),
    ],
)
def test_training_goes_on_exactly(tmp_path, kind, fused, steps) -> None:
    """State of any optimizer, stepped or not; one step after the load equals one step without it, bit for bit."""
    model, optimizer = trained(steps, fused, kind)
    torch.manual_seed(11)
    path = save_checkpoint(tmp_path, steps, model, None, optimizer, {"x": 1}, 0)
    drawn = torch.rand(4)
    again, fresh = trained(0, fused, kind)
    with torch.no_grad():
        loaded = dict(load_model(path).named_parameters())
        for name, parameter in again.named_parameters():
            parameter.copy_(loaded[name])
    assert load_checkpoint(path, again, fresh) == {"step": steps, "x": 1}
    assert torch.equal(torch.rand(4), drawn)
    assert same(copied(model, optimizer), copied(again, fresh))
    for one, other in ((model, optimizer), (again, fresh)):
        learn(one, other, 99)
    assert same(copied(model, optimizer), copied(again, fresh))


def test_state_of_another_model_is_refused(tmp_path) -> None:
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 1, model, None, optimizer, {}, 0)
    cases = {
        r"no optimizer state for \d+ parameters, e.g. layers.1": SPEC.replace(num_hidden_layers=2, sliding_windows=()),
        r"exp_avg of embed is \[64, 64\], not \[32, 64\]": SPEC.replace(vocab_size=32),
        r"state for 1 unknown parameters, e.g. norm.weight": SPEC,
    }
    for message, spec in cases.items():
        other = empty_model(spec, torch.float32, torch.device("cpu"))
        if "unknown" in message:
            other.norm.weight = None
        with pytest.raises(PunaError, match=message):
            load_checkpoint(path, other, torch.optim.AdamW(other.parameters()))


def test_saves_of_an_early_format_say_so(tmp_path) -> None:
    model, optimizer = trained()
    state = tmp_path / "step-000001" / "state"
    state.mkdir(parents=True)
    (state / "optimizer.safetensors").write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    (state.parent / "manifest.json").write_text(json.dumps({"files": {"state/optimizer.safetensors": digest}}))
    with pytest.raises(PunaError, match="early format"):
        verify(state.parent)
    with pytest.raises(PunaError, match="early format"):
        load_checkpoint(state.parent, model, optimizer)
    with pytest.raises(PunaError, match="no training state"):
        load_checkpoint(tmp_path, model, optimizer)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_state_that_cannot_be_read_is_one_clear_error(save, name) -> None:
    """Without `verify` before it: still no traceback of pickle's or torch's."""
    model, optimizer = trained()
    path = save / "state" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(PunaError, match="cannot be read: "):
        load_checkpoint(save, model, optimizer)


# ---- beside training ----


def test_a_save_holds_the_step_it_was_asked_for(tmp_path) -> None:
    """Everything changes in place right after `save` returns, again and again while it is being written."""
    model, optimizer = trained()
    saver = Saver(tmp_path, SPEC, None, keep_last=0)
    expected = {}
    for step in range(1, 6):
        learn(model, optimizer, step)
        expected[step] = copied(model, optimizer)
        trainer = {"list": [step]}
        saver.save(step, dict(model.named_parameters()), optimizer, trainer)
        trainer["list"].append(0)
        with torch.no_grad():
            for tensor in [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]:
                tensor.mul_(1.5)
    assert saver.wait() == str(tmp_path / "step-000005")
    for step, path in enumerate(list_steps(tmp_path), 1):
        again = load_model(path)
        fresh = torch.optim.AdamW(again.parameters(), fused=True)
        assert load_checkpoint(path, again, fresh) == {"step": step, "list": [step]}
        assert same(copied(again, fresh), expected[step])


@pytest.mark.parametrize(
    ("last", "every", "kept"), [(1, 0, [9]), (2, 0, [7, 9]), (0, 0, [1, 3, 5, 7, 9]), (1, 3, [3, 9])]
)
def test_what_is_kept(tmp_path, last, every, kept) -> None:
    model, optimizer = trained()
    for step in (1, 3, 5, 7, 9):
        save_checkpoint(tmp_path, step, model, None, optimizer, {}, last, every)
    assert [int(path.name[5:]) for path in list_steps(tmp_path)] == kept
    assert os.readlink(tmp_path / "latest") == "step-000009"
    assert len(os.listdir(tmp_path)) == len(kept) + 1


def test_the_layout_of_ranks_serves_one_process_too(tmp_path) -> None:
    """A trainer hands in the same things whether it is alone or not."""
    model, optimizer = trained()
    saver = Saver(tmp_path, SPEC, None, 0, group=saver_group(), layout=pieces)
    saver.save(1, dict(model.named_parameters()), optimizer, {})
    path = Path(saver.wait() or "")
    expected = copied(model, optimizer)
    again, fresh = trained(0)
    pieces.load_parts(again, torch.device("cpu"), WeightReader(path).read)
    load_state(path, dict(again.named_parameters()), fresh, pieces)
    assert same(copied(again, fresh), expected)


def test_steps_are_ordered_by_number(tmp_path) -> None:
    model, optimizer = trained(0)
    for step in (1_000_000, 999_999):
        save_checkpoint(tmp_path, step, model, None, optimizer, {}, 0)
    assert [path.name for path in list_steps(str(tmp_path) and tmp_path)] == ["step-999999", "step-1000000"]
    assert find_resume(tmp_path) == tmp_path / "step-1000000"
    assert list_steps(str(tmp_path)) == [f"{tmp_path}/step-999999", f"{tmp_path}/step-1000000"]


def test_the_specs_parameters_are_asked_for(tmp_path) -> None:
    model, optimizer = trained(0)
    parameters = dict(model.named_parameters())
    saver = Saver(tmp_path, SPEC, None, keep_last=0)
    with pytest.raises(PunaError, match=r"no rank holds norm\.weight"):
        saver.save(1, {name: p for name, p in parameters.items() if name != "norm.weight"}, optimizer, {})
    with pytest.raises(PunaError, match=r"embed is \[64, 64\], the spec says \[32, 64\]"):
        Saver(tmp_path, SPEC.replace(vocab_size=32), None, 0).save(1, parameters, optimizer, {})


# ---- trouble ----


def test_a_full_disk_keeps_the_previous_save(tmp_path, monkeypatch) -> None:
    """The disk fills up in the middle of the second save's weights; with space the same step is saved."""
    model, optimizer = trained()
    first = save_checkpoint(tmp_path, 5, model, None, optimizer, {}, 0)

    def fill(self, data) -> None:
        self._file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file.TensorFile, "_write", fill)
    with pytest.raises(PunaError, match=r"disk is full while writing .*step-000010") as caught:
        save_checkpoint(tmp_path, 10, model, None, optimizer, {}, 0)
    assert "free)" in caught.value.message
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000005"]
    assert find_resume(tmp_path) == first
    assert save_checkpoint(tmp_path, 10, model, None, optimizer, {}, 0).name == "step-000010"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(small_disk) -> None:
    """At every phase: the disk is filled up to leave less and less room for the next save."""
    model, optimizer = trained()
    save_checkpoint(small_disk / "run", 1, model, None, optimizer, {}, 0)
    size = sum(p.stat().st_size for p in (small_disk / "run/step-000001").rglob("*") if p.is_file())
    full = 0
    for share in (0.05, 0.2, 0.45, 0.7, 0.9, 0.97):
        free = os.statvfs(small_disk)
        filler = small_disk / "filler"
        filler.write_bytes(b"x" * int(free.f_bavail * free.f_frsize - share * size))
        with pytest.raises(PunaError, match=r"disk is full while writing .* free\)"):
            save_checkpoint(small_disk / "run", 2, model, None, optimizer, {}, 0)
        filler.unlink()
        assert sorted(os.listdir(small_disk / "run")) == ["latest", "step-000001"]
        full += 1
    assert full == 6
    assert verify(small_disk / "run" / "latest") == []
    save_checkpoint(small_disk / "run", 2, model, None, optimizer, {}, 0)


def test_a_really_full_disk_on_the_command_line(recipe, small_disk, tmp_path) -> None:
    """Exit code 2 and the way out; the run goes on once there is space."""
    file = tmp_path / "r.toml"
    file.write_text(to_toml(build(Recipe, {**recipe, "out": str(small_disk / "run")})))
    command = [sys.executable, "-m", "puna", "train", str(file), "--checkpoint.keep_last", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "the disk is full while writing" in done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert verify(small_disk / "run" / "latest") == []
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0


def test_what_a_kill_leaves_is_removed(tmp_path) -> None:
    model, optimizer = trained()
    first = save_checkpoint(tmp_path, 5, model, None, optimizer, {}, 0)
    (tmp_path / ".step-000010.tmp/state").mkdir(parents=True)
    (tmp_path / ".step-000004.gone/state").mkdir(parents=True)
    (tmp_path / "step-000009").mkdir()  # no manifest: not a save
    assert find_resume(tmp_path) == first
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000005", "step-000009"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path) -> None:
    """Step 5 is saved again: the old folder has stepped aside, the new one is not yet in its place."""
    model, optimizer = trained()
    first = save_checkpoint(tmp_path, 5, model, None, optimizer, {}, 0)
    (tmp_path / "latest").unlink()
    first.rename(tmp_path / ".step-000005.old")
    assert find_resume(tmp_path) == first
    assert verify(tmp_path / "latest") == []


def test_leftovers_in_a_run_do_no_harm(recipe) -> None:
    puna.train(recipe, {"train.steps": 5})
    run = recipe["out"]
    os.makedirs(f"{run}/.step-000010.tmp/state")
    assert puna.train(recipe)["step"] == 24
    assert not os.path.exists(f"{run}/.step-000010.tmp")


# ---- buckets ----


def test_a_model_loads_from_a_bucket(s3_bucket, tmp_path, monkeypatch) -> None:
    """`load_model` takes a save's URL or RUN/latest; files come once, are checked, and survive the cache's eviction."""
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    model, optimizer = trained()
    run = f"{s3_bucket}/deep/run"
    saver = Saver(run, SPEC, None, keep_last=1, asynchronous=False)
    for step in (1, 2):
        saver.save(step, dict(model.named_parameters()), optimizer, {"x": step})
    assert saver.wait() == f"{run}/step-000002"
    for url in (f"{run}/step-000002", f"{run}/latest", f"{run}/step-000002/"):
        loaded = load_model(url)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    folder = local_folder(f"{run}/latest")
    assert verify(folder) == []
    assert Spec.load(folder).vocab_size == 64
    assert load_checkpoint(folder, model, optimizer)["x"] == 2
    files.remove_tree(run)
    with pytest.raises(PunaError, match="no complete save"):
        load_model(f"{run}/step-000002")


def test_a_damaged_bucket_is_refused(s3_bucket, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    model, optimizer = trained()
    run = f"{s3_bucket}/run"
    saver = Saver(run, SPEC, None, keep_last=0, asynchronous=False)
    for step in (1, 2):
        saver.save(step, dict(model.named_parameters()), optimizer, {})
    url = f"{run}/step-000002/model.safetensors"
    data = bytearray(files.read_file(url))
    data[-5] ^= 8
    files.write_file(url, bytes(data))
    assert verify(f"{run}/step-000002") == ["model.safetensors"]
    with pytest.raises(PunaError, match=r"step-000002 is damaged: 1 files.*model.safetensors") as caught:
        find_resume(run)
    assert f"{run}/step-000001" in caught.value.hint
    with pytest.raises(PunaError, match="is corrupt: sha256"):
        load_model(f"{run}/step-000002")


@pytest.mark.parametrize("fault", ["drop", "403"])
def test_a_store_that_vanishes_keeps_the_saves_before(s3_bucket, fault_proxy, tmp_path, monkeypatch, fault) -> None:
    """After the weights are in the bucket every write fails: one clear error, and a resume that finds the save before."""
    monkeypatch.setattr("puna.base.objects.FIRST_WAIT", 0.001)
    monkeypatch.setattr("puna.base.objects.LONGEST_WAIT", 0.002)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    model, optimizer = trained()
    run = f"{s3_bucket}/run"
    saver = Saver(run, SPEC, None, keep_last=0)
    saver.save(1, dict(model.named_parameters()), optimizer, {})
    assert saver.wait() == f"{run}/step-000001"
    fault_proxy.script("pass", "pass", *[fault] * 100, kind="put")
    saver.save(2, dict(model.named_parameters()), optimizer, {})
    with pytest.raises(
        PunaError, match=r"did not answer after 6 tries" if fault == "drop" else "no permission to write"
    ):
        saver.wait()
    assert os.listdir(tmp_path / "temporary") == []
    fault_proxy.calm()
    assert find_resume(run) == f"{run}/step-000001"
    assert files.list_folders(run) == ["step-000001"]
    saver.save(2, dict(model.named_parameters()), optimizer, {})
    assert saver.wait() == f"{run}/step-000002"
    assert checkpoint.list_steps(run) == [f"{run}/step-000001", f"{run}/step-000002"]
