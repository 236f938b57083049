"""The walk: a model quantized block by block, each seeing what the quantized blocks before it really hand on.

Memory holds one block; hidden states lie on disk (`streams`). Four streams go through the model together:

    calibration   through finished blocks: every block is measured, and mended, on the inputs it will get
    reference     held-out text through the original blocks         \\
    rounded       the same through plainly rounded ones              > the report card's before, rounding, after
    after         the same through the finished ones                /

A block that is finished is handed to a sink that keeps it, then the walk's own state is written: killed at any
instant, it goes on at that block with the same result.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.base.storage import read_json, write_json
from puna.model.attention import Attend
from puna.model.spec import Spec
from puna.ops.attention import RoundedKV
from puna.ops.basic import rms_norm
from puna.ops.formats.kv import KVScales
from puna.ops.formats.layer import QuantizedWeight
from puna.quant.blocks import INPUTS, RoundedLinear, Runner, block_parameters, build_block, round_block
from puna.quant.calibration import Sequences
from puna.quant.config import QuantConfig
from puna.quant.kv import KVRange
from puna.quant.moments import Moments, Reduce
from puna.quant.report import Layer
from puna.quant.score import Score
from puna.quant.steps import Stored, measure, plain_rounding, quantize_linears
from puna.quant.streams import Stream

Tensors = dict[str, Tensor | QuantizedWeight]
STATE = "walk.json"


@dataclass(frozen=True)
class Job:
    """A quantization: what is read, how, on which text.

    read: a parameter by our name, on the CPU, as stored. text: this rank's share of it; without any, nothing is
    measured. folder: for streams and state; what an interrupted run left there is continued.
    """

    spec: Spec
    config: QuantConfig
    read: Callable[[str], Tensor]
    text: Sequences | None
    folder: Path
    device: torch.device
    reduce: Reduce = lambda tensor, how: tensor
    stored: Stored = field(default_factory=Stored)


@dataclass
class Outcome:
    """What the walk found: rows per layer, scores of rounding and of the result, seconds per phase."""

    rows: list[Layer] = field(default_factory=list)
    kv: KVScales | None = None
    rounded: Score | None = None
    after: Score | None = None
    last_logits: Tensor | None = None  # of the first held-out sequence, to compare a reloaded model with
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True)
class _OneLayer:
    """An attention that calls every layer 0: the block's own scales are all there is."""

    attend: Any

    @property
    def max_len(self) -> int:
        return self.attend.max_len

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor:
        return self.attend(0, q_THK, k_TGK, v_TGK, window)


class Walk:
    """One pass over the layers; `run` it to its end. Raises what methods and the sink raise, with the layer's name."""

    def __init__(self, job: Job):
        self.job, self.spec, self.config = job, job.spec, job.config
        self.runner = Runner(job.spec, job.device)
        self.found = Outcome()
        self.layer = 0
        self._kv: list[tuple[list[float], list[float]]] = []
        self._closing = ExitStack()
        self._ids = {} if job.text is None else _ids(job.text, self.config)
        self.calibration, self.reference, self.rounded, self.after = (
            self._open(name) for name in ("calibration", "reference", "rounded", "after")
        )
        self.after = self.after or self.rounded  # one stream where both are the same
        self._continue()

    def run(self, keep: Callable[[str, Tensors], None], advance: Callable[[int, str], None]) -> Outcome:
        """Quantize what is left. `keep(name, tensors)` stores a finished part, `advance(bytes, note)` shows how far."""
        with self._closing:
            if self.layer == 0:
                self._embed()
            for layer in range(self.layer, self.spec.num_hidden_layers):
                size = self._block(layer, keep)
                self._remember(layer + 1)
                advance(size, f"layer {layer + 1}/{self.spec.num_hidden_layers}")
            self._head(keep)
        self.found.kv = self._scales()
        return self.found

    # --- one block --------------------------------------------------------------------------------------------------

    def _block(self, layer: int, keep: Callable[[str, Tensors], None]) -> int:
        job, config = self.job, self.config
        names = block_parameters(self.spec, layer)
        with self._clock("reading"):
            stored = {name: job.read(f"layers.{layer}.{name}") for name in names}
        tensors = {name: tensor.to(job.device, torch.float32) for name, tensor in stored.items()}
        moments, kv = self._collect(layer, tensors)
        formats = {name: config.scheme_of(f"layers.{layer}.{name}") for inputs in INPUTS.values() for name in inputs}
        with self._clock("rounding"):
            plain = plain_rounding(f"layers.{layer}.", tensors, formats, config, moments, job.stored)
        self._send(layer, tensors, plain, kv)
        with self._clock(config.rounding if config.rounding != "nearest" else "rounding"):
            done = quantize_linears(
                f"layers.{layer}.", tensors, moments if self.calibration else {}, formats, config, plain,
                self.spec, job.stored,
            )  # fmt: skip
        with self._clock("measuring"):
            self.found.rows += measure(f"layers.{layer}.", tensors, plain, done, moments)
        streams = [self.calibration, None if config.is_plain else self.after]
        if any(streams):
            with self._clock("forward"):
                block = round_block(build_block(self.spec, layer, done.tensors, job.device), done.quantized)
                for stream in filter(None, streams):
                    self.runner.run(block, stream, layer, _rounding(kv))
        parts: Tensors = {f"layers.{layer}.{name}": done.tensors[name].to(stored[name].dtype).cpu() for name in names}
        parts |= {f"layers.{layer}.{name}.weight": quantized for name, quantized in done.quantized.items()}
        with self._clock("writing"):
            keep(f"layer-{layer:04d}", parts)
        return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())

    def _collect(self, layer: int, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Moments], KVScales | None]:
        """Statistics of every linear's input, over calibration text, else over the first held-out tokens."""
        stream = self.calibration or self.after
        if stream is None:
            return {}, None
        heavy = self.calibration is not None and (self.config.rounding == "gptq" or self.config.low_rank > 0)
        moments = {
            first: Moments(
                tensors[f"{first}.weight"].shape[1], f"layers.{layer}.{first}", second=heavy, device=self.job.device
            )
            for first in INPUTS
        }
        seen = KVRange(1, self.spec.num_key_value_heads, self.job.device) if self.config.kv_scheme else None
        block = build_block(self.spec, layer, tensors, self.job.device)
        with self._clock("forward"):
            around = (lambda attend: _OneLayer(seen.watch(attend))) if seen else (lambda attend: attend)
            few = (
                None if self.calibration else 1
            )  # without a method to inform, a sample of inputs is all that is wanted
            self.runner.look(block, stream, layer, lambda first, x: moments[first].add(x), around, few)
        for moment in moments.values():
            moment.merge(self.job.reduce)
            moment.check()
        if seen is None or self.config.kv_scheme is None:
            return moments, None
        seen.merge(lambda tensor: self.job.reduce(tensor, "max"))
        kv = seen.scales(self.config.kv_scheme)
        self._kv.append((kv.keys[0].tolist(), kv.values[0].tolist()))
        return moments, kv

    def _send(
        self, layer: int, tensors: Mapping[str, Tensor], plain: Mapping[str, QuantizedWeight], kv: KVScales | None
    ) -> None:
        """Held-out text through the original block and through the plainly rounded one."""
        if self.reference is None or self.rounded is None:
            return
        with self._clock("evaluation"):
            block = build_block(self.spec, layer, tensors, self.job.device)
            self.runner.run(block, self.reference, layer)
            self.runner.run(round_block(block, plain), self.rounded, layer, _rounding(kv))

    # --- the two ends -----------------------------------------------------------------------------------------------

    def _embed(self) -> None:
        table = self.job.read("embed")
        streams = {"calibration": self.calibration, "reference": self.reference, "rounded": self.rounded}
        for name, stream in (streams | {"after": self.after}).items():
            if stream is not None and name in self._ids:
                for rows in stream.batches():
                    stream.write(0, rows, F.embedding(self._ids[name][rows].flatten(), table))
                stream.sync(0)

    def _head(self, keep: Callable[[str, Tensors], None]) -> None:
        """Norm and head: kept as they are, unless an override names lm_head; then the scores of what went through."""
        job, spec = self.job, self.spec
        norm, embed = job.read("norm.weight"), job.read("embed")
        parts: Tensors = {"embed": embed, "norm.weight": norm}
        head = embed if spec.tie_word_embeddings else job.read("lm_head.weight")
        quantized = None
        if not spec.tie_word_embeddings:
            quantized = self._quantize_head(head, norm)
            parts["lm_head.weight"] = head if quantized is None else quantized
        with self._clock("writing"):
            keep("ends", parts)
        with self._clock("evaluation"):
            self._score(norm.to(job.device, torch.float32), head.to(job.device, torch.float32), quantized)

    def _quantize_head(self, head: Tensor, norm: Tensor) -> QuantizedWeight | None:
        """By plain rounding: its inputs are measured by nothing after it."""
        scheme = self.config.scheme_of("lm_head")
        if scheme is None:
            return None
        moments = {}
        stream, layers = self.calibration or self.after, self.spec.num_hidden_layers
        if stream is not None:
            moments["lm_head"] = Moments(head.shape[1], "lm_head", device=self.job.device)
            for rows in stream.batches():
                moments["lm_head"].add(self._normed(stream.read(layers, rows), norm.to(self.job.device, torch.float32)))
            moments["lm_head"].merge(self.job.reduce)
        tensors = {"lm_head.weight": head.to(self.job.device, torch.float32)}
        plain = plain_rounding("", tensors, {"lm_head": scheme}, self.config, moments, self.job.stored)
        self.found.rows += measure("", tensors, plain, None, moments)
        return plain["lm_head"]

    @torch.inference_mode()
    def _score(self, norm_D: Tensor, head_VD: Tensor, quantized: QuantizedWeight | None) -> None:
        if self.reference is None or self.rounded is None or self.after is None:
            return
        text = self.job.text
        assert text is not None
        layers, same = self.spec.num_hidden_layers, self.after is self.rounded
        answer = functools.partial(F.linear, weight=head_VD) if quantized is None else RoundedLinear(quantized, None)
        rounded, after = Score(), Score()
        for chunk in range(self.reference.sequences):
            states = [s.read(layers, slice(chunk, chunk + 1)) for s in (self.reference, self.rounded, self.after)]
            for first in range(0, self.reference.length, _LOGIT_ROWS):
                rows = slice(first, min(first + _LOGIT_ROWS, self.reference.length))
                targets_T = text.targets_ST[chunk, rows]
                about = (targets_T, chunk, None if text.bytes_ST is None else text.bytes_ST[chunk, rows])
                hidden = [self._normed(state[rows], norm_D) for state in states]
                truth = F.linear(hidden[0], head_VD)
                rounded.compare(truth, answer(hidden[1]), *about)
                if not same:
                    after.compare(truth, answer(hidden[2]), *about)
            if chunk == 0:
                self.found.last_logits = answer(self._normed(states[2], norm_D)[-_LOGIT_ROWS:]).cpu()
        self.found.rounded, self.found.after = rounded, rounded if same else after

    def _normed(self, hidden_TD: Tensor, norm_D: Tensor) -> Tensor:
        return rms_norm(hidden_TD.to(self.job.device), norm_D, self.spec.rms_norm_eps)

    # --- what outlives a kill ---------------------------------------------------------------------------------------

    def _remember(self, layers: int) -> None:
        rows = [asdict(row) for row in self.found.rows]
        write_json(
            self.job.folder / STATE, {"layers": layers, "rows": rows, "kv": self._kv, "seconds": self.found.seconds}
        )

    def _continue(self) -> None:
        """Go on where the slowest rank stood; another may be one block ahead, whose inputs are still there."""
        file = self.job.folder / STATE
        nothing: dict[str, Any] = {"layers": 0, "rows": [], "kv": [], "seconds": {}}
        state = read_json(file) if file.exists() else nothing
        self.layer = -int(self.job.reduce(torch.tensor([-state["layers"]], device=self.job.device), "max"))
        self._kv = [tuple(pair) for pair in state["kv"][: self.layer]]
        rows = [Layer(**row) for row in state["rows"]]
        self.found.rows = [row for row in rows if int(row.name.split(".")[1]) < self.layer]
        self.found.seconds.update(state["seconds"])

    def _scales(self) -> KVScales | None:
        if not self._kv or self.config.kv_scheme is None:
            return None
        keys, values = (tuple(torch.tensor(pair[side]) for pair in self._kv) for side in (0, 1))
        return KVScales(self.config.kv_scheme, keys, values)

    def _open(self, name: str) -> Stream | None:
        if name not in self._ids:
            return None
        sequences, length = self._ids[name].shape
        return self._closing.enter_context(Stream(self.job.folder, name, sequences, length, self.spec.hidden_size))

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.found.seconds[phase] += time.perf_counter() - started


_LOGIT_ROWS = 256  # tokens whose logits are held at once: 128 MiB each for a vocabulary of 128,000


def _ids(text: Sequences, config: QuantConfig) -> dict[str, Tensor]:
    """Token ids of every stream that is needed."""
    found = {"calibration": text.calibration_ST} if len(text.calibration_ST) else {}
    if len(text.evaluation_ST):
        names = ("reference", "rounded") if config.is_plain else ("reference", "rounded", "after")
        found |= dict.fromkeys(names, text.evaluation_ST)
    return found


def _rounding(kv: KVScales | None) -> Callable[[Attend], Attend]:
    """What is around a block's attention: nothing, or a cache in eight bits."""
    if kv is None:
        return lambda attend: attend
    return lambda attend: _OneLayer(RoundedKV(attend, kv))
