"""Memory of one rank, in closed forms. Letters: job.py; c bytes per number of the arithmetic, N ranks share weights.

Per parameter (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054, section 5; puna keeps fp32 weights, AdamW two moments):

    weights 4 / N        gradients 4 / N        moments 8 / N        (zero 3; all fp32)
    zero 2: + c for a copy of all weights in the arithmetic's dtype, kept between forward and backward
    zero 1: weights and gradients are whole on every rank (4 + 4, + c for the autocast copy); only the moments are cut
    pipeline with several microbatches: + 4 for gradients that are summed whole before the one reduction of a step

FSDP holds two blocks' weights whole at a time (the one in use and the next), one block's gradients in c and fp32, and
embedding and head, its root group, from the forward pass to the end of the backward pass.

Activations of one block per token, in numbers (Korthikanti et al. 2022, arXiv:2205.05198, section 4, redone for SwiGLU,
GQA and flash attention, which keeps no T x T; s is tp under sequence parallelism, else 1):

    none       2 D/s (the two norms' inputs) + 2 D (their outputs, gathered) + (2 H + 2 G) K / tp (q, out; k, v)
               + 4 F/tp (gate, up, silu(gate), product; 3 when compiled: silu is made again)
    selective  D/s (block input) + (2 H + G) K / tp (q, v, attention's output) + F/tp (gate) + D/s (down): every second
               matrix product and attention are kept, the rest is computed again - torchtitan's 'op' policy
    full       D/s (block input)

plus 4 bytes per token and head for attention's log-sum-exp, and 8 for the norms' scales, where they are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from puna.parallel.job import Job

CHUNK_BYTES = 512 * 2**20  # fp32 logits of one chunk on a GPU: ops.basic.chunk_tokens, which needs torch to import
FRAGMENTATION = 0.08  # of what comes and goes: allocator rounding and holes; fitted to torchtitan's peak reserved
OUTSIDE = 2.0 * 2**30  # CUDA context, NCCL buffers, cuBLAS workspaces: beside the allocator, assumed


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank by what they are for. `total` is what must fit; `reserved` is what torch itself reports."""

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

    @property
    def reserved(self) -> float:
        """The allocator's peak: torch.cuda.max_memory_reserved."""
        return sum(getattr(self, f.name) for f in fields(self)) - self.outside - self.host

    @property
    def total(self) -> float:
        """Everything on the GPU."""
        return self.reserved + self.outside

    def parts(self) -> dict[str, float]:
        """Bytes on the GPU by name, largest use first as declared."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "host"}


def memory(job: Job) -> list[Memory]:
    """Peak memory of each pipeline rank; ranks that differ only in data or tensor parallelism are alike."""
    _, flight = job.pipeline()
    return [_rank_memory(job, rank, flight[rank]) for rank in range(job.degrees.pp)]


def peak(job: Job) -> Memory:
    """The fullest rank's: the first (most in flight), the first with the most layers, or the one with the head."""
    _, flight = job.pipeline()
    ranks = {0, job.rank_layers.index(max(job.rank_layers)), job.head_rank}
    return max((_rank_memory(job, rank, flight[rank]) for rank in ranks), key=lambda found: found.total)


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
        return c * (2 * wide / cut + 2 * queries + keys + inner) + sums
    normed = (queries + keys) * spec.qk_norm  # what q and k were before their norm
    numbers = 2 * wide / cut + 2 * wide + 2 * queries + 2 * keys + normed + (3 if job.compile else 4) * inner
    return c * numbers + sums + 8


def loss_bytes(job: Job) -> float:
    """Logits, their gradient and what the loss keeps, at its peak.

    chunked: fp32 logits, fp32 probabilities and a gradient in c of one chunk, the hidden states' gradient in c and the
    head's in fp32. whole: fp32 log-softmax and two gradients; fused: logits and gradient in c.
    """
    tokens, vocab = job.micro_tokens, job.spec.vocab_size / job.degrees.tp
    if job.loss == "whole":
        return 12 * tokens * vocab
    if job.loss == "fused":
        return 2 * job.width * tokens * vocab
    chunk = min(tokens, max(64, CHUNK_BYTES // (4 * vocab)))
    head = 4 * job.table_params / job.degrees.tp
    return (8 + job.width) * chunk * vocab + job.width * tokens * job.spec.hidden_size + head


def _rank_memory(job: Job, rank: int, flight: int) -> Memory:
    static = _static(job, rank)
    chunk_layers = job.rank_layers[rank] / job.stages_per_rank if job.degrees.pp > 1 else job.rank_layers[rank]
    tokens = job.micro_tokens
    activations = flight * chunk_layers * tokens * activation_bytes(job, job.checkpointing)
    activations += tokens * job.spec.hidden_size * job.width  # the embedding's output, or what the neighbour sent
    loss = loss_bytes(job) if rank == job.head_rank else 0.0
    # Logits are gone before the first block's backward pass: only the larger of the two counts.
    working = max(0.0, _working(job) - loss)
    moving = static.unsharded + activations + working + loss
    return Memory(
        static.weights, static.gradients, static.optimizer, static.unsharded, activations, working, loss,
        FRAGMENTATION * moving, OUTSIDE, static.host,
    )  # fmt: skip


def _static(job: Job, rank: int) -> Memory:
    """What lies there for the whole step: weights, gradients, moments, and what FSDP makes whole."""
    degrees, c, n = job.degrees, job.width, job.degrees.shards
    layer, tables = job.layer_params / degrees.tp, job.tables(rank) * job.table_params / degrees.tp
    own = job.rank_layers[rank] * layer + tables
    copy = c * own if c < 4 else 0.0  # autocast's, of weights that are whole
    if n == 1 or job.zero == 1:
        return Memory(4 * own, 4 * own, 8 * own / n, copy)
    whole = c * own if job.zero == 2 else c * (2 * layer + tables)
    summed = 4 * own if degrees.pp > 1 and job.microbatches > 1 else (c + 4) * max(layer, tables / 2)
    if job.cpu_offload:
        return Memory(unsharded=whole + summed, host=16 * own / n)
    return Memory(4 * own / n, 4 * own / n, 8 * own / n, whole + summed)


def _working(job: Job) -> float:
    """One block's backward pass: what checkpointing computes again, and gradients of its widest tensors."""
    tp = job.degrees.tp
    again = activation_bytes(job, "none") - activation_bytes(job, job.checkpointing)
    gradients = job.width * (3 * job.spec.intermediate_size / tp + 3 * job.spec.hidden_size)
    return job.micro_tokens * (again + gradients)
