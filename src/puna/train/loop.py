"""Training: a recipe in, a Hugging Face folder per save out. `Trainer.step` is the whole machine."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from puna.base import files
from puna.base.config import as_dict, build, read_toml
from puna.base.console import PunaError, count, curve, say, table
from puna.base.hardware import describe, keep_freed_memory
from puna.base.storage import disk_error
from puna.data.gate import StoreGate
from puna.data.loader import Loader
from puna.data.pack import Batch
from puna.model.transformer import Transformer
from puna.ops.linear import describe as describe_kernels
from puna.parallel.launch import Meeting
from puna.text.tokenizer import Tokenizer
from puna.train.compute import build_compute
from puna.train.fake_quant import describe as describe_quant
from puna.train.fake_quant import training_config
from puna.train.interrupt import Interrupt
from puna.train.metrics import HEADER, Metrics, WaitReport, plot_png, print_step
from puna.train.optim import build_optimizer, learning_rate, set_learning_rate
from puna.train.recipe import Recipe
from puna.train.saves import Saves
from puna.train.setup import check_recipe, check_resume, open_world
from puna.train.shape import choose_spec, vocab_error
from puna.train.sources import open_sources


def train(recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run a recipe (a TOML file or its tables) to its end, continuing what `out` already holds.

    Alone, or as one rank under torchrun. Returns the figures and paths that the command line prints as JSON. Raises
    PunaError for anything a user can mend; what one rank raises ends all of them.
    """
    meeting = Meeting()
    with meeting.together():
        tables = recipe if isinstance(recipe, Mapping) else read_toml(recipe)
        trainer = Trainer(build(Recipe, tables, overrides), meeting)
        figures = trainer.run()
    trainer.world.close()
    return figures


class Trainer:
    """One run, on each of its ranks. Its state is the weights, the optimizer, the loss scale and the steps done."""

    def __init__(self, recipe: Recipe, meeting: Meeting | None = None):
        check_recipe(recipe)
        keep_freed_memory()
        self.recipe, self.run_folder = recipe, Path(recipe.out)
        self.tokenizer = Tokenizer.load(recipe.data.tokenizer or recipe.model.path)
        self.saves = Saves(recipe, self.tokenizer, meeting := meeting or Meeting())
        spec = self.saves.spec or choose_spec(recipe.model, self.tokenizer, recipe.data.seq_len)
        if self.tokenizer.vocab_size > spec.vocab_size:
            raise vocab_error(self.tokenizer.vocab_size, spec.vocab_size)
        self.world = open_world(recipe, spec, meeting)
        self.saves.open(self.world, spec)
        self.sources = open_sources(recipe, self.tokenizer)
        self.quant = training_config(recipe.quant)
        self.compute = build_compute(recipe, spec, self.world, self.saves.fill)
        self.loader = self._open_loader()
        self.optimizer = build_optimizer(self.compute.parameters.values(), recipe.optim)
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.compute.dtype == torch.float16)
        self.interrupt = Interrupt(recipe.checkpoint.grace)
        self.stopping = False
        self.step_done = self._resume()
        self.metrics = Metrics(self.run_folder, self.step_done, write=self.world.rank == 0)
        self._seconds: list[float] = []
        self._waits = WaitReport()

    @property
    def model(self) -> Transformer:
        """The Transformer, or this rank's part of it."""
        return self.compute.model

    def run(self) -> dict[str, Any]:
        """Train to the last step; an interrupt saves and returns early with `interrupted`."""
        try:
            return self._run()
        except OSError as error:  # metrics and curve are written outside the saves: their disk may be full, too
            raise disk_error(error, self.run_folder) from error
        except RuntimeError as error:
            raise self.world.explain(error, self.step_done + 1) from error
        finally:
            self.loader.close()
            gc.unfreeze()

    def _run(self) -> dict[str, Any]:
        self._print_card()
        gc.collect()
        gc.freeze()  # what is here stays: the collector need not walk through all of torch again and again
        first = self.step_done + 1
        with self.interrupt:
            while self.step_done < self.recipe.train.steps and not self._told_to_stop():
                self._one_step()
                if self.step_done == first:
                    self.world.shorten_timeouts()
                if self.step_done % self.recipe.checkpoint.every == 0:
                    self._save()
            self._save()
            self.saves.wait()
        return self._finish(self._told_to_stop())

    def step(self, batches: list[Batch]) -> tuple[float, float]:
        """One optimizer step over this rank's micro-batches: (mean loss per scored token in nats, gradient norm).

        Every scored token of the step weighs the same, however ranks and micro-batches cut them.
        """
        self.compute.round_numbers(self.step_done >= self.recipe.quant.start_step)
        (valid,) = self.world.sum(self.compute.scored(batches))
        scale = self.scaler.scale(torch.tensor(1 / max(1.0, valid), device=self.world.device))
        nll = self.compute.step(batches, scale)
        set_learning_rate(self.optimizer, self._learning_rate())
        self.scaler.unscale_(self.optimizer)
        norm = self.compute.clip(self.recipe.optim.grad_clip).item()
        total, stops = self.world.sum(nll, self.interrupt.seen)
        self.stopping = stops > 0  # one rank that was told to stop stops all, after the same step
        mean = total / max(1.0, valid)
        self._refuse_divergence(mean, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return mean, norm

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on what is held out: evenly spread windows, none overlapping, the first tokens of each without context.

        With several sources also one loss for each, as 'val_loss/NAME'. Empty if nothing is held out. Under [quant] the
        loss of the rounded model, whatever the step: that one will be served.
        """
        self.compute.round_numbers(True)
        held, found = self.sources.held, {}
        limit = max(1, self.recipe.validation.max_tokens // self.recipe.data.seq_len // max(1, len(held)))
        nll = valid = size = 0.0
        for name, part in held.items():
            batches = list(part.batches(self.compute.micro_size, limit, self.world.data_rank, self.world.data_ranks))
            part_nll, part_valid = self.world.sum(self.compute.score(batches), self.compute.scored(batches))
            found[f"val_loss/{name}"] = part_nll / max(1.0, part_valid)
            nll, valid, size = nll + part_nll, valid + part_valid, size + part_valid * part.bytes_per_token()
        if not held:
            return {}
        total = {"val_loss": nll / max(1.0, valid), "val_bits_per_byte": nll / math.log(2) / max(1.0, size)}
        return total | (found if len(held) > 1 else {})

    def seconds_per_step(self, repeats: int = 4) -> float:
        """Measured time of a step's forward and backward pass, after one to warm up; nothing is updated."""
        for repeat in range(repeats + 1):
            if repeat == 1:
                started = time.perf_counter()
            batches = self.loader.make(self.step_done)[0]
            self.compute.step(batches, 1 / max(1, self.compute.scored(batches)))
            self.optimizer.zero_grad()
        return (time.perf_counter() - started) / repeats

    def _one_step(self) -> None:
        started = time.perf_counter()
        rate = self._learning_rate()
        loss, norm = self.step(self.loader.step(self.step_done))
        elapsed = time.perf_counter() - started
        self.step_done += 1
        tokens = self.recipe.train.batch_size * self.recipe.data.seq_len
        row = {"step": self.step_done, "loss": loss, "lr": rate, "grad_norm": norm if math.isfinite(norm) else None,
               "tokens_per_second": tokens / elapsed, "ms": elapsed * 1000,
               "data_ms": self.loader.waited * 1000}  # fmt: skip
        last = self.step_done == self.recipe.train.steps
        if last or (self.recipe.validation.every and self.step_done % self.recipe.validation.every == 0):
            row |= self.validate()
        self.metrics.add(row)
        self._seconds.append(elapsed)
        self._waits.add(row)
        self.saves.check()
        if last or "val_loss" in row or self.step_done % self.recipe.train.log_every == 0:
            recent = self._seconds[-50:]
            print_step(row, sum(recent) / len(recent) * (self.recipe.train.steps - self.step_done))

    def _refuse_divergence(self, loss: float, norm: float) -> None:
        """Stop before a bad gradient reaches the weights. Under loss scaling an infinite norm only skips the step."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return
        raise PunaError(
            f"training diverged at step {self.step_done + 1}: loss {loss:g}, gradient norm {norm:g}, "
            f"learning rate {self._learning_rate():.2e}",
            f"lower --optim.lr or raise --optim.warmup_steps; last save: {self.saves.last or 'none yet'}",
        )

    def _told_to_stop(self) -> bool:
        """Several ranks know it only from the last step's sum: all must stop after the same one."""
        return self.stopping or (self.world.size == 1 and self.interrupt.seen)

    def _open_loader(self) -> Loader:
        world, train = self.world, self.recipe.train
        gate = StoreGate(world.meeting.store, world.size) if world.size > 1 else None
        size = self.compute.micro_size
        return Loader(self.sources.stream, train.batch_size, size, world.data_rank, world.data_ranks, gate=gate)

    def _learning_rate(self) -> float:
        return learning_rate(self.recipe.optim, self.step_done, self.recipe.train.steps)

    def _resume(self) -> int:
        """Steps done by the save that the run goes on from, its state restored; 0 without one."""
        state = self.saves.load(self.compute.parameters, self.optimizer)
        if state is None:
            return 0
        check_resume(state, self._identity(state["step"]), str(self.saves.last))
        self.scaler.load_state_dict(state["scaler"])
        step: int = state["step"]
        return step

    def _identity(self, step: int) -> dict[str, Any]:
        """What must not change across a resume: what decides the tokens of the steps done, and which model saw them."""
        return {**self.sources.identity(step), "model": as_dict(self.recipe.model)}

    def _save(self) -> None:
        """Unless this step is saved already."""
        trainer = {
            "identity": self._identity(self.step_done),
            "scaler": self.scaler.state_dict(),
            "recipe": as_dict(self.recipe),
        }
        if self.saves.save(self.step_done, self.compute.parameters, self.optimizer, trainer) and self.world.rank == 0:
            plot_png(self.metrics, self.run_folder / "loss.png", f"{self.run_folder.name}: {self.step_done} steps")

    def _print_card(self) -> None:
        recipe, spec = self.recipe, self.compute.spec
        tokens = recipe.train.batch_size * recipe.data.seq_len
        rows = [
            ("model", f"{spec.model_type}, {count(spec.num_params())} parameters, vocabulary {spec.vocab_size}"),
            *self.sources.card(),
            ("run", f"{recipe.train.steps} steps of {tokens} tokens, from step {self.step_done}"),
            ("machine", f"{describe()}; {recipe.train.dtype}, {torch.get_num_threads()} threads"),
            ("ranks", self.world.describe() + self.compute.remark),
            *([("quantized", describe_quant(recipe, self.quant))] if self.quant else []),
            ("kernels", describe_kernels() if self.world.device.type == "cpu" else "torch"),
            ("out", str(self.run_folder)),
        ]  # fmt: skip
        say(table(rows))
        say(HEADER)

    def _finish(self, interrupted: bool) -> dict[str, Any]:
        self.metrics.close()
        losses = [value for _, value in self.metrics.series("loss")]
        bits = self.metrics.series("val_bits_per_byte")
        latest, png = files.join(self.saves.run, "latest"), self.run_folder / "loss.png"
        say(curve(losses))
        if interrupted:
            say(f"interrupted at step {self.step_done} and saved; the same command continues from there")
        epochs = ", ".join(f"{name} {value:.2f}" for name, value in self.sources.epochs(self.step_done).items())
        say(f"epochs   {epochs}\nmodel    {latest}\nmetrics  {self.metrics.path}\ncurve    {png}")
        return {
            "step": self.step_done,
            "interrupted": interrupted,
            "loss": losses[-1] if losses else None,
            "val_bits_per_byte": bits[-1][1] if bits else None,
            "epochs": self.sources.epochs(self.step_done),
            "model": latest,
            "metrics": str(self.metrics.path),
            "curve": str(png),
        }
