"""How many ways each dimension is cut, and every refusal that needs no process. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.parallel.schedules import SPLIT_BACKWARD, check_schedule, default_stages

CP_METHODS = ("allgather", "ulysses", "ring")


class Section(Protocol):
    """The recipe's [parallel] section, as far as it is looked at here."""

    @property
    def dp_replicate(self) -> int: ...
    @property
    def dp_shard(self) -> int: ...
    @property
    def tp(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def cp(self) -> int: ...
    @property
    def zero(self) -> int: ...
    @property
    def sequence_parallel(self) -> bool: ...
    @property
    def async_tp(self) -> bool: ...
    @property
    def pp_schedule(self) -> str: ...
    @property
    def pp_microbatches(self) -> int: ...
    @property
    def pp_stages_per_rank(self) -> int: ...
    @property
    def cp_method(self) -> str: ...


@dataclass(frozen=True)
class Degrees:
    """Ranks along each dimension of the mesh, outermost first: pp, dp_replicate, dp_shard, cp, tp."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def world(self) -> int:
        """All ranks."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Ways in which FSDP cuts weights: ranks of a context-parallel group hold the same weights, so they join in."""
        return self.dp_shard * self.cp

    def __str__(self) -> str:
        return " x ".join(f"{name} {n}" for name, n in vars(self).items() if n > 1) or "one rank"


def resolve(section: Section, world: int, spec: Spec, seq_len: int, batch_size: int) -> Degrees:
    """The degrees of a recipe on `world` ranks, `dp_shard` 0 filled in; PunaError for all that cannot work.

    `seq_len` in tokens, `batch_size` in sequences per optimizer step. The hint is a setting that passes the same check.
    """
    degrees = _fill(section, world)
    check_degrees(section, degrees, spec, seq_len, batch_size)
    return degrees


def check_degrees(section: Section, degrees: Degrees, spec: Spec, seq_len: int, batch_size: int) -> None:
    """Refuse what the model, the batch or torch cannot do with these degrees."""
    _check_tensor(section, degrees, spec, seq_len)
    _check_context(section, degrees, spec, seq_len)
    _check_pipeline(section, degrees, spec)
    if batch_size % degrees.data:
        raise PunaError(
            f"train.batch_size {batch_size} is not divisible by {degrees.data} data-parallel ranks "
            f"(dp_replicate {degrees.dp_replicate} x dp_shard {degrees.dp_shard})",
            f"use --train.batch_size {-(-batch_size // degrees.data) * degrees.data}",
        )


def check_passes(section: Section, degrees: Degrees, dtype: str, activation_checkpointing: str, compile: bool) -> None:
    """Refuse arithmetic and passes over the blocks that do not go with these degrees."""
    if degrees.world > 1 and dtype == "float16":
        raise PunaError(f"float16 needs loss scaling, which is not built for {degrees.world} ranks",
                        "use --train.dtype bfloat16")  # fmt: skip
    if section.async_tp and degrees.tp > 1 and (compile or not section.sequence_parallel):
        raise PunaError(
            f"async_tp with sequence_parallel {section.sequence_parallel} and compile {compile}: it needs a residual "
            "stream that is cut by tokens, and torch.compile cannot trace its ring",
            "use --parallel.async_tp false, or sequence_parallel true and --train.compile false",
        )
    if degrees.pp > 1 and section.pp_schedule in SPLIT_BACKWARD:
        _check_split_backward(section, activation_checkpointing, compile)


def _check_split_backward(section: Section, activation_checkpointing: str, compile: bool) -> None:
    """These schedules take the gradients of weights apart from those of inputs."""
    hint = "or --parallel.pp_schedule interleaved, whose backward pass is whole"
    troubles = {
        "selective": "torch goes back only once through a block checkpointed so, the schedule goes twice",
        "full": "a block is recomputed once for each of its weights, which costs more than the schedule saves",
    }
    if activation_checkpointing in troubles:
        raise PunaError(
            f"{section.pp_schedule} with activation_checkpointing {activation_checkpointing}: "
            f"{troubles[activation_checkpointing]}",
            f"use --train.activation_checkpointing none, {hint}",
        )
    if compile:
        raise PunaError(
            f"{section.pp_schedule} with compile: torch cannot split the backward pass of a compiled block",
            f"use --train.compile false, {hint}",
        )


def microbatches(section: Section, degrees: Degrees, batch_size: int, micro_batch_size: int) -> int:
    """Forward passes a rank makes for one optimizer step. Without a pipeline these are gradient accumulation.

    `pp_microbatches` 0: as `micro_batch_size` says, else the fewest that are at least 2 pp and divide the rank's batch
    (all of it where it has fewer sequences).
    """
    local = batch_size // degrees.data
    if degrees.pp == 1 or (section.pp_microbatches == 0 and micro_batch_size):
        micro = micro_batch_size or local
        if local % micro:
            raise PunaError(f"train.micro_batch_size {micro} does not divide a rank's {local} sequences",
                            f"use one of {_divisors(local)}")  # fmt: skip
        number = local // micro
    else:
        number = section.pp_microbatches or min((n for n in _divisor_list(local) if n >= 2 * degrees.pp), default=local)
        if local % number:
            raise PunaError(
                f"a rank's {local} sequences are not divisible by pp_microbatches {number}",
                f"use --parallel.pp_microbatches {local}, "
                f"or --train.batch_size {-(-local // number) * number * degrees.data}",
            )
    if degrees.pp > 1:
        check_schedule(section.pp_schedule, degrees.pp, number, stages_per_rank(section))
    return number


def stages_per_rank(section: Section) -> int:
    """Pipeline stages of one rank, the schedule's own number filled in for 0."""
    return section.pp_stages_per_rank or default_stages(section.pp_schedule)


def split_layers(layers: int, stages: int) -> list[int]:
    """Layers of each stage. The first and the last, which also hold embedding and head, are the last to get more."""
    base, extra = divmod(layers, stages)
    middle = [*range(1, stages - 1), 0, stages - 1]
    more = set(middle[:extra])
    return [base + (stage in more) for stage in range(stages)]


def _fill(section: Section, world: int) -> Degrees:
    given = {name: getattr(section, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp")}
    for name, value in given.items():
        least = 0 if name == "dp_shard" else 1
        if value < least:
            raise PunaError(f"parallel.{name} is {value}", f"use --parallel.{name} {max(1, least)} or more")
    others = given["dp_replicate"] * given["cp"] * given["tp"] * given["pp"]
    text = " x ".join(f"{name} {value}" for name, value in given.items() if value > 1) or "every degree 1"
    if given["dp_shard"] == 0:
        if world % others:
            raise PunaError(f"{text} needs a multiple of {others} ranks, there are {world}",
                            f"use {max(1, world // others) * others} ranks, or degrees whose product divides {world}"
                            )  # fmt: skip
        given["dp_shard"] = world // others
    degrees = Degrees(**given)
    if degrees.world != world:
        hint = _working(world, others, degrees.world)
        raise PunaError(f"{text} makes {degrees.world} ranks, there are {world}", hint)
    return degrees


def _working(world: int, others: int, product: int) -> str:
    if world % others == 0:
        return f"use --parallel.dp_shard {world // others} (0 takes all ranks that are left), or {product} ranks"
    return f"use {product} ranks, or degrees whose product is {world}"


def _check_tensor(section: Section, degrees: Degrees, spec: Spec, seq_len: int) -> None:
    tp, heads, kv = degrees.tp, spec.num_attention_heads, spec.num_key_value_heads
    if heads % tp:
        raise PunaError(
            f"num_attention_heads {heads} is not divisible by tp {tp}", f"use --parallel.tp {_divisors(heads)}"
        )
    if kv % tp and tp % kv:  # fewer kv heads than tp are replicated, but evenly
        both = ", ".join(str(n) for n in _divisor_list(heads) if kv % n == 0 or n % kv == 0)
        raise PunaError(
            f"num_key_value_heads {kv} neither divides tp {tp} nor is divisible by it", f"use --parallel.tp {both}"
        )
    if section.sequence_parallel and tp > 1 and (seq_len // max(1, degrees.cp)) % tp:
        step = tp * degrees.cp
        raise PunaError(
            f"data.seq_len {seq_len} / cp {degrees.cp} is not divisible by tp {tp}, and sequence parallelism cuts it",
            f"use --data.seq_len {max(1, seq_len // step) * step}, or --parallel.sequence_parallel false",
        )


def _check_context(section: Section, degrees: Degrees, spec: Spec, seq_len: int) -> None:
    cp, heads = degrees.cp, spec.num_attention_heads // degrees.tp
    if section.cp_method not in CP_METHODS:
        raise PunaError(f"cp_method {section.cp_method!r} is not one puna knows", f"methods: {', '.join(CP_METHODS)}")
    chunks = cp if section.cp_method == "ulysses" or cp == 1 else 2 * cp  # else a rank has one early and one late chunk
    if seq_len % chunks:
        raise PunaError(
            f"data.seq_len {seq_len} is not divisible by {chunks}, the chunks of cp {cp} by {section.cp_method}",
            f"use --data.seq_len {max(1, seq_len // chunks) * chunks}",
        )
    if section.cp_method == "ulysses" and heads % cp:
        raise PunaError(f"ulysses deals out heads, and {heads} per tensor-parallel rank are not divisible by cp {cp}",
                        "use --parallel.cp_method allgather or ring")  # fmt: skip


def _check_pipeline(section: Section, degrees: Degrees, spec: Spec) -> None:
    if section.zero not in (1, 2, 3):
        raise PunaError(f"parallel.zero is {section.zero}", "use 1 (optimizer), 2 (and gradients) or 3 (and weights)")
    if degrees.pp == 1:
        return
    each, layers = stages_per_rank(section), spec.num_hidden_layers
    if layers < degrees.pp * each:
        raise PunaError(
            f"{layers} layers are fewer than {degrees.pp * each} pipeline stages (pp {degrees.pp} x {each} per rank)",
            f"use --parallel.pp {max(1, layers // each)} or fewer",
        )
    if spec.tie_word_embeddings:
        raise PunaError(
            f"pp {degrees.pp} puts embedding and head on two stages, and tie_word_embeddings makes them one weight",
            "use --parallel.pp 1 (with tp or dp_shard in its place), or a model with a head of its own",
        )
    if section.pp_schedule in SPLIT_BACKWARD and section.zero == 3 and degrees.shards > 1:
        raise PunaError(
            f"{section.pp_schedule} with zero 3 trains on wrong gradients in torch, without an error",
            "use --parallel.zero 2 (weights stay whole between the passes), or --parallel.pp_schedule 1f1b",
        )


def _divisor_list(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _divisors(number: int) -> str:
    return ", ".join(map(str, _divisor_list(number)))
