"""`puna quickstart`: from text to an answering model on this machine, without a download."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.base.config import build, read_toml, to_toml
from puna.base.console import PunaError, duration, say, size, status
from puna.base.storage import atomic_folder, read_json, write_atomic, write_json
from puna.corpus.in_memory import STANDARD_LIBRARY, hold_out, read_documents, total_bytes
from puna.engine.llm import LLM
from puna.engine.request import SamplingParams
from puna.text.train_tokenizer import train_bpe
from puna.train.loop import Trainer
from puna.train.recipe import Recipe

VOCAB = 1024
PROMPT = "def read_file(path"
# About a million parameters; the rates suit runs of a few hundred to a few thousand steps.
RECIPE: dict[str, Any] = {
    "model": {
        "preset": "debug", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 384, "max_position_embeddings": 1024,
    },
    "data": {"seq_len": 256},
    "optim": {"lr": 6e-3, "weight_decay": 0.1},
    "train": {"batch_size": 16, "log_every": 20},
    "validation": {"max_tokens": 65536},
}  # fmt: skip
SAMPLING = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=100, seed=1)


def make_tokenizer(paths: Sequence[str], vocab_size: int, out: str, specials: Sequence[str] = ()) -> dict[str, Any]:
    """Train a byte-level BPE, with `specials` beside the usual special tokens, and save it as a folder at `out`."""
    documents = read_documents(paths)
    started = time.perf_counter()
    with status(f"training a tokenizer of {vocab_size} tokens on {size(total_bytes(documents))}"):
        tokenizer = train_bpe((d.text for d in documents), vocab_size, specials=specials)
    with atomic_folder(Path(out)) as folder:
        tokenizer.save(folder)
    say(f"tokenizer  {out}  ({tokenizer.vocab_size} tokens, {duration(time.perf_counter() - started)})")
    return {"tokenizer": out, "vocab_size": tokenizer.vocab_size, "documents": len(documents)}


def run_quickstart(out: str, minutes: float, text: Sequence[str]) -> dict[str, Any]:
    """Tokenizer, training and a completion before and after, in folder `out`; an unfinished run there goes on."""
    if minutes <= 0:
        raise PunaError(f"--minutes is {minutes:g}", "use at least 0.1")
    folder, started = Path(out), time.perf_counter()
    recipe_file, notes_file = folder / "recipe.toml", folder / "before.json"
    if recipe_file.exists():
        say(f"{recipe_file} is there already: going on with it (choose another --out to begin anew)")
        trainer = Trainer(build(Recipe, read_toml(recipe_file)))
    else:
        trainer = _prepare(folder, minutes, text)
        write_json(notes_file, _look(trainer))
        write_atomic(recipe_file, to_toml(trainer.recipe))
    before = read_json(notes_file)
    say(f"\nbefore training ({before['val_bits_per_byte']:.2f} bits per byte on held-out files):\n{_indent(before)}\n")
    result = trainer.run()
    after = _look(trainer)
    say(f"\nafter {trainer.step_done} steps ({after['val_bits_per_byte']:.2f} bits per byte):\n{_indent(after)}\n")
    say(f"done in {duration(time.perf_counter() - started)}. Try next:\n{_next_commands(folder)}")
    return {
        **result,
        "before": before,
        "after": after,
        "tokenizer": str(folder / "tokenizer"),
        "recipe": str(recipe_file),
    }


def _prepare(folder: Path, minutes: float, text: Sequence[str]) -> Trainer:
    """A tokenizer, and a trainer whose number of steps fits the minutes on this machine."""
    recipe = build(Recipe, {**RECIPE, "out": str(folder)}, {"data.text": tuple(text) or (STANDARD_LIBRARY,)})
    documents, _ = hold_out(read_documents(recipe.data.text), recipe.data.val_fraction)
    say(f"text       {len(documents)} files, {size(total_bytes(documents))}, beside those held out for validation")
    tokenizer_folder = folder / "tokenizer"
    with status(f"training a tokenizer of {VOCAB} tokens"):
        tokenizer = train_bpe((d.text for d in documents), VOCAB)
    with atomic_folder(tokenizer_folder) as beside:
        tokenizer.save(beside)
    trainer = Trainer(replace(recipe, data=replace(recipe.data, tokenizer=str(tokenizer_folder))))
    steps = max(20, round(minutes * 60 / trainer.seconds_per_step()))
    trainer.recipe = _with_steps(trainer.recipe, steps)
    return trainer


def _with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The schedule stretched to `steps`: a tenth warms up, about eight validations, a save at every quarter."""
    return replace(
        recipe,
        train=replace(recipe.train, steps=steps),
        optim=replace(recipe.optim, warmup_steps=min(100, max(2, steps // 10))),
        checkpoint=replace(recipe.checkpoint, every=max(10, steps // 4)),
        validation=replace(recipe.validation, every=max(10, steps // 8)),
    )


def _look(trainer: Trainer) -> dict[str, Any]:
    """What the model writes now, and how well it predicts the held-out files."""
    output = LLM.of(trainer.model, trainer.tokenizer).generate(PROMPT, SAMPLING)[0]
    return {"prompt": PROMPT, "text": output.text, **trainer.validate()}


def _indent(look: dict[str, Any]) -> str:
    return "\n".join(f"    {line}" for line in (look["prompt"] + look["text"]).splitlines())


def _next_commands(folder: Path) -> str:
    """Lines to paste: `puna` by the path it was called by, unless it is on the PATH."""
    puna = "puna" if shutil.which("puna") else os.path.relpath(sys.argv[0]) if sys.argv[0].endswith("puna") else "puna"
    model = folder / "latest"
    return "\n".join(
        f"    {puna} {line}"
        for line in (
            f'generate {model} --prompt "class Stack:" --temperature 0.7',
            f"info {model}",
            f"train {folder / 'recipe.toml'} --out {folder}-longer --train.steps 2000",
        )
    )
