"""Training: a recipe in, a Hugging Face folder per save out. `Trainer.step` is the whole machine."""

from __future__ import annotations

import gc
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from puna.base.config import as_dict, build, read_toml
from puna.base.console import PunaError, count, curve, say, table
from puna.base.hardware import describe, keep_freed_memory, parse_dtype, pick_device
from puna.base.storage import disk_error
from puna.data.loader import Loader
from puna.data.pack import Batch
from puna.model.transformer import Transformer
from puna.ops.basic import cross_entropy
from puna.ops.linear import describe as describe_kernels
from puna.text.tokenizer import Tokenizer
from puna.train.metrics import HEADER, Metrics, WaitReport, plot_png, print_step
from puna.train.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from puna.train.recipe import Recipe
from puna.train.setup import check_recipe, check_resume, choose_spec, vocab_error
from puna.train.sources import open_sources
from puna.weights.checkpoint import find_resume, list_steps, load_checkpoint, save_checkpoint, verify
from puna.weights.folder import empty_model, load_model


def train(recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run a recipe (a TOML file or its tables) to its end, continuing what `out` already holds.

    Returns the figures and paths that the command line prints as JSON. Raises PunaError for anything a user can mend.
    """
    tables = recipe if isinstance(recipe, Mapping) else read_toml(recipe)
    return Trainer(build(Recipe, tables, overrides)).run()


class Trainer:
    """One run on one device. Its state is the model, the optimizer, the loss scale and the number of steps done."""

    def __init__(self, recipe: Recipe):
        check_recipe(recipe)
        keep_freed_memory()
        self.recipe, self.run_folder = recipe, Path(recipe.out)
        self.device = pick_device(recipe.train.device)
        self.dtype = parse_dtype(recipe.train.dtype)
        self.tokenizer = Tokenizer.load(recipe.data.tokenizer or recipe.model.path)
        self.sources = open_sources(recipe, self.tokenizer)
        self.loader = Loader(self.sources.stream, recipe.train.batch_size, recipe.train.micro_batch_size)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step_done = 0
        self._prepare()

    def run(self) -> dict[str, Any]:
        """Train to the last step; an interrupt saves and returns early with `interrupted`."""
        try:
            return self._run()
        except OSError as error:  # metrics and curve are written outside the saves: their disk may be full, too
            raise disk_error(error, self.run_folder) from error
        finally:
            self.loader.close()
            gc.unfreeze()

    def _run(self) -> dict[str, Any]:
        self._print_card()
        gc.collect()
        gc.freeze()  # what is here stays: the collector need not walk through all of torch again and again
        with _Interrupt() as interrupt:
            while self.step_done < self.recipe.train.steps and not interrupt.seen:
                self._one_step()
                if self.step_done % self.recipe.checkpoint.every == 0:
                    self._save()
        if not (self.run_folder / f"step-{self.step_done:06d}").exists():
            self._save()
        return self._finish(interrupt.seen)

    def step(self, batches: list[Batch]) -> tuple[float, float]:
        """One optimizer step over micro-batches: (mean loss per scored token in nats, gradient norm).

        Every scored token of the step weighs the same, however the micro-batches cut them.
        """
        valid = max(1, sum(batch.valid for batch in batches))
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss, nll = self.loss(batch.to(self.device))
            self.scaler.scale(loss / valid).backward()
            total += nll
        set_learning_rate(self.optimizer, self._learning_rate())
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model, self.recipe.optim.grad_clip).item()
        mean = (total / valid).item()
        self._refuse_divergence(mean, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return mean, norm

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss and summed negative log-likelihood of a batch's scored tokens."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model(batch.tokens_T, batch.positions_T, batch.attend)
            return cross_entropy(hidden, self.model.head_weight, batch.targets_T, self.recipe.optim.z_loss)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on what is held out: evenly spread windows, none overlapping, the first tokens of each without context.

        With several sources also one loss for each, as 'val_loss/NAME'. Empty if nothing is held out.
        """
        held, found = self.sources.held, {}
        limit = max(1, self.recipe.validation.max_tokens // self.recipe.data.seq_len // max(1, len(held)))
        nll = valid = size = 0.0
        for name, part in held.items():
            part_nll = part_valid = 0.0
            for batch in part.batches(self._micro_size(), limit):
                part_nll += self.loss(batch.to(self.device))[1].item()
                part_valid += batch.valid
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
            for batch in self.loader.make(self.step_done)[0]:
                (self.loss(batch.to(self.device))[0] / max(1, batch.valid)).backward()
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
        if last or "val_loss" in row or self.step_done % self.recipe.train.log_every == 0:
            recent = self._seconds[-50:]
            print_step(row, sum(recent) / len(recent) * (self.recipe.train.steps - self.step_done))

    def _refuse_divergence(self, loss: float, norm: float) -> None:
        """Stop before a bad gradient reaches the weights. Under loss scaling an infinite norm only skips the step."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return
        saved = list_steps(self.run_folder)
        raise PunaError(
            f"training diverged at step {self.step_done + 1}: loss {loss:g}, gradient norm {norm:g}, "
            f"learning rate {self._learning_rate():.2e}",
            f"lower --optim.lr or raise --optim.warmup_steps; last save: {saved[-1] if saved else 'none yet'}",
        )

    def _micro_size(self) -> int:
        return self.recipe.train.micro_batch_size or self.recipe.train.batch_size

    def _learning_rate(self) -> float:
        return learning_rate(self.recipe.optim, self.step_done, self.recipe.train.steps)

    def _prepare(self) -> None:
        """Model, optimizer and metrics, from a save if there is one."""
        save = self._find_save()
        self.model = self._build_model(save)
        if self.tokenizer.vocab_size > self.model.spec.vocab_size:
            raise vocab_error(self.tokenizer.vocab_size, self.model.spec.vocab_size)
        self.model.train()
        self.optimizer = build_optimizer(self.model, self.recipe.optim)
        if save is not None:
            state = load_checkpoint(save, self.model, self.optimizer)
            check_resume(state, self._identity(state["step"]), save)
            self.scaler.load_state_dict(state["scaler"])
            self.step_done = state["step"]
        self.metrics = Metrics(self.run_folder, self.step_done)
        self._seconds: list[float] = []
        self._waits = WaitReport()

    def _build_model(self, save: Path | None) -> Transformer:
        section = self.recipe.model
        if save is not None or section.path:
            return load_model(save or section.path, "float32", self.device)
        spec = choose_spec(section, self.tokenizer, self.recipe.data.seq_len)
        model = empty_model(spec, torch.float32, self.device)
        model.init_weights(torch.Generator(self.device).manual_seed(self.recipe.seed))
        return model

    def _find_save(self) -> Path | None:
        resume = self.recipe.checkpoint.resume
        if resume not in ("auto", "never"):
            if damaged := verify(Path(resume)):
                raise PunaError(f"{resume} is damaged: {', '.join(damaged[:3])}", "resume from another step folder")
            return Path(resume)
        if resume == "never" and list_steps(self.run_folder):
            raise PunaError(f"{self.run_folder} already holds saves and resume is 'never'", "choose another --out")
        return find_resume(self.run_folder)

    def _identity(self, step: int) -> dict[str, Any]:
        """What must not change across a resume: what decides the tokens of the steps done, and which model saw them."""
        return {**self.sources.identity(step), "model": as_dict(self.recipe.model)}

    def _save(self) -> None:
        state = {
            "identity": self._identity(self.step_done),
            "scaler": self.scaler.state_dict(),
            "recipe": as_dict(self.recipe),
        }
        keep = self.recipe.checkpoint.keep_last
        saved = save_checkpoint(
            self.run_folder, self.step_done, self.model, self.tokenizer, self.optimizer, state, keep
        )
        plot_png(self.metrics, self.run_folder / "loss.png", f"{self.run_folder.name}: {self.step_done} steps")
        say(f"saved {saved}")

    def _print_card(self) -> None:
        recipe, spec = self.recipe, self.model.spec
        tokens = recipe.train.batch_size * recipe.data.seq_len
        rows = [
            ("model", f"{spec.model_type}, {count(spec.num_params())} parameters, vocabulary {spec.vocab_size}"),
            *self.sources.card(),
            ("run", f"{recipe.train.steps} steps of {tokens} tokens, from step {self.step_done}"),
            ("machine", f"{describe()}; {recipe.train.dtype}, {torch.get_num_threads()} threads"),
            ("kernels", describe_kernels() if self.device.type == "cpu" else "torch"),
            ("out", str(self.run_folder)),
        ]  # fmt: skip
        say(table(rows))
        say(HEADER)

    def _finish(self, interrupted: bool) -> dict[str, Any]:
        self.metrics.close()
        losses = [value for _, value in self.metrics.series("loss")]
        bits = self.metrics.series("val_bits_per_byte")
        latest, png = self.run_folder / "latest", self.run_folder / "loss.png"
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
            "model": str(latest),
            "metrics": str(self.metrics.path),
            "curve": str(png),
        }


class _Interrupt:
    """Ctrl-C and SIGTERM finish the current step, save and return; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        try:
            self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the embedding program handles its own signals
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: object) -> None:
        if self.seen and number == signal.SIGINT:
            os._exit(130)
        self.seen = True
        say("stopping after this step and saving (Ctrl-C again to stop at once)")
