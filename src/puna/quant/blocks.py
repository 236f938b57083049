"""One block of the model at a time: built from its tensors, run over a stream, watched, and rounded.

Shapes: T tokens of one sequence, S sequences, D model width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.attention import Attend
from puna.model.linear import Linear
from puna.model.rope import attention_scale, inverse_frequencies
from puna.model.spec import Spec
from puna.model.transformer import Block
from puna.ops.attention import PackedCausal
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.linear import linear
from puna.ops.rope import cos_sin
from puna.quant.streams import Stream

# Linears that share an input, by the first of them; in the order in which a token meets them.
INPUTS = {
    "attn.q_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.o_proj": ("attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
LINEARS = tuple(name for names in INPUTS.values() for name in names)
_LAST = "mlp.down_proj"
Watch = Callable[[str, Tensor], None]  # (the first linear that reads it, x (tokens, inputs))


def build_block(spec: Spec, layer: int, tensors: Mapping[str, Tensor], device: torch.device) -> Block:
    """The model's own block in fp32 with copies of these tensors, named as within the block (`attn.q_proj.weight`)."""
    with torch.device("meta"):
        block = Block(spec, layer)
    block = block.to_empty(device=device).requires_grad_(False).eval()
    parameters = dict(block.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    return block


def block_parameters(spec: Spec, layer: int) -> list[str]:
    """Names of a block's parameters, within the block."""
    with torch.device("meta"):
        return [name for name, _ in Block(spec, layer).named_parameters()]


class RoundedLinear(nn.Module):
    """`QuantizedWeight.product` with the weight dequantized once: for many tokens through one block."""

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None):
        super().__init__()
        self.quantized, self.bias = quantized, bias
        merged = quantized.activations is None  # the low-rank part sees the inputs as they are
        self.weight_ND = quantized.dequantize(torch.float32) if merged else quantized.packed.dequantize(torch.float32)
        self.low_rank = None if merged or quantized.up_NR is None else (quantized.up_NR.float(), quantized.down_RD)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TN = linear(self.quantized.round_inputs(x_TD), self.weight_ND, self.bias)
        if self.low_rank is None:
            return y_TN
        up_NR, down_RD = self.low_rank
        assert down_RD is not None
        return y_TN + F.linear(F.linear(x_TD, down_RD.float()), up_NR)

    def forward_all(self, layers: tuple[nn.Module, ...], x_TD: Tensor) -> list[Tensor]:
        """Every layer's output for one input."""
        return [layer(x_TD) for layer in layers]


def round_block(block: Block, quantized: Mapping[str, QuantizedWeight]) -> Block:
    """Put quantized layers (by their names within the block) in place of plain ones; returns the same block."""
    for name, weight in quantized.items():
        parent, _, leaf = name.rpartition(".")
        plain = block.get_submodule(name)
        bias = plain.bias if isinstance(plain, Linear) else None
        setattr(block.get_submodule(parent), leaf, RoundedLinear(weight, bias))
    return block


class _Enough(Exception):
    """All inputs of a block are seen: what it would compute from here on nobody looks at."""


class _Watched(Linear):
    """A plain linear layer that shows its input before it computes."""

    show: Callable[[Tensor], None]

    def forward(self, x_TK: Tensor) -> Tensor:
        self.show(x_TK)
        return super().forward(x_TK)

    def forward_all(self, layers: tuple[Linear, ...], x_TK: Tensor) -> list[Tensor]:
        return [layer(x_TK) for layer in layers]  # one of them is this one, which shows x


@contextmanager
def watched(block: Block, watch: Watch) -> Iterator[None]:
    """Within, `watch` is called with every distinct input of the block's linear layers; the block's output is lost."""

    def show(name: str, x: Tensor) -> None:
        watch(name, x)
        if name == _LAST:
            raise _Enough

    firsts = [block.get_submodule(name) for name in INPUTS]
    for name, module in zip(INPUTS, firsts, strict=True):
        assert type(module) is Linear
        module.__class__ = _Watched
        module.show = functools.partial(show, name)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in firsts:
            del module.show
            module.__class__ = Linear


def _as_it_is(attend: Attend) -> Attend:
    return attend


class Runner:
    """Runs blocks over streams: rope tables and attention for S sequences of T tokens, made once per size."""

    def __init__(self, spec: Spec, device: torch.device):
        self.spec, self.device = spec, device
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor, PackedCausal]] = {}

    @torch.inference_mode()
    def run(
        self,
        block: Block,
        stream: Stream,
        layer: int,
        around: Callable[[Attend], Attend] = _as_it_is,
    ) -> None:
        """Send a stream through `block`; `around` wraps the attention (rounded keys, a calibration that looks on)."""
        for rows in stream.batches():
            x_TD = stream.read(layer, rows).to(self.device)
            cos, sin, attend = self._tables_for(rows.stop - rows.start, stream.length)
            stream.write(layer + 1, rows, block(x_TD, cos, sin, around(attend)))
        stream.sync(layer + 1)

    @torch.inference_mode()
    def look(
        self,
        block: Block,
        stream: Stream,
        layer: int,
        watch: Watch,
        around: Callable[[Attend], Attend] = _as_it_is,
        batches: int | None = None,
    ) -> None:
        """Send a stream, or its first `batches`, as far into `block` as its last input; nothing is written."""
        with watched(block, watch):
            for rows in itertools.islice(stream.batches(), batches):
                cos, sin, attend = self._tables_for(rows.stop - rows.start, stream.length)
                with suppress(_Enough):
                    block(stream.read(layer, rows).to(self.device), cos, sin, around(attend))

    def _tables_for(self, sequences: int, length: int) -> tuple[Tensor, Tensor, PackedCausal]:
        key = sequences, length
        if key not in self._tables:
            inv_freq = inverse_frequencies(self.spec.rope, self.spec.head_dim, length).to(self.device)
            positions = torch.arange(length, device=self.device).repeat(sequences)
            cos, sin = cos_sin(positions, inv_freq, attention_scale(self.spec.rope), torch.float32)
            self._tables[key] = cos, sin, PackedCausal.of([length] * sequences)
        return self._tables[key]
