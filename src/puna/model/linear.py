"""The only Linear in the house, with a plain weight or a quantized one behind the same call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from puna.ops import linear as ops
from puna.ops.formats.gguf_layer import GgufWeight
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.gguf_linear import BlockProduct, choose, product_group
from puna.ops.packed_linear import Product


class Linear(nn.Module):
    """y = x W^T + b. Shapes: x (T, K), weight (N, K), bias (N,) or none; returns (T, N)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x_TK: Tensor) -> Tensor:
        return ops.linear(x_TK, self.weight, self.bias)

    def forward_all(self, layers: tuple[Any, ...], x_TK: Tensor) -> list[Tensor]:
        """The outputs of several layers, of which this is the first, for one input."""
        plain = [layer for layer in layers if type(layer) is Linear]
        if len(plain) == len(layers):
            return ops.linear_group(x_TK, [layer.weight for layer in plain], [layer.bias for layer in plain])
        return [layer(x_TK) for layer in layers]


class QuantizedLinear(nn.Module):
    """`Linear` with a quantized weight: the product is chosen when it is built, and again on another device or dtype.

    dtype: of the activations. A gradient reaches x through the dequantized weight; weight and bias are constants.
    `.to(dtype)` changes what activations are, never the quantized numbers. Its state is the weight's tensors under the
    names of `Packed` and `QuantizedWeight`, number for number whatever the kernels keep; of a `GgufWeight` its bytes.
    """

    def __init__(
        self, weight: QuantizedWeight | GgufWeight, bias_N: Tensor | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        data = weight.data if isinstance(weight, GgufWeight) else weight.packed.data
        self.product: Product | BlockProduct = choose(weight, dtype, data.device, bias_N)

    def forward(self, x_TK: Tensor) -> Tensor:
        return self.product(x_TK)

    def forward_all(self, layers: tuple[Any, ...], x_TK: Tensor) -> list[Tensor]:
        """The outputs of several layers, of which this is the first, for one input."""
        quantized = [layer.product for layer in layers if type(layer) is QuantizedLinear]
        if len(quantized) == len(layers):
            return product_group(quantized, x_TK)
        return [layer(x_TK) for layer in layers]

    @property
    def weight(self) -> QuantizedWeight | GgufWeight:
        """The quantized weight as it was given."""
        return self.product.weight

    @property
    def bias(self) -> Tensor | None:
        """(N,) or none."""
        return self.product.bias

    @property
    def kernel(self) -> str:
        """Who computes the product: `native, dequantize` for example."""
        return self.product.name

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.product.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Of the format, scales included."""
        return self.product.bits_per_weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain weight (N, K) that stands for this one."""
        return self.weight.dequantize(dtype)

    def rechoose(self, activations: str) -> None:
        """Have the product computed with activations `exact` or `int8`: see `packed_linear.choose`, and its errors."""
        here = self.product
        if activations != here.activations:
            self.product = choose(here.weight, here.dtype, here.device, here.bias, activations)

    def extra_repr(self) -> str:
        outputs, inputs = self.product.shape
        return f"{inputs}, {outputs}, {self.bits_per_weight:.2f} bits, kernel={self.kernel!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What `.to`, `.cuda`, `.bfloat16` call: a device moves everything, a dtype only says what activations are."""
        here = self.product
        probe = fn(torch.empty(0, dtype=here.dtype, device=here.device))
        if probe.device != here.device or probe.dtype != here.dtype:
            bias = None if here.bias is None else fn(here.bias)
            self.product = choose(here.weight, probe.dtype, probe.device, bias, here.activations)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination |= {prefix + name: tensor for name, tensor in _tensors(self.weight, self.bias).items()}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        mine = _tensors(self.weight, self.bias)
        missing_keys += [prefix + name for name in mine if prefix + name not in state_dict]
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k.removeprefix(prefix) not in mine]
        new = {name: state_dict.get(prefix + name, old) for name, old in mine.items()}
        wrong = [n for n, old in mine.items() if (new[n].shape, new[n].dtype) != (old.shape, old.dtype)]
        error_msgs += [
            f"{prefix}{n}: {[*new[n].shape]} {new[n].dtype}, not {[*mine[n].shape]} {mine[n].dtype}" for n in wrong
        ]
        if not wrong:
            bias = new.pop("bias", None)
            here = self.product
            self.product = choose(_with_tensors(here.weight, new), here.dtype, here.device, bias, here.activations)


_OF_PACKED = ("data", "scales", "zeros", "group_of_D")
_OF_WEIGHT = ("input_scale", "up_NR", "down_RD")


def _tensors(weight: QuantizedWeight | GgufWeight, bias_N: Tensor | None) -> dict[str, Tensor]:
    """All tensors of a layer by name."""
    if isinstance(weight, GgufWeight):
        return {"data": weight.data} | ({} if bias_N is None else {"bias": bias_N})
    found = {name: getattr(weight.packed, name) for name in _OF_PACKED}
    found |= {name: getattr(weight, name) for name in _OF_WEIGHT}
    return {name: tensor for name, tensor in (found | {"bias": bias_N}).items() if tensor is not None}


def _with_tensors(weight: QuantizedWeight | GgufWeight, tensors: dict[str, Tensor]) -> QuantizedWeight | GgufWeight:
    if isinstance(weight, GgufWeight):
        return dataclasses.replace(weight, data=tensors["data"])
    of_packed: dict[str, Any] = {name: tensors[name] for name in _OF_PACKED if name in tensors}
    of_weight: dict[str, Any] = {name: tensors[name] for name in _OF_WEIGHT if name in tensors}
    return dataclasses.replace(weight, packed=dataclasses.replace(weight.packed, **of_packed), **of_weight)


def apply_all(layers: tuple[Linear | QuantizedLinear, ...], x_TK: Tensor) -> list[Tensor]:
    """Every layer's output for one input, the way the first layer's kind does it: all of one kind in one call."""
    return layers[0].forward_all(layers, x_TK)


def use_activations(model: nn.Module, activations: str) -> None:
    """Have all quantized layers of `model` compute with activations `exact` or `int8`; errors as in `choose`."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.rechoose(activations)
