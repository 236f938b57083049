"""Memory of one rank, in closed forms. Letters: job.py; c bytes per number of the arithmetic, N ranks share weights.

Per parameter (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054, section 5; puna keeps fp32 weights, AdamW two moments):

    weights 4 / N        gradients 4 / N        moments 8 / N        (FSDP at every stage; all fp32)
    zero 2: + c for a copy of all weights in the arithmetic's dtype, kept between forward and backward
    zero 1: the same, and + 4 for gradients that are summed whole over several microbatches
    copies (DDP): 4 + 4 + 8, + 4 for the buckets that travel, + c for autocast's copies of the blocks

FSDP holds two blocks' weights whole at a time (the one in use and the next), the fp32 gradients of the block before
while they are reduced, and embedding and head, its root group, from the forward pass to the end of the backward pass.

Under a pipeline torch reduces once a step and cuts nothing after a backward pass: zero 2 is zero 1, and under zero 3 a
backward pass leaves its blocks whole until the next forward pass has been through them. The first backward pass finds
no gradients and the most microbatches; those after it find whole gradients, and as many microbatches only where a
forward pass came between (not in GPipe). A stage also holds what it sent on, and a place for each microbatch that it
gets from its neighbours, forward and back; in GPipe the head's rank holds the head's gradient of every microbatch.

Activations of one block per token, in numbers (Korthikanti et al. 2022, arXiv:2205.05198, section 4, redone for SwiGLU,
GQA and flash attention, which keeps no T x T; s is tp under sequence parallelism, else 1):

    none       2 D/s (the two norms' inputs) + 2 D (their outputs, gathered) + (2 H + 2 G) K / tp (q, out; k, v)
               + 4 F/tp (gate, up, silu(gate), product; 3 when compiled: silu is made again)
    selective  D/s (block input) + (2 H + G) K / tp (q, v, attention's output) + F/tp (gate) + D (down, before ranks
               add it up): every second matrix product and attention are kept, the rest is computed again -
               torchtitan's 'op' policy
    full       D/s (block input)

plus 4 bytes per token and head for attention's log-sum-exp, and 8/s for the norms' scales, where they are kept.

What lies there changes over a step, so `moments` adds up each moment at which the peak may be, and the largest counts.
Held against fake-tensor runs by benchmarks/simulate_memory.py, against real ones by benchmarks/measure_memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

from puna.parallel.job import Job

CHUNK_BYTES = 512 * 2**20  # fp32 logits of one chunk on a GPU: ops.basic.chunk_tokens, which needs torch to import
FRAGMENTATION = 0.12  # of what comes and goes: allocator rounding and holes; fitted to torchtitan's peak reserved
OUTSIDE = 2.0 * 2**30  # CUDA context, NCCL buffers, cuBLAS workspaces: beside the allocator, assumed


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank by what they are for. `total` is what must fit; `reserved` is what torch itself reports.

    `idle`: gradients that are not there at the fullest moment. Their blocks stay with the allocator from step to step,
    too small for what comes in their place, so they count in `reserved` all the same.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    unsharded: float = 0.0
    activations: float = 0.0
    working: float = 0.0
    loss: float = 0.0
    fragmentation: float = 0.0
    outside: float = 0.0
    host: float = 0.0
    idle: float = 0.0

    @property
    def allocated(self) -> float:
        """The tensors: torch.cuda.max_memory_allocated."""
        return self.reserved - self.fragmentation - self.idle

    @property
    def reserved(self) -> float:
        """The allocator's peak: torch.cuda.max_memory_reserved."""
        return sum(self.parts().values()) - self.outside

    @property
    def total(self) -> float:
        """Everything on the GPU."""
        return self.reserved + self.outside

    def parts(self) -> dict[str, float]:
        """Bytes on the GPU by name, largest use first as declared."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("host", "idle")}


def memory(job: Job) -> list[Memory]:
    """Peak memory of each pipeline rank; ranks that differ only in data or tensor parallelism are alike."""
    _, flight = job.pipeline()
    return [_rank_memory(job, rank, flight[rank]) for rank in range(job.degrees.pp)]


def peak(job: Job) -> Memory:
    """The fullest rank's: the first (most in flight), the first with the most layers, the one with the head, or in a V,
    where all have as many in flight, one with neighbours on both sides."""
    _, flight = job.pipeline()
    last = job.degrees.pp - 1
    ranks = {0, min(1, last), last, job.rank_layers.index(max(job.rank_layers)), job.head_rank}
    return max((_rank_memory(job, rank, flight[rank]) for rank in ranks), key=lambda found: found.total)


def moments(job: Job, rank: int = 0) -> dict[str, Memory]:
    """Memory of a pipeline rank at each moment of a step that may be its fullest."""
    _, flight = job.pipeline()
    found: dict[str, Memory] = {}
    for name, at in _Rank(job, rank, flight[rank]).moments():
        found[name] = max(found.get(name, at), at, key=lambda one: one.allocated)
    return found


def _rank_memory(job: Job, rank: int, flight: int) -> Memory:
    return max((found for _, found in _Rank(job, rank, flight).moments()), key=lambda found: found.total)


def activation_bytes(job: Job, checkpointing: str) -> float:
    """Bytes that one block keeps of one token from its forward to its backward pass, on one rank."""
    spec, tp, c = job.spec, job.degrees.tp, job.width
    cut = tp if job.sequence_parallel else 1
    wide, queries = spec.hidden_size, spec.num_attention_heads * spec.head_dim / tp
    keys, inner = max(1.0, spec.num_key_value_heads / tp) * spec.head_dim, spec.intermediate_size / tp
    sums = 4 * spec.num_attention_heads / tp
    if checkpointing == "full":
        return c * wide / cut
    if checkpointing == "selective":
        return c * (wide / cut + wide + 2 * queries + keys + inner) + sums
    normed = (queries + keys) * spec.qk_norm  # what q and k were before their norm
    numbers = 2 * wide / cut + 2 * wide + 2 * queries + 2 * keys + normed + (3 if job.compile else 4) * inner
    return c * numbers + sums + 8 / cut


def loss_bytes(job: Job) -> float:
    """Logits, their gradient and what the loss keeps, at its peak.

    chunked: of one chunk fp32 logits and probabilities, under tp one over the other and a copy in c; or its gradient
    in c and its part of the head's, in c; of all the head's gradient in fp32 and the hidden states' in c.
    whole: fp32 log-softmax and two gradients; fused: logits and gradient in c.
    """
    tokens, vocab, low = job.micro_tokens, job.spec.vocab_size / job.degrees.tp, _low(job)
    if job.loss == "whole":
        return 12 * tokens * vocab
    if job.loss == "fused":
        return 2 * job.width * tokens * vocab
    chunk = min(tokens, max(64, CHUNK_BYTES // (4 * vocab)))
    scored = (8 if job.degrees.tp == 1 else 4 + low) * chunk * vocab
    accumulated = (low * chunk * vocab + _head_bytes(job, low)) if low else 0.0
    return max(scored, accumulated) + _head_bytes(job, 4) + _hidden_bytes(job)


def _low(job: Job) -> int:
    """Bytes of a number where a copy in the arithmetic's dtype is made beside one in fp32: none in fp32."""
    return job.width if job.width < 4 else 0


def _head_bytes(job: Job, width: float) -> float:
    return width * job.table_params / job.degrees.tp


def _hidden_bytes(job: Job) -> float:
    """The hidden states of a microbatch, all tokens."""
    return job.micro_tokens * job.spec.hidden_size * job.width


def _turns(blocks: int) -> list[int]:
    """How many blocks are through their backward pass when there may be most: none, one, all but the last."""
    return sorted({0, min(1, blocks), max(0, blocks - 1)})


class _Rank:
    """One pipeline rank's parts of the sums. Bytes, on this rank, where not said otherwise."""

    def __init__(self, job: Job, rank: int, flight: int):
        self.job, self.n, self.c = job, job.degrees.shards, job.width
        self.layers = job.rank_layers[rank]
        self.layer = job.layer_params / job.degrees.tp  # parameters of one block
        self.tables = job.tables(rank) * job.table_params / job.degrees.tp
        self.own = self.layers * self.layer + self.tables
        self.has_head = rank == job.head_rank
        stages = job.stages_per_rank if job.degrees.pp > 1 else 1
        self.kept_blocks = flight * self.layers / stages
        self.rank, self.flight, self.stages = rank, flight, stages

    @cached_property
    def fsdp(self) -> bool:
        """As `puna.parallel.apply.needs_fsdp`."""
        d = self.job.degrees
        cut = d.tp > 1 or d.pp > 1
        return self.n > 1 or self.job.cpu_offload or (cut and (d.data > 1 or self.job.dtype != "float32"))

    @cached_property
    def autocast(self) -> bool:
        """Without FSDP, which casts whole blocks, torch casts each product's inputs, and the rest stays fp32."""
        return not self.fsdp and _low(self.job) > 0

    @cached_property
    def block(self) -> float:
        """What one block keeps of a microbatch."""
        return self._kept(self.job.checkpointing)

    def _kept(self, checkpointing: str) -> float:
        found = activation_bytes(self.job, checkpointing)
        if self.autocast:
            streams, copies = (2, 3) if checkpointing == "none" else (1, 0)  # q, k, v, gate, up: each has its own copy
            found += ((4 - self.c) * streams + self.c * copies) * self.job.spec.hidden_size
        return self.job.micro_tokens * found

    @cached_property
    def stream(self) -> float:
        """The residual stream of a microbatch, such as the last block's output."""
        cut = self.job.degrees.tp if self.job.sequence_parallel else 1
        return _hidden_bytes(self.job) / cut * (4 / self.c if self.autocast else 1)

    @cached_property
    def accumulates(self) -> bool:
        """Are gradients summed whole over the microbatches of a step, without a pipeline?"""
        return self.fsdp and self.job.zero == 1 and self.job.microbatches > 1

    def moments(self) -> Iterator[tuple[str, Memory]]:
        """In the order of a step. Backward: its first block, its second, or its last has most there."""
        if self.job.degrees.pp > 1:
            yield from self._piped()
            return
        kept = self.kept_blocks * self.block + self.stream
        if self.has_head:
            hidden = _hidden_bytes(self.job) + self.autocast * self.stream
            yield "loss", self._at(self._whole() + self._cached(), kept + hidden, loss=loss_bytes(self.job))
            if self.job.loss == "chunked":
                yield "loss backward", self._at(self._whole(), kept, loss=self._loss_backward())
        for done in _turns(self.layers):
            yield "backward", self._backward(done)
        yield "reduction", self._at(self._reduced(), self.stream, 4 * self.own / self.n)
        yield "step", self._at(0.0, 0.0, 4 * self.own / self.n)

    def _at(self, whole: float, kept: float, gradients: float = 0.0, working: float = 0.0, loss: float = 0.0) -> Memory:
        own = self.own / self.n
        stay = self.job.microbatches > 1 and not self.accumulates and self.job.degrees.pp == 1
        idle = 0.0 if stay else 4 * own - gradients
        if not self.fsdp and self.job.degrees.data > 1:
            whole += 4 * self.own  # DDP's buckets
        static, host = (4 * own, 4 * own, 8 * own), 0.0
        if self.job.cpu_offload:
            static, host, idle = (0.0, 0.0, 0.0), 16 * own, 0.0
        moving = FRAGMENTATION * (whole + kept + working + loss)
        return Memory(*static, whole, kept, working, loss, moving, OUTSIDE, host, idle)

    def _whole(self, done: int = 0) -> float:
        """Weights that are whole, and whole gradients of former microbatches; `done` blocks are through backward."""
        if not self.fsdp:
            blocks = self.layers - done if self.job.checkpointing == "none" else 1
            return self.c * self.layer * blocks * self.autocast  # kept for the backward pass, or made again in it
        found = self.c * (self.tables + (self.layers - done) * self.layer * (self.job.zero < 3))
        if self.accumulates:
            return found + 4 * self.own
        # Gradients on their way to other ranks stay until the next group's turn: the root's, last in a backward pass,
        # until the next microbatch's (until it ends only where it is the step's last); then those of the block before.
        waiting = self.layer if done else self.tables * (self.job.microbatches > 1)
        return found + 4 * waiting

    def _cached(self) -> float:
        """Autocast's copies that only its cache holds, which ends with the loss; the head's, for the loss alone."""
        if not self.autocast:
            return 0.0
        return self.c * self.layers * self.layer - self._whole() + _head_bytes(self.job, self.c)

    def _loss_backward(self) -> float:
        """The head's gradient as it was summed and as it leaves, in the head's dtype; the hidden states', too."""
        return _head_bytes(self.job, 4 + (self.c if self.fsdp else 4)) + 2 * _hidden_bytes(self.job)

    def _backward(self, done: int) -> Memory:
        """Within a block's backward pass, `done` blocks being through theirs."""
        whole, head = self._whole(done), _head_bytes(self.job, self.c if self.fsdp else 4) * self.has_head
        gradients = 4 * done * self.layer / self.n
        if self.fsdp:
            whole += head + 2 * self.c * self.layer * (self.job.zero == 3)
        else:
            gradients += head
        kept = max(0.0, self.kept_blocks - done) * self.block
        return self._at(whole, kept, gradients, self._working())

    def _piped(self) -> Iterator[tuple[str, Memory]]:
        """A pipeline's: the first backward pass, one after a forward pass, and one after another backward pass."""
        micro = self.job.microbatches
        losses = micro if self.has_head and self.job.schedule == "gpipe" else 1
        yield from self._turn(self.flight, True, True, losses)
        if self.flight < micro * self.stages:
            yield from self._turn(self.flight, False, True, 1)
        if self.flight > 1:
            yield from self._turn(self.flight - 1, False, False, max(1, losses - 1))
        own = 4 * self.own / self.n
        if self.fsdp:  # the root group is the first: its gradients, all of them whole, and on their way
            moving = 4 * (self.tables or self.layer)
            yield "reduction", self._at((self.c + 4) * self.own + moving, self._places(0), own)
        yield "step", self._at(0.0, self._places(0), own)

    def _turn(self, flight: int, first: bool, cut: bool, losses: int) -> Iterator[tuple[str, Memory]]:
        """Backward of one microbatch of `flight`; `first`: no gradients yet; `cut`: a forward pass was before it.

        `losses`: microbatches whose loss holds the head's gradient and the hidden states'.
        """
        share = self.layers / self.stages
        kept = flight * (share * self.block + self.stream) + self._places(flight)
        others = (losses - 1) * (_head_bytes(self.job, 4) + _hidden_bytes(self.job))
        if self.has_head:
            whole, made = self._stage(0, first, cut, 0.0)
            if cut:
                hidden = self.stream + _hidden_bytes(self.job)
                yield "loss", self._at(whole, kept + hidden, made, loss=loss_bytes(self.job) + others)
            yield "loss backward", self._at(whole, kept, made, loss=self._loss_backward() + others)
        for done in _turns(round(share)):
            whole, made = self._stage(done, first, cut, _head_bytes(self.job, 1) * self.has_head)
            yield "backward", self._at(whole, kept - done * self.block, made, self._working(), others)

    def _stage(self, done: int, first: bool, cut: bool, head: float) -> tuple[float, float]:
        """(weights and whole gradients, gradients that are there to stay); `head`: parameters with a new gradient."""
        if not self.fsdp:
            return self._whole(done), 4 * (done * self.layer + head) if first else 4 * self.own
        # One block in use and the next; those that are through stay.
        blocks = min(self.layers, done + 2) if cut and self.job.zero == 3 else self.layers
        made = 4 * done * self.layer + self.c * head if first else 4 * self.own + _low(self.job) * head
        return self.c * (self.tables + blocks * self.layer) + made, 0.0

    def _places(self, flight: int) -> float:
        """For what neighbours send, of each microbatch: hidden states beside those in flight, and gradients."""
        stages, micro = self.stages, self.job.microbatches
        inputs = max(0, micro * (stages - (self.rank == 0)) - flight)
        return (inputs + micro * (stages - self.has_head)) * self.stream

    def _working(self) -> float:
        """What checkpointing computes again, and gradients of a block's widest tensors and weight."""
        job, inner = self.job, self.job.spec.intermediate_size / self.job.degrees.tp
        weight = (self.c if self.fsdp else 4) * inner * job.spec.hidden_size
        wide = job.micro_tokens * 2 * self.c * inner + _hidden_bytes(job) * (4 / self.c if self.autocast else 1)
        return self._kept("none") - self.block + wide + weight

    def _reduced(self) -> float:
        """Root group: gradients as they came, and in fp32 on their way to other ranks."""
        if not self.fsdp:
            return 0.0
        return (4 + (4 if self.accumulates else self.c)) * self.tables
