"""A model opened to answer with: in this process, on workers that it starts, or on the ranks of a torchrun job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from puna.base.console import PunaError, say
from puna.base.hardware import parse_dtype, pick_device
from puna.engine.llm import LLM
from puna.engine.options import EngineOptions
from puna.engine.ranks.shard import Part, load_part
from puna.engine.ranks.team import IDLE, Team, follow
from puna.parallel.degrees import Degrees
from puna.parallel.launch import Meeting
from puna.parallel.world import Settings, World, choose_device
from puna.weights.fetch import local_folder


@dataclass(frozen=True)
class Setup:
    """Which model, how it computes, on how many ranks. adapters: 'name=folder' each."""

    model: str
    dtype: str = "float32"
    device: str = "auto"
    tp: int = 1
    adapters: tuple[str, ...] = ()
    options: EngineOptions = field(default_factory=EngineOptions)


@contextmanager
def open_llm(setup: Setup) -> Iterator[LLM | None]:
    """The model, ready; None on ranks that have nothing to say: they have computed their part by then.

    Errors: PunaError for a number of ranks that is not tp, for adapters under tp, and as `LLM`.
    """
    meeting = Meeting()
    size = meeting.place.size
    if size > 1 and size != setup.tp:
        raise PunaError(f"{size} ranks were started, tp is {setup.tp}", f"use --parallel.tp {size}")
    with meeting.together():
        if size == 1:
            with _alone(setup) as llm:
                yield llm
            return
        device = choose_device(pick_device(setup.device).type, meeting.place)
        world = World(meeting, Degrees(tp=size), device, Settings(first_timeout=IDLE, timeout=IDLE), needs_mesh=False)
        part = Part(world.rank, size)
        model = load_part(local_folder(setup.model, state=False), parse_dtype(setup.dtype), device, part)
        team = Team(part)
        if world.rank:
            follow(team, model)
            yield None
        else:
            llm = LLM.of(model, LLM.tokenizer_of(setup.model), setup.options, team)
            try:
                _tell(llm, setup)
                yield llm
            finally:
                team.stop()
        world.close()


@contextmanager
def _alone(setup: Setup) -> Iterator[LLM]:
    adapters = dict(_named(text) for text in setup.adapters)
    llm = LLM(
        setup.model, setup.dtype, str(pick_device(setup.device)), adapters=adapters, tensor_parallel=setup.tp,
        options=setup.options,
    )  # fmt: skip
    try:
        _tell(llm, setup)
        yield llm
    finally:
        llm.close()


def _tell(llm: LLM, setup: Setup) -> None:
    say(f"{setup.model}, {setup.dtype}: {llm.engine.card()}")


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise PunaError(f"adapter {text!r} has no name", "write it as name=folder")
    return name, folder
