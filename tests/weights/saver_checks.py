"""Checks that run on ranks (parallel/ranks.py): saves from one mesh, loads on another, and saves that are broken off.

Rounds run one after the other and meet in one folder: what four ranks save, two, one and again four ranks load.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from parallel.apply_checks import SPEC as PLAIN
from parallel.apply_checks import forward, samples, together
from puna.base import files, objects
from puna.base.console import PunaError
from puna.model.transformer import Transformer
from puna.parallel import loss as parallel_loss
from puna.parallel import pieces
from puna.parallel.apply import Options, parallelize
from puna.parallel.degrees import Degrees
from puna.parallel.mesh import build_mesh, data_ranks, sum_over_data
from puna.parallel.replicas import unwrap
from puna.weights import runs, saver, tensor_file
from puna.weights.agree import saver_group
from puna.weights.checkpoint import find_resume, list_steps, verify
from puna.weights.fetch import local_folder
from puna.weights.reader import WeightReader
from puna.weights.saver import Saver
from puna.weights.state import load_state

FOLDER = Path(os.environ.get("PUNA_TEST_SAVES", "/nonexistent"))
BUCKET = os.environ.get("PUNA_TEST_BUCKET", "")
SPEC = PLAIN.replace(qkv_bias=True, output_bias=True, mlp_bias=True, num_key_value_heads=2)
SMALL_FILES = (20_000, 10**9)  # so that every rank has a file to write

_group: list[Any] = []


def group() -> Any:
    """One gloo group for all savers of this process; a killed rank shows after 20 s at the latest."""
    if not _group:
        _group.append(saver_group(timedelta(seconds=20)))
    return _group[0]


class Setting:
    """A model on a mesh with an optimizer, its weights either drawn or read from a save."""

    def __init__(self, degrees: dict[str, int], options: Options | None = None, save: Path | None = None):
        self.mesh = build_mesh(Degrees(**degrees), "cpu")
        self.pipeline = degrees.get("pp", 1) > 1
        with torch.device("meta"):
            model = Transformer(SPEC)
        fill = None
        if save is not None:
            reader = WeightReader(save)
            assert reader.spec.replace(dtype=None) == SPEC.replace(dtype=None)
            fill = partial(fill_parts, reader)
        cut = partial(self._stage, fill=fill) if self.pipeline else partial(self._cut, options=options, fill=fill)
        self.model = model = cut(model)
        self.parameters = dict(unwrap(model).named_parameters())
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, fused=True)

    def _cut(self, model: Transformer, options: Options | None, fill: Any) -> nn.Module:
        return parallelize(model, self.mesh, options, seed=3, fill=fill)

    def _stage(self, model: Transformer, fill: Any) -> nn.Module:
        """Half of the layers on half of the ranks, each cut by FSDP2: what a rank of a pipeline holds."""
        last = self.mesh["pp"].get_local_rank() == 1
        names = {n for n, _ in model.named_parameters()}
        mine = {n for n in names if n.startswith(("layers.1", "norm", "lm_head")) == last}
        for name in names - mine:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, None)
        fully_shard(model, mesh=self.mesh["dp_shard"])
        if fill is None:
            model.to_empty(device="cpu")
            for name, parameter in model.named_parameters():
                generator = torch.Generator().manual_seed(len(name))
                whole = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.data.to_local().copy_(whole[pieces.pieces_of(parameter)])
        else:
            fill(model, torch.device("cpu"), False)
        return model

    def step(self) -> float:
        """One optimizer step over this rank's share of the samples; the mean loss (a pipeline's half has none)."""
        if self.pipeline:
            generator = torch.Generator().manual_seed(dist.get_rank())
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
                parameter.grad.to_local().normal_(generator=generator)
            self.optimizer.step()
            return 0.0
        index, count = data_ranks(self.mesh)
        batch = together(samples(SPEC.vocab_size)[index * 8 // count : (index + 1) * 8 // count])
        counted = sum_over_data(torch.tensor(float((batch.targets_T >= 0).sum())), self.mesh)
        loss, nll = forward(self.model, batch, parallel_loss.cross_entropy)
        (loss / counted).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return (sum_over_data(nll.detach().clone(), self.mesh) / counted).item()

    def whole(self) -> dict[str, Tensor]:
        """Weights and optimizer state, whole, of the parameters that this rank has a part of."""
        found = {}
        for name, parameter in self.parameters.items():
            found[name] = whole(parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"{key}/{name}"] = whole(value)
        return found


def fill_parts(reader: WeightReader, model: nn.Module, device: torch.device, offload: bool) -> None:
    pieces.load_parts(model, device, reader.read, offload)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()  # a replica would be an alias


def saver_of(run: str | Path, **rest: Any) -> Saver:
    options = {"keep_last": 0, "group": group(), "layout": pieces, "file_bytes": SMALL_FILES} | rest
    return Saver(run, SPEC, None, **options)


LAYOUTS: dict[str, tuple[int, dict[str, int], Options]] = {
    "fsdp4": (4, {"dp_shard": 4}, Options()),
    "hsdp": (4, {"dp_replicate": 2, "dp_shard": 2}, Options()),
    "fsdp_tp": (4, {"dp_shard": 2, "tp": 2}, Options()),
    "tp4": (4, {"tp": 4}, Options()),
    "ddp": (4, {"dp_replicate": 4}, Options()),
    "offload": (4, {"dp_shard": 4}, Options(cpu_offload=True)),
    "pipeline": (4, {"pp": 2, "dp_shard": 2}, Options()),
    "fsdp2": (2, {"dp_shard": 2}, Options()),
    "tp2": (2, {"tp": 2}, Options()),
    "single": (1, {"dp_shard": 1}, Options()),
}


def save_from(name: str) -> dict[str, int]:
    """Two steps, a save, two more steps at once: the save holds what was there when it began."""
    _, degrees, options = LAYOUTS[name]
    setting = Setting(degrees, options)
    setting.step(), setting.step()
    expected = setting.whole()
    writer = saver_of(FOLDER / name)
    torch.manual_seed(100 + dist.get_rank())
    writer.save(2, setting.parameters, setting.optimizer, {"layout": name})
    drawn = torch.rand(3)
    losses = [setting.step(), setting.step()]  # changes every number while the save is being written
    assert writer.wait() == str(FOLDER / name / "step-000002")
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, expected)
    if dist.get_rank() == 0:
        truth: dict[str, Tensor] = {}
        for part in told:
            truth |= part
        torch.save({"truth": truth, "losses": losses}, FOLDER / f"{name}.pt")
    torch.save(drawn, FOLDER / f"{name}-random-{dist.get_rank()}.pt")
    dist.barrier()
    save = FOLDER / name / "step-000002"
    assert verify(save, (dist.get_rank(), dist.get_world_size())) == []
    weights = list(save.glob("model*.safetensors"))
    assert len(weights) == (1 if name == "single" else len(weights)) > 0
    return {"files": len(weights), "states": len(list(save.glob("state/__*")))}


def load_on(name: str, source: str) -> float:
    """The save of another layout on this one: weights and optimizer bit for bit, the next two losses to 1e-6."""
    _, degrees, options = LAYOUTS[name]
    save = find_resume(FOLDER / source, group() if dist.get_world_size() > 1 else None)
    assert save is not None
    setting = Setting(degrees, options, save)
    trainer = load_state(save, setting.parameters, setting.optimizer, pieces, dict(shapes()))
    assert trainer == {"step": 2, "layout": source}
    stored = torch.load(FOLDER / f"{source}.pt")
    found = setting.whole()
    missing = stored["truth"].keys() - found.keys()
    assert setting.pipeline or not missing, missing
    for key, value in found.items():
        assert torch.equal(value, stored["truth"][key]), key
    if LAYOUTS[source][0] == dist.get_world_size():
        assert torch.equal(torch.rand(3), torch.load(FOLDER / f"{source}-random-{dist.get_rank()}.pt"))
    if setting.pipeline or source == "pipeline":
        return 0.0
    losses = [setting.step(), setting.step()]
    worst = max(abs(a - b) for a, b in zip(losses, stored["losses"], strict=True))
    assert worst <= 1e-6, (losses, stored["losses"])
    return worst


def shapes() -> Iterator[tuple[str, torch.Size]]:
    with torch.device("meta"):
        yield from ((name, p.shape) for name, p in Transformer(SPEC).named_parameters())


def named(check: Callable[..., Any], *arguments: Any) -> Any:
    made = partial(check, *arguments)
    made.__name__ = "-".join([check.__name__, *arguments])  # type: ignore[attr-defined]
    return made


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def one_failing_rank_is_an_error_on_all() -> list[str]:
    """The disk of one rank is full at any phase of a save: PunaError on every rank, nothing left, and then it works."""
    import torch.distributed.checkpoint as dcp

    run, rank = FOLDER / "failing", dist.get_rank()
    setting = Setting({"dp_shard": 2, "tp": 2})
    setting.step()
    writer = saver_of(run)
    writer.save(1, setting.parameters, setting.optimizer, {})
    assert writer.wait() == str(run / "step-000001")
    places = [(2, tensor_file.TensorFile, "_write"), (3, dcp.FileSystemWriter, "write_data"),
              (1, saver, "digest_file"), (0, saver, "write_configs"), (0, runs, "swap_in"),
              (0, runs.LocalRun, "begin"), (3, runs.LocalRun, "stage")]  # fmt: skip
    messages = []
    for number, (failing, owner, name) in enumerate(places):
        with replaced(owner, name, full_disk) if rank == failing else replaced(saver, "MANIFEST", saver.MANIFEST):
            writer.save(2 + number, setting.parameters, setting.optimizer, {})
            with pytest.raises(PunaError, match=f"rank {failing}: ") as caught:
                writer.wait()
        messages.append(caught.value.message)
        dist.barrier()
        assert sorted(os.listdir(run)) == ["latest", "step-000001"], (name, os.listdir(run))
        dist.barrier()
    assert " free)" in messages[0], messages
    assert "the disk is full while writing" in messages[0], messages
    assert "the disk is full while writing" in messages[1], messages
    assert find_resume(run, group()) == run / "step-000001"
    writer.save(20, setting.parameters, setting.optimizer, {})
    assert writer.wait() == str(run / "step-000020")
    assert verify(run / "step-000020") == []
    return messages


def a_failed_save_is_told_by_check_and_by_the_next_save() -> None:
    run = FOLDER / "told"
    setting = Setting({"dp_shard": 4})
    writer = saver_of(run)
    for tell in (writer.check, lambda: writer.save(2, setting.parameters, setting.optimizer, {})):
        with replaced(tensor_file.TensorFile, "_write", full_disk):
            writer.save(1, setting.parameters, setting.optimizer, {})
            assert writer._thread is not None
            writer._thread.join()
        with pytest.raises(PunaError, match="disk is full"):
            tell()
        assert writer.check() is None  # told once


def a_folder_that_is_not_shared_is_refused() -> None:
    """Ranks with disks of their own: said so at once, with the way out."""
    setting = Setting({"dp_shard": 4})
    run = FOLDER / ("unshared" if dist.get_rank() != 2 else "elsewhere")
    writer = saver_of(run, asynchronous=False)
    with pytest.raises(PunaError, match=r"rank 2: .*elsewhere is not shared between nodes") as caught:
        writer.save(1, setting.parameters, setting.optimizer, {})
    assert "s3://" in caught.value.hint
    dist.barrier()
    assert not list(run.glob(".step*"))


def files_are_written_by_many_and_small_models_by_one() -> dict[str, Any]:
    """Every rank writes weights where they are large enough; else one plain model.safetensors. A rank has its share."""
    found = {}
    for name, sizes in (("many", SMALL_FILES), ("one", (10**9, 10**10))):
        for layout in ("fsdp4", "ddp", "hsdp"):
            _, degrees, options = LAYOUTS[layout]
            setting = Setting(degrees, options)
            setting.step()
            writer = saver_of(FOLDER / f"{name}-{layout}", file_bytes=sizes)
            writer.save(1, setting.parameters, setting.optimizer, {})
            save = Path(writer.wait() or "")
            tensors = sorted(save.glob("*.safetensors"))
            assert (name == "one") == ([f.name for f in tensors] == ["model.safetensors"])
            held = sum(len(load_file(f)) for f in tensors)
            assert held == len(dict(shapes()))
            if name == "many":
                found[layout] = [len(tensors), len(list((save / "state").glob("__*")))]
                share = sum(t.nbytes for t in writer._memory._buffers.values())
                total = 3 * sum(p.numel() * 4 for p in setting.parameters.values())
                assert share < 0.6 * total, (layout, share, total)  # no rank copies all of it
    return found


def one_step_is_kept_twice() -> None:
    """Saving a step again replaces it; keep_last and keep_every choose what stays."""
    run = FOLDER / "kept"
    setting = Setting({"dp_shard": 4})
    writer = saver_of(run, keep_last=2, keep_every=4, asynchronous=False)
    for step in (1, 2, 3, 4, 5, 6, 7, 8, 9, 9):
        writer.save(step, setting.parameters, setting.optimizer, {"x": step})
    dist.barrier()
    assert [save.name for save in list_steps(run)] == [f"step-{step:06d}" for step in (4, 8, 9)]
    assert os.readlink(run / "latest") == "step-000009"
    assert sorted(os.listdir(run)) == ["latest", "step-000004", "step-000008", "step-000009"]


def damage_is_found_by_all_ranks_together() -> None:
    """Each rank reads its share of the files; the one answer is the same on all."""
    run = FOLDER / "damaged"
    setting = Setting({"dp_shard": 4})
    writer = saver_of(run, asynchronous=False)
    writer.save(1, setting.parameters, setting.optimizer, {})
    writer.save(2, setting.parameters, setting.optimizer, {})
    names = sorted(p for p in (run / "step-000002").rglob("*") if p.is_file())
    for path in names:
        data = bytearray(path.read_bytes())
        dist.barrier()
        if dist.get_rank() == 0:
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        dist.barrier()
        with pytest.raises(PunaError, match=f"1 files differ.*{path.name}") as caught:
            find_resume(run, group())
        assert "step-000001" in caught.value.hint
        dist.barrier()
        if dist.get_rank() == 0:
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        dist.barrier()
    assert find_resume(run, group()) == run / "step-000002"


def a_bucket_holds_a_run() -> None:
    """Two ranks save into s3://, drop old saves, resume from there; then the store vanishes in the middle of a save."""
    assert BUCKET
    run = f"{BUCKET}/run"
    setting = Setting({"dp_shard": 2})
    setting.step()
    expected = setting.whole()
    writer = saver_of(run, keep_last=2)
    for step in (1, 2, 3):
        writer.save(step, setting.parameters, setting.optimizer, {"x": step})
    assert writer.wait() == f"{run}/step-000003"
    assert list_steps(run) == [f"{run}/step-000002", f"{run}/step-000003"]
    assert files.read_file(f"{run}/latest") == b"step-000003"
    assert verify(f"{run}/step-000003") == []
    if dist.get_rank() == 0:
        files.write_file(f"{run}/step-000009/model.safetensors", b"left by a killed save")
    dist.barrier()
    assert find_resume(run, group()) == f"{run}/step-000003"
    assert list(files.list_folders(run)) == ["step-000002", "step-000003"]
    folder = local_folder(f"{run}/latest")
    again = Setting({"dp_shard": 2}, save=folder)
    assert load_state(folder, again.parameters, again.optimizer, pieces)["x"] == 3
    for key, value in again.whole().items():
        assert torch.equal(value, expected[key]), key
    _the_store_vanishes(run, writer, setting)


def _the_store_vanishes(run: str, writer: Saver, setting: Setting) -> None:
    endpoint, real = os.environ["AWS_ENDPOINT_URL"], runs.BucketRun.hand_in

    def vanish(self: Any, *arguments: Any) -> None:
        os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"
        real(self, *arguments)

    with replaced(objects, "FIRST_WAIT", 0.01), replaced(objects, "LONGEST_WAIT", 0.02):
        with replaced(runs.BucketRun, "hand_in", vanish):
            writer.save(4, setting.parameters, setting.optimizer, {})
            with pytest.raises(PunaError, match=r"rank 0 \(and 1 more of 2 ranks\): .*did not answer after 6 tries"):
                writer.wait()
        dist.barrier()
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        assert find_resume(run, group()) == f"{run}/step-000003"
        assert not list(Path(os.environ["TMPDIR"]).glob("puna-save-*"))
        writer.save(4, setting.parameters, setting.optimizer, {})
        assert writer.wait() == f"{run}/step-000004"


def a_killed_rank_ends_the_others() -> None:
    """SIGKILL of one rank while it writes weights: an error on the others, the save before stays, nothing hangs."""
    run, rank = FOLDER / "killed", dist.get_rank()
    setting = Setting({"dp_shard": 4})
    setting.step()
    writer = saver_of(run)
    writer.save(1, setting.parameters, setting.optimizer, {})
    writer.wait()
    dist.barrier()
    if rank == 2:
        with replaced(tensor_file.TensorFile, "add", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
            writer.save(2, setting.parameters, setting.optimizer, {})
            threading.Event().wait(60)
    writer.save(2, setting.parameters, setting.optimizer, {})
    try:
        outcome = {"ok": False, "text": str(writer.wait())}
    except PunaError as error:
        outcome = {"ok": True, "text": error.message, "hint": error.hint}
    (FOLDER / f"killed-{rank}.json").write_text(json.dumps(outcome))


def after_the_kill() -> None:
    """The next start removes what is half-written and finds the save before."""
    run = FOLDER / "killed"
    assert (run / ".step-000002.tmp").exists() or not list(run.glob(".step*"))
    (run / ".step-000003.tmp").mkdir(exist_ok=True)
    assert find_resume(run) == run / "step-000001"
    assert sorted(os.listdir(run)) == ["latest", "step-000001"]


class Rounds:
    """Like a dict of worlds, but a world may come twice: four ranks load what two and one have saved."""

    def __init__(self, *rounds: tuple[int, list[Any]]):
        self.rounds = rounds

    def items(self) -> tuple[tuple[int, list[Any]], ...]:
        return self.rounds


def _saves(world: int) -> list[Any]:
    return [named(save_from, name) for name, (ranks, _, _) in LAYOUTS.items() if ranks == world]


def _loads(pairs: str) -> list[Any]:
    return [named(load_on, *pair.split("<")) for pair in pairs.split()]


WORLDS = Rounds(
    (4, [*_saves(4), one_failing_rank_is_an_error_on_all, a_failed_save_is_told_by_check_and_by_the_next_save,
         a_folder_that_is_not_shared_is_refused, files_are_written_by_many_and_small_models_by_one,
         one_step_is_kept_twice, damage_is_found_by_all_ranks_together]),
    (2, [*_saves(2), *_loads("fsdp2<fsdp4 fsdp2<fsdp_tp tp2<fsdp4 tp2<hsdp tp2<tp2 fsdp2<tp2 tp2<pipeline"),
         a_bucket_holds_a_run]),
    (1, [*_saves(1), *_loads("single<tp2 single<fsdp_tp single<hsdp single<ddp single<offload single<pipeline")]),
    (4, [*_loads("fsdp4<tp2 fsdp4<single fsdp_tp<fsdp4 fsdp_tp<single fsdp_tp<fsdp_tp hsdp<fsdp_tp tp4<fsdp2"),
         *_loads("tp4<hsdp ddp<fsdp_tp offload<tp4 pipeline<fsdp_tp pipeline<pipeline pipeline<single"),
         a_killed_rank_ends_the_others]),
    (1, [after_the_kill]),
)  # fmt: skip
