"""A whole decode step in one native call: the plan of a model's layers, built once, and the call that runs it.

The `Transformer` with `PagedCausal` is its twin: same pages, same numbers up to the order of an fp32 sum. A model in
bf16 is rounded where the Transformer rounds it.

Shapes: T rows (new tokens of one or many sequences), R rows whose logits are wanted, K head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.model.attention import Attention, RMSNorm
from puna.model.linear import Linear, QuantizedLinear
from puna.model.rope import attention_scale, inverse_frequencies
from puna.model.spec import Spec
from puna.model.transformer import MLP, Block, Transformer
from puna.ops.gguf_linear import BlockProduct
from puna.ops.native import step as native
from puna.ops.native.guard import PLAIN
from puna.ops.packed_kernels import Native
from puna.ops.packed_tiles import Tiles
from puna.ops.paged import PagedCausal, Pages
from puna.ops.rope import cos_sin

# Above, the Transformer's blocked products are as fast: they read a weight fewer times. benchmarks/native_step.py
MAX_ROWS = {torch.float32: 64, torch.bfloat16: 32}


class NativeStep:
    """All layers of a dense Transformer for up to `max_rows` rows, whatever sequences and positions they belong to.

    It holds addresses of the model's weights and of the pages: build it again after either moved (`.to`, merging).
    Every row's numbers are the same bit for bit whatever else is in the batch and however many threads there are.
    """

    def __init__(self, model: Transformer, pages: Pages) -> None:
        self.max_rows = MAX_ROWS[model.embed.dtype]
        self._rope = RopeTable(model.spec, model.embed.dtype)
        self._pages = pages
        self._step = native.Step(_step_model(model), _step_pages(pages))

    @staticmethod
    def of(model: Transformer, pages: Pages) -> NativeStep | None:
        """The step of a model over these pages; None where `why_not` says why not."""
        return NativeStep(model, pages) if why_not(model, pages) is None else None

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, attend: PagedCausal, rows_R: Tensor) -> Tensor:
        """Write the keys and values of all rows into the pages; return fp32 logits (R, V) of the rows wanted.

        tokens_T, positions_T, rows_R: int64 on the CPU; rows_R may be empty. attend: of the same `pages`.
        Errors: IndexError for a token beyond the vocabulary or a row beyond T.
        """
        assert attend.pages is self._pages
        if not len(tokens_T):
            return torch.empty(0, self._step.num_words)
        cos_PC, sin_PC = self._rope.up_to(int(positions_T.max()) + 1, attend.max_len)
        arrays = (attend.slots_T, attend.starts_B1, attend.lengths_B, attend.tables_BM)
        return self._step.run(tokens_T, positions_T, cos_PC, sin_PC, *arrays, rows_R)


class RopeTable:
    """cos and sin of every position so far, (P, K / 2) fp32: the numbers of `ops.rope.cos_sin`, grown by doubling."""

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        self._spec, self._dtype = spec, dtype
        self._key, self._cos, self._sin = 0, torch.empty(0, 0), torch.empty(0, 0)

    def up_to(self, positions: int, max_len: int) -> tuple[Tensor, Tensor]:
        """Tables of at least `positions` rows. 'dynamic' rope has other angles for every max_len."""
        key = max_len if self._spec.rope.rope_type == "dynamic" else 0
        if key != self._key or positions > len(self._cos):
            self._key = key
            rows, half = max(positions, 2 * len(self._cos), 256), self._spec.head_dim // 2
            inv_freq = inverse_frequencies(self._spec.rope, self._spec.head_dim, max_len)
            cos, sin = cos_sin(torch.arange(rows), inv_freq, attention_scale(self._spec.rope), self._dtype)
            self._cos = cos[:, 0, :half].float().contiguous()
            self._sin = sin[:, 0, half:].float().contiguous()  # the first half has its sign turned
        return self._cos, self._sin


# --- what is served -------------------------------------------------------------------------------------------------


def why_not(model: Transformer, pages: Pages) -> str | None:
    """Why this model has no native step, in a few words for a start card; None if it has one."""
    if not native.available():
        return f"native kernels: {native.reason()}"
    if type(model) is not Transformer or not model.embed.is_cpu or model.embed.dtype not in MAX_ROWS:
        return f"a {type(model).__name__} in {model.embed.dtype} on {model.embed.device}"
    if vars(model).keys() & {"look_up", "score"}:
        return "the model is cut over several ranks"
    if not pages.keys.is_cpu or pages.keys.dtype not in native.CACHE_DTYPES:
        return f"a cache of {pages.keys.dtype} on {pages.keys.device}"
    problems = (problem for module in model.modules() if (problem := _why_not_module(module, model.embed.dtype)))
    return next(problems, None)


def _why_not_module(module: nn.Module, dtype: torch.dtype) -> str | None:
    if type(module) not in (Transformer, nn.ModuleList, Block, Attention, MLP, RMSNorm, Linear, QuantizedLinear):
        return f"a {type(module).__name__} in the model"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return f"somebody watches a {type(module).__name__}"
    if isinstance(module, QuantizedLinear):
        return None if _quantized(module) else f"a product by {module.kernel!r}"
    for parameter in module.parameters(recurse=False):
        if type(parameter) not in PLAIN or not parameter.is_contiguous() or parameter.dtype is not dtype:
            return f"a {type(parameter).__name__} in {parameter.dtype} in a {type(module).__name__} of a {dtype} model"
    return None


def _quantized(layer: QuantizedLinear) -> native.Weight | None:
    """What the step needs of the layer's kernel for few rows; None where it is not a native one."""
    product = layer.product
    if isinstance(product, BlockProduct):
        blocks = product.native
        return None if blocks is None else native.blocks(blocks)
    kernel = product.kernels[0]
    if product.goes_native and isinstance(kernel, Native):
        return native.packed(kernel.plain)
    if product.goes_native and isinstance(kernel, Tiles):
        return native.tiles(kernel.plain)
    return None


# --- the model as the native step's structs ---------------------------------------------------------------------------


def _weight(layer: Linear | QuantizedLinear) -> native.Weight:
    if isinstance(layer, Linear):
        return native.plain(layer.weight, layer.bias)
    weight = _quantized(layer)
    assert weight is not None
    return weight


def _layer(block: Block) -> native.LayerWeights:
    attn, mlp = block.attn, block.mlp
    linears = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    norms = (block.attn_norm, block.mlp_norm, attn.q_norm, attn.k_norm)
    weights = tuple(None if norm is None else norm.weight.detach().float() for norm in norms)
    return native.LayerWeights(weights, attn.window, tuple(_weight(layer) for layer in linears))


def _step_model(model: Transformer) -> native.StepModel:
    spec, head = model.spec, model.lm_head
    return native.StepModel(
        model.embed,
        [_layer(block) for block in model.layers],  # type: ignore[arg-type]
        model.norm.weight.detach().float(),
        native.plain(model.head_weight, None) if not isinstance(head, QuantizedLinear) else _weight(head),
        spec.num_attention_heads,
        spec.intermediate_size,
        spec.rms_norm_eps,
    )


def _step_pages(pages: Pages) -> native.StepPages:
    if pages.scales is None:
        return native.StepPages(pages.keys, pages.values)
    return native.StepPages(pages.keys, pages.values, pages.scales.keys, pages.scales.values)
