"""Two small models trained here on real text, each with its own seed and order of data: what the gates judge methods by."""

from __future__ import annotations

import asyncio
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.base.config import build
from puna.corpus.in_memory import read_documents
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.formats.layer import QuantizedWeight
from puna.quant.calibration import Sequences, split
from puna.quant.config import QuantConfig
from puna.quant.score import IGNORED, Score
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


# --- a smaller model that reads bytes and can be trained until four bits hurt it -------------------------------------

BYTES = Spec.preset("debug").replace(vocab_size=256)
ANNEALING = ((200, 1e-3), (150, 3e-4), (100, 1e-4))


def byte_text() -> tuple[Tensor, Tensor]:
    """Bytes of the library's modules from a to h: what is learnt, what is held out."""
    data = b"".join(file.read_bytes() for file in sorted(LIBRARY.glob("[a-h]*.py"))[:60])
    whole_T = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    cut = len(whole_T) * 4 // 5
    return whole_T[:cut], whole_T[cut:]


def byte_model(seed: int) -> Transformer:
    """Random weights."""
    model = Transformer(BYTES)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def fit(model: Transformer, text_T: Tensor, steps: int, rate: float, seed: int) -> None:
    """AdamW on random windows, the rate falling to zero."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        ids_ST = text_T[torch.randint(len(text_T) - SEQ_LEN, (12, 1), generator=draw) + torch.arange(SEQ_LEN + 1)]
        positions_T = torch.arange(SEQ_LEN).repeat(12)
        hidden_TD = model(ids_ST[:, :-1].flatten(), positions_T, PackedCausal.of([SEQ_LEN] * 12))
        F.cross_entropy(model.logits(hidden_TD), ids_ST[:, 1:].flatten()).backward()
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()


def byte_sequences(learnt_T: Tensor, held_T: Tensor) -> Sequences:
    """256 calibration sequences, everything that is held out to judge by."""
    held_ST = held_T[: len(held_T) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)[:400]
    targets_ST = torch.cat([held_ST[:, 1:], torch.full((len(held_ST), 1), IGNORED)], 1)
    return Sequences(learnt_T[: 256 * SEQ_LEN].view(-1, SEQ_LEN), held_ST, targets_ST, None)
