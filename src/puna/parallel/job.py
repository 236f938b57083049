"""What is planned: a model, its degrees and the settings that decide memory and time. Plain numbers, no torch.

Letters used in the closed forms of this room: L layers, D model width, F feed-forward width, H query heads, G key/value
heads, K head width, V vocabulary, T tokens of one sequence; t tokens that one rank holds of one microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.parallel.degrees import Degrees, split_layers
from puna.parallel.schedules import SPLIT_BACKWARD, rank_of, summary

CHECKPOINTING = ("none", "selective", "full")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Job:
    """One training job. `microbatches` are forward passes of a rank per optimizer step.

    `loss`: chunked (puna's: logits exist a chunk at a time), fused (one compiled kernel over 16-bit logits) or whole
    (fp32 log-softmax and gradients of all tokens): the last two stand for other trainers, to compare with what they
    publish.
    """

    spec: Spec
    degrees: Degrees
    seq_len: int
    batch_size: int
    microbatches: int = 1
    dtype: str = "bfloat16"
    zero: int = 3
    cpu_offload: bool = False
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    cp_method: str = "allgather"
    checkpointing: str = "none"
    compile: bool = False
    float8: bool = False
    async_tp: bool = False
    loss: str = "chunked"

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise PunaError(f"activation_checkpointing {self.checkpointing!r} is not one puna knows",
                            f"use {', '.join(CHECKPOINTING)}")  # fmt: skip
        if self.dtype not in BYTES:
            raise PunaError(f"train.dtype {self.dtype!r} is not one puna plans", f"use {', '.join(BYTES)}")
        if self.float8 and self.dtype != "bfloat16":
            raise PunaError(f"float8 goes with bfloat16 around it, not {self.dtype}", "use --train.dtype bfloat16")
        if self.degrees.pp > 1 and self.compile and self.schedule in SPLIT_BACKWARD:
            raise PunaError(f"torch cannot compile under {self.schedule}, which splits the backward pass",
                            "use --train.compile false or --parallel.pp_schedule interleaved")  # fmt: skip

    @property
    def width(self) -> int:
        """Bytes of a number in the arithmetic's dtype."""
        return BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step, of all ranks."""
        return self.batch_size * self.seq_len

    @property
    def micro_tokens(self) -> float:
        """t: tokens of one microbatch on one rank (before tensor parallelism cuts them further)."""
        return self.tokens / (self.degrees.data * self.degrees.cp * self.microbatches)

    @property
    def stages(self) -> int:
        """Pipeline stages in all."""
        return self.degrees.pp * self.stages_per_rank if self.degrees.pp > 1 else 1

    @cached_property
    def rank_layers(self) -> list[int]:
        """Layers of each pipeline rank."""
        found = [0] * self.degrees.pp
        for stage, layers in enumerate(split_layers(self.spec.num_hidden_layers, self.stages)):
            found[rank_of(self.schedule, stage, self.degrees.pp)] += layers
        return found

    @property
    def head_rank(self) -> int:
        """Pipeline rank with the output head: the last, or the first where stages run there and back."""
        return rank_of(self.schedule, self.stages - 1, self.degrees.pp)

    @property
    def layer_params(self) -> int:
        """Parameters of one block, norms included."""
        groups = self.spec.group_params()
        return (groups["attention"] + groups["mlp"] + groups["norms"]) // self.spec.num_hidden_layers

    @property
    def table_params(self) -> int:
        """Parameters of the embedding, or of the head."""
        return self.spec.vocab_size * self.spec.hidden_size

    def tables(self, rank: int) -> int:
        """How many of these a pipeline rank holds: embedding at the first stage, head at the last (tied: one)."""
        both = rank == 0 and rank == self.head_rank
        return 1 if both and self.spec.tie_word_embeddings else (rank == 0) + (rank == self.head_rank)

    def pipeline(self, *times: float) -> tuple[float, tuple[int, ...]]:
        """Bubble of the schedule and most chunks in flight per rank; `times` of a chunk's three passes in any unit."""
        if self.degrees.pp == 1:
            return 0.0, (1,)
        return summary(self.schedule, self.degrees.pp, self.microbatches, self.stages_per_rank, *times)
