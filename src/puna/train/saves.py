"""A run's saves as the trainer sees them: which one to go on from, what is in it, and when to write the next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from puna.base import files
from puna.base.console import PunaError, say
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.parallel import pieces
from puna.parallel.launch import LostRank, Meeting
from puna.parallel.materialise import init_weights
from puna.parallel.world import World
from puna.quant.config import CONFIG_FILE
from puna.text.tokenizer import Tokenizer
from puna.train.fake_quant import training_config
from puna.train.recipe import Recipe
from puna.weights import agree
from puna.weights.checkpoint import find_resume, list_steps, verify
from puna.weights.fetch import local_folder
from puna.weights.reader import WeightReader
from puna.weights.saver import Saver
from puna.weights.state import load_state

SLOWEST = timedelta(hours=1)  # for one rank to write what it has of a save, while the others wait


class Saves:
    """Of one run, on every rank alike: `spec` and `last` are known at once, the rest after `open`.

    `last`: path or URL of the save to go on from, later of the newest one written; None before the first.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, meeting: Meeting):
        self.recipe, self.tokenizer = recipe, tokenizer
        self.run = recipe.checkpoint.folder or recipe.out
        self.last = self._choose()
        meeting.agree("save", json.dumps({"save": self.last}), "out must be one folder that all nodes share, or s3://")
        source = self.last or recipe.model.path
        self.spec = _read_spec(source) if source else None
        self._step = -1

    def open(self, world: World, spec: Spec) -> None:
        """Check the save to go on from, every rank its share, and make ready for writing."""
        checkpoint, group = self.recipe.checkpoint, agree.saver_group(SLOWEST)
        if checkpoint.resume in ("auto", "never"):
            self.last = find_resume(self.run, group)
        elif damaged := self._damaged(world, group):
            raise PunaError(f"{self.last} is damaged: {', '.join(damaged[:3])}", "resume from another step folder")
        self._spec = spec
        self._saver = Saver(
            self.run, spec, self.tokenizer, checkpoint.keep_last, checkpoint.keep_every, group,
            pieces if world.size > 1 else None, checkpoint.background, extras=_extras(self.recipe),
        )  # fmt: skip

    def fill(self, model: nn.Module, device: torch.device, offload: bool) -> None:
        """Give a model of parts its weights: the save's, those of `model.path`, or random ones."""
        source = self.last or self.recipe.model.path
        if source:
            pieces.load_parts(model, device, WeightReader(source).read, offload)
        else:
            assert isinstance(model, Transformer)
            init_weights(model, device, self.recipe.seed, offload)

    def load(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """The optimizer's state back into it; what the trainer handed to `save`. None without a save."""
        if self.last is None:
            return None
        with torch.device("meta"):
            names = dict(Transformer(self._spec).named_parameters())
        trainer = load_state(local_folder(self.last), parameters, optimizer, pieces, names)
        self._step = trainer["step"]
        return trainer

    def save(
        self, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, trainer: dict[str, Any]
    ) -> bool:
        """Begin to write a save, unless this step has one; False then."""
        if step == self._step:
            return False
        with self._named():
            self._saver.save(step, parameters, optimizer, trainer)
        self._step = step
        self.check()
        return True

    def check(self) -> None:
        """Say when a save is complete; raise what went wrong with it."""
        with self._named():
            self._tell(self._saver.check())

    def wait(self) -> None:
        """Until the save being written is complete."""
        with self._named():
            self._tell(self._saver.wait())

    def _damaged(self, world: World, group: ProcessGroup | None) -> list[str]:
        found = agree.Ranks(group).each(lambda: verify(str(self.last), (world.rank, world.size)))
        return sorted(set(chain(*found)))

    def _tell(self, saved: str | None) -> None:
        if saved is not None and saved != self.last:
            self.last = saved
            say(f"saved {saved}")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A rank that died in a save is no fault of this one."""
        try:
            yield
        except agree.LostRank as error:
            raise LostRank(error.message, error.hint) from error

    def _choose(self) -> str | None:
        """The newest save, or the one that the recipe names."""
        resume = self.recipe.checkpoint.resume
        if resume not in ("auto", "never"):
            return resume
        steps = list_steps(self.run)
        if resume == "never" and steps:
            raise PunaError(f"{self.run} already holds saves and resume is 'never'", "choose another --out")
        return steps[-1] if steps else None


def _extras(recipe: Recipe) -> dict[str, Any]:
    """What the weights were trained to be rounded to, beside config.json: then `puna quantize` need not be told."""
    config = training_config(recipe.quant)
    return {} if config is None else {CONFIG_FILE: {"config": config.to_dict(), "qat": True}}


def _read_spec(source: str) -> Spec:
    """Of a folder, or of a save in a bucket, of which no more than config.json is fetched."""
    if not files.is_remote(source):
        return Spec.load(source)
    return Spec.from_config(json.loads(files.read_file(files.join(source, "config.json"))))
