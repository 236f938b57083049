"""Time of one optimizer step: compute, memory traffic, collectives with overlap, and the pipeline's bubble.

A chunk of work (one stage, one microbatch) takes, in forward, input-gradient and weight-gradient passes,

    products / (peak x achieved)  +  attention / (peak x achieved x ATTENTION)  +  bytes of everything else / bandwidth
    + collectives that nothing hides (tensor parallelism, context parallelism, pipeline neighbours)

and never less than its kernels take to launch. The simulated schedule turns chunks into a step, at the pace of the
slowest stage; FSDP's collectives run beside it. Each constant below is one physical effect, fitted once over all
published rows of tests/parallel/test_throughput.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from puna.parallel.job import Job
from puna.parallel.machines import Machine

ATTENTION = 0.62  # flash attention's rate as a share of a matrix product's: softmax between the products, causal edges
NARROW = 160  # a product whose smallest side is n runs at n / (n + NARROW) of the rate: tiles that do not fill
EAGER = 3.0  # passes over memory without compile, as a multiple of the fused count: each small operation on its own
LINK = 0.8  # of a link's rate that a large collective reaches (NCCL bus bandwidth: 360 of 450 GB/s on an H100 node)
HOP = 6e-6  # seconds per step of a ring across nodes; a quarter of that within a node
HIDDEN = 0.8  # share of FSDP's traffic that runs behind compute; the rest waits or slows it (copy engines, SMs, power)
ASYNC = 0.45  # share of tensor parallelism's traffic that async TP runs behind the products it belongs to
LAUNCH = 6e-6  # seconds a kernel takes to launch from Python; compiled blocks have about half as many kernels
KERNELS = {"forward": 30, "backward": 60}  # of one block, uncompiled
HOST_LINK, HOST_ADAM = 25e9, 40e9  # bytes/s of PCIe 4 x16, and of a CPU's AdamW per rank (its share of DRAM bandwidth)


@dataclass(frozen=True)
class Pass:
    """Seconds of one stage on one microbatch: forward, backward for the input, backward for the weights."""

    forward: float
    backward_input: float
    backward_weight: float

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward_input + self.backward_weight


@dataclass(frozen=True)
class Throughput:
    """A step in seconds and its parts. `mfu`: model FLOPs, 6 N + 12 L H Q T per token, over the dense bf16 peak."""

    seconds: float
    tokens_per_second: float  # per GPU
    mfu: float
    bubble: float
    parts: dict[str, float]  # seconds of the slowest pipeline rank; 'sharding' is what is not hidden
    traffic: dict[str, float]  # bytes a rank sends per step, by collective
    times: Pass  # of one chunk, for the picture


def throughput(job: Job, gpu: Machine) -> Throughput:
    """Seconds per step and tokens/s per GPU."""
    layers = max(job.rank_layers)
    share = layers / job.stages_per_rank if job.degrees.pp > 1 else layers
    block, head = _block(job, gpu), _head(job, gpu)
    worst = _add(_scale(block, share), _scale(head, 1.0))
    # The bubble hardly moves with the passes' ratio: quarters are fine, and a search meets the same pipeline again.
    bubble, _ = job.pipeline(*(max(0.25, round(4 * x / worst.forward) / 4) for x in vars(worst).values()))
    compute = job.microbatches * job.stages_per_rank * worst.total / (1 - bubble)
    sharding, traffic = _sharding(job, gpu, max(job.tables(rank) for rank in range(job.degrees.pp)))
    exposed = max(sharding - compute, 0.0) + (1 - HIDDEN) * min(sharding, compute)
    update = _update(job, gpu)
    seconds = compute + exposed + update
    speed = job.tokens / seconds / job.degrees.world
    flops = job.spec.flops_per_token(job.seq_len)
    parts = _parts(job, gpu, share * job.microbatches * job.stages_per_rank) | {"bubble": compute * bubble}
    parts |= {"sharding": exposed, "optimizer": update}
    parts["other"] = max(0.0, seconds - sum(parts.values()))
    peak = gpu.peak["float32" if job.dtype == "float32" else "bfloat16"]
    return Throughput(seconds, speed, speed * flops / peak, bubble, parts, traffic | _traffic(job), worst)


def collective_seconds(gpu: Machine, ranks: int, stride: int, size: float) -> float:
    """An all-gather or reduce-scatter of `size` bytes in all over `ranks` GPUs that lie `stride` apart.

    A ring moves (n-1)/n of the bytes through every GPU. Across nodes, the network cards of all the group's GPUs in a
    node serve the ring together, as NCCL's channels do. An all-reduce is one of each.
    """
    if ranks == 1:
        return 0.0
    within = max(1, min(ranks, gpu.per_node // stride))
    nodes = math.ceil(ranks / within)
    if nodes == 1:
        return size * (ranks - 1) / ranks / (gpu.link * LINK) + (ranks - 1) * HOP / 4
    rate = min(gpu.link, gpu.network * within) * LINK
    return size * (ranks - 1) / ranks / rate + (nodes + within) * HOP


def _block(job: Job, gpu: Machine) -> Pass:
    """One block of one microbatch."""
    products, attention, bytes_moved = _products(job, gpu), _attention(job, gpu), _elementwise(job, gpu)
    forward = products + attention + bytes_moved + _exchange(job, gpu)
    again = {"none": 0.0, "full": forward, "selective": _again(job, products, bytes_moved) + _tensor(job, gpu) / 2}
    weight = products
    back = products + 2.5 * attention + 2 * bytes_moved + _exchange(job, gpu) + again[job.checkpointing]
    fuse = 0.5 if job.compile else 1.0
    launch = {name: number * LAUNCH * fuse for name, number in KERNELS.items()}
    forward, slow = max(forward, launch["forward"]), max(back + weight, launch["backward"]) / (back + weight)
    return Pass(forward, back * slow, weight * slow)


def _products(job: Job, gpu: Machine) -> float:
    """Forward matrix products of a block, in the dtype of its linears, with float8's casts."""
    spec, tp, t = job.spec, job.degrees.tp, job.micro_tokens
    d, q, f = spec.hidden_size, spec.num_attention_heads * spec.head_dim / tp, spec.intermediate_size / tp
    kv = max(1.0, spec.num_key_value_heads / tp) * spec.head_dim
    rate = gpu.rate(linear_dtype(job, gpu))
    columns = ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))
    seconds = sum(2 * t * a * b / rate * (1 + NARROW / min(t, a, b)) for a, b in columns)
    # Casting reads twice (the largest value, then the numbers) and writes one byte; backward casts as much in each of
    # its two passes, so it is counted here, once per pass.
    casts = t * (2 * d + q + f) * (2 * job.width + 1) if linear_dtype(job, gpu) == "float8" else 0.0
    return seconds + casts / gpu.bandwidth


def linear_dtype(job: Job, gpu: Machine) -> str:
    """What the blocks' linears compute in: float8 where the machine has it, else the arithmetic's dtype."""
    return "float8" if job.float8 and "float8" in gpu.peak else job.dtype


def _attention(job: Job, gpu: Machine) -> float:
    """Forward: 4 K H FLOPs per pair of tokens that see each other: T/2 before each, at most the window."""
    spec, length = job.spec, job.seq_len
    seen = sum(length / 2 if not w or w >= length else w - w * w / (2 * length) for w in spec.sliding_windows)
    per_token = 4 * spec.num_attention_heads * spec.head_dim / job.degrees.tp * seen / spec.num_hidden_layers
    return job.micro_tokens * per_token / (gpu.rate(job.dtype) * ATTENTION)


def _elementwise(job: Job, gpu: Machine) -> float:
    """Forward traffic beside the products: two norms (2 D each), two sums (3 D each), rope (2 (q + k)), 3 F."""
    spec, tp = job.spec, job.degrees.tp
    cut = tp if job.sequence_parallel else 1
    heads = (spec.num_attention_heads + spec.num_key_value_heads) * spec.head_dim / tp
    numbers = 10 * spec.hidden_size / cut + 2 * heads + 3 * spec.intermediate_size / tp
    return job.micro_tokens * numbers * job.width * (1.0 if job.compile else EAGER) / gpu.bandwidth


def _again(job: Job, products: float, bytes_moved: float) -> float:
    """What selective checkpointing computes twice: the products with k, out and up, and everything elementwise."""
    spec = job.spec
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    twice = spec.hidden_size * (kv + q + spec.intermediate_size)
    return products * twice / (spec.hidden_size * (2 * q + 2 * kv + 3 * spec.intermediate_size)) + bytes_moved


def _exchange(job: Job, gpu: Machine) -> float:
    """Collectives of a block's forward (or backward) pass that compute waits for."""
    context = _context(job, gpu)
    if job.cp_method == "ring":  # each step's transfer runs beside the attention on the step before
        context = max(0.0, context - _attention(job, gpu))
    return _tensor(job, gpu) + context


def _tensor_bytes(job: Job) -> float:
    """Two gathers and two reduce-scatters of (t, D) per pass; without sequence parallelism two all-reduces, as much."""
    return 4 * job.micro_tokens * job.spec.hidden_size * job.width if job.degrees.tp > 1 else 0.0


def _tensor(job: Job, gpu: Machine) -> float:
    exposed = 1 - ASYNC if job.async_tp else 1.0
    return 4 * exposed * collective_seconds(gpu, job.degrees.tp, 1, _tensor_bytes(job) / 4)


def _context_bytes(job: Job) -> float:
    """Keys and values of all ranks (gathered, or handed round the ring), or q, k, v and out dealt out by heads."""
    spec, degrees = job.spec, job.degrees
    if degrees.cp == 1:
        return 0.0
    keys, queries = spec.num_key_value_heads, spec.num_attention_heads
    heads = 2 * (keys + queries) if job.cp_method == "ulysses" else 2 * keys * degrees.cp
    return job.micro_tokens * heads * spec.head_dim / degrees.tp * job.width


def _context(job: Job, gpu: Machine) -> float:
    return collective_seconds(gpu, job.degrees.cp, job.degrees.tp, _context_bytes(job))


def _head(job: Job, gpu: Machine) -> Pass:
    """Output head and loss of one microbatch, on the rank that has them; in the arithmetic's dtype also with float8.

    Logits are written and read a few times in fp32: log-sum-exp, probabilities, gradient.
    """
    tokens, vocab = job.micro_tokens, job.spec.vocab_size / job.degrees.tp
    product = 2 * tokens * vocab * job.spec.hidden_size / gpu.rate(job.dtype)
    passes = tokens * vocab * 4 * (3 if job.compile or job.loss == "fused" else 6) / gpu.bandwidth
    sent = 0.0
    if job.degrees.pp > 1:
        cut = job.degrees.tp if job.sequence_parallel else 1
        stride = job.degrees.world // job.degrees.pp
        rate = gpu.link if stride * job.degrees.pp <= gpu.per_node else gpu.network
        sent = tokens * job.spec.hidden_size * job.width / cut / (rate * LINK) + HOP
    return Pass(product + passes + sent, product + passes + sent, product)


def _sharding(job: Job, gpu: Machine, tables: int) -> tuple[float, dict[str, float]]:
    """FSDP's and DDP's collectives of a step, on the fullest pipeline rank: seconds if nothing hid them, and bytes.

    zero 3 gathers every block's weights before its forward and its backward pass, of every microbatch; zero 2 once a
    microbatch, zero 1 once a step. Gradients are reduced in fp32 for every microbatch, with zero 1 once a step. In a
    pipeline zero 2 is zero 1, and zero 3 reduces once a step, too: there a block stays whole from a backward pass to
    the end of the next forward pass, so each pass gathers it that follows a forward pass or is the first: M + 1 of the
    2 M, whatever the schedule. float8 gathers single bytes.
    """
    degrees, layers = job.degrees, max(job.rank_layers)
    layer, table = job.layer_params / degrees.tp, tables * job.table_params / degrees.tp
    stride = degrees.tp
    micro, once = job.microbatches, degrees.pp > 1 or job.zero == 1
    rounds = 1 if once else micro
    passes = (micro + 1 if degrees.pp > 1 else 2 * micro) if job.zero == 3 else rounds
    gathers = passes if degrees.shards > 1 else 0
    roots = min(gathers, 1) if once else gathers  # embedding and head: whole from the first pass to the last
    width = 1 if job.float8 and "float8" in gpu.peak else job.width
    gradients = 4 * (layers * layer + table)
    sent, copied = 1 - 1 / degrees.shards, 1 - 1 / degrees.dp_replicate
    traffic = {
        "all-gather": sent * (gathers * layers * layer * width + roots * table * job.width),
        "reduce-scatter": sent * rounds * gradients,
        "all-reduce": 2 * copied * gradients / degrees.shards,
    }

    def seconds(size: float) -> float:
        return collective_seconds(gpu, degrees.shards, stride, size)

    total = gathers * layers * seconds(layer * width) + roots * seconds(table * job.width)
    total += rounds * (layers * seconds(4 * layer) + seconds(4 * table))
    total += 2 * collective_seconds(gpu, degrees.dp_replicate, stride * degrees.shards, gradients / degrees.shards)
    return total, traffic


def _update(job: Job, gpu: Machine) -> float:
    """AdamW reads weight, gradient and two moments and writes three of them; the norm reads the gradients once more."""
    own = max(job.rank_layers) * job.layer_params + job.tables(0) * job.table_params
    share = own / job.degrees.tp / job.degrees.shards
    if job.cpu_offload:  # weights down and gradients up, each way once a pass, and the update on the CPU
        return share * (4 * 2 + 4) / HOST_LINK + 28 * share / HOST_ADAM
    return 32 * share / gpu.bandwidth


def _parts(job: Job, gpu: Machine, blocks: float) -> dict[str, float]:
    """Seconds of a step by cause, over `blocks` block passes."""
    again = {"none": 0.0, "selective": 0.0, "full": 1.0}[job.checkpointing]
    products, bytes_moved = _products(job, gpu), _elementwise(job, gpu)
    selective = job.checkpointing == "selective"
    twice = _again(job, products, bytes_moved) - bytes_moved if selective else again * products
    return {
        "products": blocks * 3 * products,
        "attention": blocks * 3.5 * _attention(job, gpu),
        "elementwise": blocks * 3 * bytes_moved,
        "recomputation": blocks * (twice + (selective + again) * bytes_moved + again * _attention(job, gpu)),
        "tensor parallel": blocks * (2 + 0.5 * selective + again) * _tensor(job, gpu),
        "context parallel": blocks * (2 + again) * (_exchange(job, gpu) - _tensor(job, gpu)),
    }


def _traffic(job: Job) -> dict[str, float]:
    """Bytes a rank sends per step beside FSDP's."""
    degrees = job.degrees
    blocks = max(job.rank_layers) * job.microbatches
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[job.checkpointing]
    cut = degrees.tp if job.sequence_parallel else 1
    hand_on = job.micro_tokens * job.spec.hidden_size * job.width / cut * 2 * job.microbatches * job.stages_per_rank
    return {
        "tensor parallel": (2 + again) * blocks * _tensor_bytes(job) * (degrees.tp - 1) / degrees.tp,
        "context parallel": (2 + again) * blocks * _context_bytes(job) * (degrees.cp - 1) / degrees.cp,
        "pipeline": hand_on if degrees.pp > 1 else 0.0,
    }


def _add(a: Pass, b: Pass) -> Pass:
    return Pass(a.forward + b.forward, a.backward_input + b.backward_input, a.backward_weight + b.backward_weight)


def _scale(a: Pass, factor: float) -> Pass:
    return Pass(a.forward * factor, a.backward_input * factor, a.backward_weight * factor)
