"""Two small models trained here on real text, each with its own seed and order of data: what the gates judge methods by."""

from __future__ import annotations

import asyncio
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from puna.base.config import build
from puna.corpus.in_memory import read_documents
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.formats.layer import QuantizedWeight
from puna.quant.calibration import Sequences, split
from puna.quant.config import QuantConfig
from puna.quant.score import Score
from puna.quant.walk import Job, Outcome, Walk
from puna.text.tokenizer import Tokenizer
from puna.text.train_tokenizer import train_bpe
from puna.train.loop import Trainer
from puna.train.recipe import Recipe

LIBRARY = Path(asyncio.__file__).parent.parent
TEXT = [
    str(LIBRARY / name)
    for name in ("asyncio", "email", "unittest", "http", "logging", "importlib", "json", "ctypes", "html")
]
SHAPE = {"preset": "debug", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 32, "intermediate_size": 512, "max_position_embeddings": 256}  # fmt: skip
SEQ_LEN = 128


def recipe(folder: Path, seed: int, steps: int, **sections: dict) -> Recipe:
    """A run of `steps` on TEXT."""
    tables = {
        "out": str(folder), "seed": seed, "model": SHAPE,
        "data": {"text": TEXT, "tokenizer": str(folder.parent / "tokenizer"), "seq_len": SEQ_LEN, "val_fraction": 0.1},
        "optim": {"lr": 3e-3, "warmup_steps": 20}, "train": {"steps": steps, "batch_size": 16, "log_every": 1000},
        "checkpoint": {"every": 10**6, "background": False}, "validation": {"every": 0, "max_tokens": 1024},
    }  # fmt: skip
    return build(Recipe, {**tables, **{name: {**tables.get(name, {}), **more} for name, more in sections.items()}})


def make_tokenizer(folder: Path) -> Tokenizer:
    """A vocabulary of 512 for the text, in folder/tokenizer."""
    tokenizer = train_bpe((d.text for d in read_documents(TEXT)), 512)
    tokenizer.save(folder / "tokenizer")
    return tokenizer


def train(folder: Path, seed: int, steps: int, **sections: dict) -> Path:
    """Train and return the last save."""
    Trainer(recipe(folder, seed, steps, **sections)).run()
    return folder / "latest"


def sequences(tokenizer: Tokenizer, samples: int = 160, eval_tokens: int = 12288, seed: int = 0) -> Sequences:
    """Calibration and held-out text of the same library."""
    documents = [(d.name, d.text) for d in read_documents(TEXT)]
    return split(documents, tokenizer, samples, SEQ_LEN, eval_tokens, seed)


def quantize(model: Transformer, config: QuantConfig, text: Sequences, folder: Path) -> Outcome:
    """The walk over a model in memory."""
    folder.mkdir(parents=True)
    parameters = dict(model.named_parameters())
    job = Job(model.spec, config, lambda name: parameters[name].detach(), text, folder, torch.device("cpu"))
    return Walk(job).run(lambda part, tensors: None, lambda size, note: None)


@torch.inference_mode()
def score(reference: Transformer, variant: Transformer, text: Sequences) -> Score:
    """`variant` against `reference` on the held-out text."""
    found = Score()
    for chunk, ids_T in enumerate(text.evaluation_ST):
        found.compare(logits(reference, ids_T), logits(variant, ids_T), text.targets_ST[chunk], chunk)
    return found


def logits(model: Transformer, ids_T: Tensor) -> Tensor:
    """(T, V)."""
    return model.logits(model(ids_T, torch.arange(len(ids_T)), PackedCausal.of([len(ids_T)])))


def applied(model: Transformer, config: QuantConfig, text: Sequences, folder: Path) -> Transformer:
    """A copy of the model with the weights that a quantization gives, dequantized."""
    folder.mkdir(parents=True)
    parameters, kept = dict(model.named_parameters()), {}
    job = Job(model.spec, config, lambda name: parameters[name].detach(), text, folder, torch.device("cpu"))
    Walk(job).run(lambda part, tensors: kept.update(tensors), lambda size, note: None)
    rounded = deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            value = kept[name]
            parameter.copy_(value.dequantize() if isinstance(value, QuantizedWeight) else value)
    return rounded
