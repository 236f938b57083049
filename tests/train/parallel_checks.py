"""Whole training runs on a mesh, as `ranks.run` calls them: losses, norms, validation and the saved weights."""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from puna.base.config import build
from puna.parallel.launch import Meeting
from puna.text.train_tokenizer import train_bpe
from puna.train.loop import Trainer
from puna.train.recipe import Recipe
from puna.weights.folder import load_model

OWN_GROUPS = True
FOLDER = Path(tempfile.mkdtemp(prefix="puna-parallel-"))


def _make_text() -> None:
    """Twelve files of documents of very different lengths, and a tokenizer."""
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "value", "index", "count", "total"]
    texts = [" ".join(draw.choice(words) for _ in range(draw.choice([5, 40, 400]))) for _ in range(60)]
    (FOLDER / "text").mkdir()
    for number, text in enumerate(texts):
        (FOLDER / "text" / f"{number:02d}.txt").write_text(text)
    train_bpe(texts, 300).save(FOLDER / "tokenizer")


_make_text()

RECIPE: dict[str, Any] = {
    "model": {"preset": "debug", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8,
              "num_key_value_heads": 4, "intermediate_size": 96, "tie_word_embeddings": "false"},
    "data": {"text": [f"{FOLDER}/text"], "tokenizer": f"{FOLDER}/tokenizer", "seq_len": 32, "packing": "best_fit",
             "val_fraction": 0.2},
    "optim": {"lr": 1e-2, "eps": 1e-4, "warmup_steps": 1, "z_loss": 1e-3, "grad_clip": 0.5},
    "train": {"steps": 3, "batch_size": 16, "micro_batch_size": 2, "log_every": 100},
    "parallel": {"timeout": 60.0, "first_timeout": 60.0},
    "validation": {"every": 2, "max_tokens": 5 * 32},
}  # fmt: skip


def trained(name: str, changes: dict[str, Any], port: int) -> dict[str, Any]:
    """Figures of every step; on rank 0 also the sums of each saved weight and the largest difference to the reference's."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    recipe = build(Recipe, {**RECIPE, "out": str(FOLDER / name)}, changes)
    meeting = Meeting()
    with meeting.together():
        trainer = Trainer(recipe, meeting)
        trainer.run()
    trainer.world.close()
    keys = ("loss", "grad_norm", "val_loss")
    found: dict[str, Any] = {key: [row[key] for row in trainer.metrics.rows if key in row] for key in keys}
    if trainer.world.rank == 0:
        found["weights"] = distance(FOLDER / name / "latest", FOLDER / "reference" / "latest")
    return found


def distance(one: Path, other: Path) -> float:
    """Largest difference of any weight of two model folders."""
    theirs = dict(load_model(other).named_parameters())
    return max((p - theirs[name]).abs().max().item() for name, p in load_model(one).named_parameters())


def _free_ports() -> Iterator[int]:
    """Below the range from which the kernel takes ports of outgoing connections: nobody else will have it by then."""
    for port in range(20000 + os.getpid() * 31 % 12000, 32768):
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if not taken:
            yield port


_ports = _free_ports()


def case(name: str, **changes: Any) -> Any:
    """`tp=2` is parallel.tp, `train__dtype="x"` is train.dtype."""
    keys = {key.replace("__", ".") if "__" in key else f"parallel.{key}": value for key, value in changes.items()}
    check = partial(trained, name, keys, next(_ports))
    check.__name__ = name  # type: ignore[attr-defined]
    return check


WORLDS = {
    1: [
        case("reference"),
        case("one_checkpointed", train__activation_checkpointing="full"),
        case("one_offloaded", cpu_offload=True),
    ],
    2: [
        case("ddp_2", dp_replicate=2),
        case("pp_zbv", pp=2, pp_schedule="zbv"),
        case("pp_dualpipev", pp=2, pp_schedule="dualpipev"),
        case("pp_interleaved", pp=2, pp_schedule="interleaved"),
    ],
    4: [
        case("zero3"),
        case("zero1", zero=1),
        case("hsdp", dp_replicate=2, zero=2),
        case("ddp_4", dp_replicate=4),
        case("tp_fsdp", tp=2, async_tp=True),
        case("tp_whole_sequence", tp=4, sequence_parallel=False),
        case("cp_ring_fsdp", cp=2, cp_method="ring"),
        case("cp_ulysses", cp=4, cp_method="ulysses", train__activation_checkpointing="selective"),
        None,
        case("cp_allgather_tp", cp=2, tp=2),
        None,
        case("pp_fsdp", pp=2, pp_schedule="gpipe"),
        case("pp_tp", pp=2, tp=2),
        case("pp_cp", pp=2, cp=2, train__activation_checkpointing="full"),
    ],
    8: [case("fsdp_tp_pp", dp_shard=2, tp=2, pp=2)],
}
