"""Saves: what they cost the training, how fast 1, 2 and 4 writers are, and how long a load takes.

`python benchmarks/checkpoint.py [--rounds N] [--folder DIR]` writes benchmarks/results/checkpoint.json. The model has
10M parameters in fp32 with AdamW's state: 0.13 GB a save. What is compared is measured in turns in one run, each
launch in processes of its own; every writer ends with fsync, ours also with a sha256 of every file. `torch.save` and
`safetensors` write the same tensors from one process, without a checksum.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from side_by_side import RESULTS, about, shape

from puna.base.console import table
from puna.base.hardware import keep_freed_memory
from puna.base.storage import sync_tree
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.basic import cross_entropy
from puna.parallel import pieces
from puna.weights.agree import saver_group
from puna.weights.checkpoint import load_checkpoint, verify
from puna.weights.folder import empty_model, load_model
from puna.weights.saver import Saver

SPEC = Spec.from_config(shape("10M"))
TOKENS = 512


def trained() -> tuple[Transformer, torch.optim.Optimizer]:
    """The model after one optimizer step: random weights, state that is there."""
    model = empty_model(SPEC, torch.float32, torch.device("cpu"))
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def bytes_of(save: Path) -> int:
    return sum(path.stat().st_size for path in save.rglob("*") if path.is_file())


# ---- beside training ----


def beside_training(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a normal step, of one that saves, of the copy alone, and of the steps while a save is written."""
    keep_freed_memory()
    model, optimizer = trained()
    ids = torch.randint(0, 8000, (TOKENS,))
    inputs = (ids, torch.arange(TOKENS), PackedCausal.of([TOKENS]))

    def step() -> None:
        loss, _ = cross_entropy(model(*inputs), model.head_weight, ids.roll(-1), 0.0)
        (loss / TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed(work: Any) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    saver = Saver(folder / "run", SPEC, None, keep_last=1)
    parameters = dict(model.named_parameters())
    saver.save(0, parameters, optimizer, {})  # buffers are made once
    saver.wait()
    owners = dict.fromkeys(parameters, 0)
    found: dict[str, list[float]] = {"normal": [], "copy": [], "saves": [], "in_flight": [], "blocking": []}
    for number in range(1, rounds + 1):
        found["normal"] += [timed(step) for _ in range(4)]
        found["copy"].append(timed(lambda: saver._memory.take(parameters, owners, optimizer, 0)))
        found["saves"].append(timed(lambda n=number: (step(), saver.save(n, parameters, optimizer, {}))))
        while saver._thread is not None and saver._thread.is_alive():
            found["in_flight"].append(timed(step))
        saver.wait()
        found["blocking"].append(timed(lambda n=number: (saver.save(n, parameters, optimizer, {}), saver.wait())))
    seconds = {name: statistics.median(values) for name, values in found.items()}
    pairs = zip(found["saves"], found["copy"], strict=True)
    ratio = statistics.median(saves / (seconds["normal"] + copy) for saves, copy in pairs)
    row = {"case": "beside training", **{f"{name}_s": value for name, value in seconds.items()}}
    row |= {
        "saving_step_over_normal_plus_copy": ratio,
        "in_flight_over_normal": seconds["in_flight"] / seconds["normal"],
    }
    return [row | {"steps_in_flight": len(found["in_flight"]) / rounds}]


# ---- writers ----


def write(kind: str, folder: Path) -> float:
    """GB/s of one save in this process (one of several under torchrun's variables)."""
    torch.set_num_threads(1)
    model, optimizer = trained()
    if kind in ("torch.save", "safetensors"):
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        state = {f"{key}/{n}": v for n, p in model.named_parameters() for key, v in optimizer.state[p].items()}
        began = time.perf_counter()
        folder.mkdir()
        save = torch.save if kind == "torch.save" else save_file
        save(tensors, folder / "model")
        save(state, folder / "state")
        sync_tree(folder)
        return bytes_of(folder) / 1e9 / (time.perf_counter() - began)
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        store = dist.FileStore(str(folder.parent / "store"), world)
        dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=world)
    parameters = dict(model.named_parameters())
    if kind == "shards":
        parameters, optimizer = _cut(model)
    smallest = 4 << 20  # the model is small; its files are as many as its writers
    group, layout = saver_group(), pieces if world > 1 else None
    saver = Saver(folder, SPEC, None, 1, group=group, layout=layout, file_bytes=(smallest, 5 * 10**9))
    saver.save(1, parameters, optimizer, {})
    saver.wait()
    began = time.perf_counter()
    saver.save(2, parameters, optimizer, {})
    path = saver.wait()
    return bytes_of(Path(path or "")) / 1e9 / (time.perf_counter() - began)


def _cut(model: Transformer) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    """FSDP2 over all ranks: every tensor has to be collected on its writer."""
    from torch.distributed.fsdp import fully_shard

    for block in model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return dict(model.named_parameters()), optimizer


def launch(kind: str, world: int, folder: Path) -> float:
    """Run `write` in `world` processes; rank 0's figure."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, __file__, "--worker", kind, str(Path(place) / "run")]
        env = {**os.environ, "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(command, env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for rank in range(world)
        ]
        outputs = [process.communicate(timeout=600) for process in ranks]
        if any(process.returncode for process in ranks):
            raise SystemExit("\n".join(error.decode()[-2000:] for _, error in outputs))
        return float(outputs[0][0].split()[-1])


def writers(folder: Path, rounds: int) -> list[dict[str, Any]]:
    cases = [
        ("torch.save", 1),
        ("safetensors", 1),
        ("copies", 1),
        ("copies", 2),
        ("copies", 4),
        ("shards", 2),
        ("shards", 4),
    ]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            found[case].append(launch(*case, folder))
    return [{"case": f"{kind}, {world} writers", "gb_per_s": statistics.median(values), "low": min(values),
             "high": max(values)} for (kind, world), values in found.items()]  # fmt: skip


# ---- loads ----


def loads(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds to verify a save, to load its weights and its state; and torch.load of the same tensors."""
    model, optimizer = trained()
    saver = Saver(folder / "load", SPEC, None, 1, asynchronous=False)
    saver.save(1, dict(model.named_parameters()), optimizer, {})
    save, other = Path(saver.wait() or ""), folder / "tensors.pt"
    state = {f"{key}/{n}": v for n, p in model.named_parameters() for key, v in optimizer.state[p].items()}
    torch.save(dict(model.named_parameters()) | state, other)
    actions = {"verify_s": lambda: verify(save), "weights_s": lambda: load_model(save),
               "state_s": lambda: load_checkpoint(save, model, optimizer),
               "torch_load_s": lambda: torch.load(other, weights_only=True)}  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            found[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values) for name, values in found.items()}
    return [{"case": "load", "gb": bytes_of(save) / 1e9, **seconds}]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write; a temporary folder if not given")
    chosen = parser.parse_args()
    if chosen.worker:
        print(write(chosen.worker[0], Path(chosen.worker[1])))
        return
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        rows = []
        for measured in (beside_training, writers, loads):
            found = measured(folder, chosen.rounds)
            rows += found
            for row in found:
                cells = [(k, f"{v:,.3f}" if isinstance(v, float) else str(v)) for k, v in row.items()]
                print(table(cells), end="\n\n", flush=True)
    finally:
        shutil.rmtree(folder)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint.json").write_text(json.dumps({**about("checkpoint"), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
