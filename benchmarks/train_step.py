"""Training step on this CPU against transformers' model in a plain loop: tokens/s, fp32, same shape, same batch.

    python benchmarks/train_step.py            # 5 rounds, about 6 minutes on 2 cores

Ours is `Trainer.step` as `puna train` runs it. Theirs is LlamaForCausalLM with its default attention (sdpa),
`model(ids, labels=ids).loss.backward()`, clipping and `torch.optim.AdamW`.
"""

from __future__ import annotations

import time

import torch
from side_by_side import arguments, compare, report, shape

BATCH = {"10M": (8, 512), "100M": (2, 512)}


def ours(size: str) -> tuple:
    from puna.base.config import build
    from puna.base.hardware import keep_freed_memory
    from puna.data.pack import Batch
    from puna.model.spec import Spec
    from puna.ops.attention import PackedCausal
    from puna.parallel.degrees import Degrees
    from puna.parallel.launch import Meeting
    from puna.parallel.materialise import init_weights
    from puna.parallel.world import Settings, World
    from puna.train.compute import build_compute
    from puna.train.interrupt import Interrupt
    from puna.train.loop import Trainer
    from puna.train.optim import build_optimizer
    from puna.train.recipe import Recipe

    keep_freed_memory()
    count, length = BATCH[size]
    trainer = Trainer.__new__(Trainer)  # everything but the text and the files
    trainer.recipe = build(Recipe, {"optim": {"lr": 1e-4, "warmup_steps": 0}})
    spec, cpu = Spec.from_config(shape(size)), torch.device("cpu")
    trainer.world = World(Meeting(), Degrees(), cpu, Settings(), needs_mesh=False)
    trainer.compute = build_compute(trainer.recipe, spec, trainer.world, lambda model, *_: init_weights(model, cpu, 0))
    trainer.optimizer = build_optimizer(trainer.compute.parameters.values(), trainer.recipe.optim)
    trainer.scaler, trainer.interrupt = torch.amp.GradScaler("cpu", enabled=False), Interrupt()
    trainer.step_done = 0
    ids = torch.randint(0, 8000, (count * length,))
    targets = ids.roll(-1)
    batch = Batch(ids, torch.arange(length).repeat(count), targets, PackedCausal.of([length] * count), len(ids))
    return lambda: trainer.step([batch]), count * length


def transformers_loop(size: str) -> tuple:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = shape(size)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(0, 8000, BATCH[size])

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step, ids.numel()


def worker(who: str, size: str) -> None:
    torch.manual_seed(0)
    step, tokens = (ours if who == "puna" else transformers_loop)(size)
    for _ in range(2):
        step()
    steps = 4
    started = time.perf_counter()
    for _ in range(steps):
        step()
    print(tokens * steps / (time.perf_counter() - started))


if __name__ == "__main__":
    given = arguments()
    if given.worker:
        worker(*given.worker)
    else:
        cases = [[size] for size in (given.cases or BATCH)]
        rows = compare(__file__, cases, "puna", "transformers", given.rounds, "tok/s")
        report("train_step", rows, "puna", "transformers", "tok/s")
