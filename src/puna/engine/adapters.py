"""LoRA adapters in one batch: the model's linear layers add to each row what that row's adapter says.

    adapters = Adapters(model)
    adapters.load("poet", "path/to/peft/folder")
    adapters.rows([adapters.slot("poet"), 0, 0])    # for the coming forward: row 0 with the adapter, the others without
    model(tokens_T, positions_T, attend)

The base's products are computed for all rows in one call, as without adapters; the low-rank ones come on top
(`ops.grouped`). So a row without an adapter gets the very bits of the plain model.

A layer becomes an adapted one by changing its class, and plain again when no adapter is left that touches it: its
parameters, their names and the modules around it stay what they are, so saving and counting see the plain model.
Shapes: T rows, K inputs, N outputs, R rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from puna.base.console import PunaError
from puna.model.linear import Linear, QuantizedLinear, apply_all
from puna.model.transformer import Transformer
from puna.ops.grouped import LowRankStack, RowGroups, add_low_rank
from puna.weights.adapter import Adapter, read_adapter


@dataclass
class _Coming:
    """What all adapted layers of a model share: the rows of the coming forward, None if no row has an adapter."""

    groups: RowGroups | None = None


class _Adapted(nn.Module):
    """Beside a kind of linear layer: its output, plus the low-rank products of the rows that have an adapter.

    stack is None for the first of layers that are computed together (q of q, k, v) when only the others are adapted.
    """

    coming: _Coming
    stack: LowRankStack | None

    def forward(self, x_TK: Tensor) -> Tensor:
        y_TN: Tensor = super().forward(x_TK)
        if self.coming.groups is not None:
            add_low_rank([y_TN], x_TK, [self.stack], self.coming.groups)
        return y_TN

    def forward_all(self, layers: tuple[Any, ...], x_TK: Tensor) -> list[Tensor]:
        """The outputs of several layers, of which this is the first, for one input: the base's in one call."""
        outputs = apply_all(tuple(_as_plain(layer) for layer in layers), x_TK)
        if self.coming.groups is not None:
            add_low_rank(outputs, x_TK, [getattr(layer, "stack", None) for layer in layers], self.coming.groups)
        return outputs


class AdaptedLinear(_Adapted, Linear):
    """`Linear` with adapters."""


class AdaptedQuantized(_Adapted, QuantizedLinear):
    """`QuantizedLinear` with adapters. They see the inputs as they are, not as the quantized product rounds them."""


_ADAPTED: dict[type[nn.Module], type[_Adapted]] = {Linear: AdaptedLinear, QuantizedLinear: AdaptedQuantized}
_PLAIN = {adapted: plain for plain, adapted in _ADAPTED.items()}

# The first of the layers that the model computes together decides how (`model.linear.apply_all`).
_FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def _as_plain(layer: Any) -> Any:
    """The same layer, state and all, seen as the kind it was: what is computed together is decided by kinds."""
    kind = _PLAIN.get(type(layer))
    if kind is None:
        return layer
    plain = kind.__new__(kind)
    plain.__dict__ = layer.__dict__
    return plain


class Adapters:
    """The adapters of one model, by name; one such object per model. At most `capacity` are loaded at a time.

    Not for several threads at once: load and unload between two forwards. `read_adapter` may run anywhere.
    """

    def __init__(self, model: Transformer, capacity: int = 64):
        self.model, self.capacity = model, capacity
        self._coming = _Coming()
        self._slots: dict[str, int] = {}
        self._digests: dict[str, bytes] = {}
        self._stacks: dict[str, LowRankStack] = {}  # by layer

    @property
    def names(self) -> tuple[str, ...]:
        """Of the loaded adapters, in the order they came."""
        return tuple(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters as they are held."""
        return sum(stack.nbytes for stack in self._stacks.values())

    def load(self, name: str, path: str | Path) -> None:
        """Read a PEFT folder and add it. Errors: `PunaError` as `read_adapter` and `add`."""
        self._check_room(name)
        self.add(name, read_adapter(path, self.model.spec))

    def add(self, name: str, adapter: Adapter) -> None:
        """Make an adapter known as `name`; whole, or not at all.

        Errors: `PunaError` if the name is taken, `capacity` is reached, or the model's layers do not fit.
        """
        self._check_room(name)
        layers = _fitting(self.model, adapter)
        slot = next(n for n in range(1, self.capacity + 1) if n not in self._slots.values())
        try:
            for layer, delta in adapter.deltas.items():
                if layer not in self._stacks:
                    self._stacks[layer] = _new_stack(layers[layer])
                self._stacks[layer].put(slot, delta.down_RK, delta.up_NR, delta.scaling)
            for stack in self._stacks.values():
                stack.reserve(max(slot, *self._slots.values(), 0) + 1)
        except RuntimeError:  # out of memory: nothing of it stays
            self._drop(slot)
            raise
        self._slots[name], self._digests[name] = slot, adapter.digest
        self.attach()

    def unload(self, name: str) -> None:
        """Forget an adapter; its slot is free again, so no request may be using it. Errors: `PunaError` if unknown."""
        self._drop(self.slot(name))
        del self._slots[name], self._digests[name]
        self.rows(None)
        self.attach()

    def digest(self, name: str | None) -> bytes:
        """Of an adapter's numbers, for the keys of a prefix cache; b"" for None. Errors: `PunaError` if unknown."""
        return b"" if self.slot(name) == 0 else self._digests[name or ""]

    def slot(self, name: str | None) -> int:
        """The number that stands for an adapter in `rows`; 0 for None. Errors: `PunaError` if unknown."""
        if name is None:
            return 0
        if name not in self._slots:
            near = difflib.get_close_matches(name, self._slots, 1)
            raise PunaError(
                f"no adapter is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                f"loaded: {', '.join(self._slots) or 'none'}",
            )
        return self._slots[name]

    def rows(self, slots_T: Sequence[int] | np.ndarray | Tensor | None) -> None:
        """Which adapter each row of the coming forwards uses, by `slot`; None: no row has one, at no cost."""
        if slots_T is None:
            self._coming.groups = None
            return
        numbers = slots_T.cpu().numpy() if isinstance(slots_T, Tensor) else slots_T
        groups = RowGroups.of(numbers, self.model.embed.device)
        assert groups is None or groups.slots <= {*self._slots.values()}, f"slots {groups.slots} of {self._slots}"
        self._coming.groups = groups

    def attach(self) -> None:
        """Bring the model's layers in line with what is loaded: adapted where an adapter says so, plain elsewhere."""
        wanted: dict[str, LowRankStack | None] = {_first(layer): None for layer in self._stacks}
        wanted |= self._stacks
        for name, layer in self.model.named_modules():
            if name in wanted:
                layer.__class__ = _ADAPTED.get(type(layer), type(layer))
                layer.coming, layer.stack = self._coming, wanted[name]
            elif type(layer) in _PLAIN:
                del layer.coming, layer.stack
                layer.__class__ = _PLAIN[type(layer)]

    def _drop(self, slot: int) -> None:
        for stack in self._stacks.values():
            stack.drop(slot)
        self._stacks = {layer: stack for layer, stack in self._stacks.items() if stack.held}

    def _check_room(self, name: str) -> None:
        if name in self._slots:
            raise PunaError(f"an adapter called {name!r} is loaded", "unload it first, or choose another name")
        if len(self._slots) >= self.capacity:
            raise PunaError(
                f"{len(self._slots)} adapters are loaded, and no more than {self.capacity} may be",
                f"unload one of {', '.join(self._slots)}, or allow more",
            )


def _fitting(model: Transformer, adapter: Adapter) -> dict[str, nn.Module]:
    """The model's layers that the adapter is for, all of a kind and shape that take it."""
    modules = dict(model.named_modules())
    found = {}
    for name, delta in adapter.deltas.items():
        kinds = [type(modules[layer]) if layer in modules else None for layer in (name, _first(name))]
        if not {*kinds} <= {*_ADAPTED, *_PLAIN}:
            kind = next(kind for kind in kinds if kind not in {*_ADAPTED, *_PLAIN})
            raise PunaError(
                f"{name} of the model takes no adapter: it is {'missing' if kind is None else kind.__name__}",
                "merge the adapter into its model, and load the result",
            )
        shape = (delta.up_NR.shape[0], delta.down_RK.shape[1])
        if shape != _shape(modules[name]):
            raise PunaError(
                f"the adapter's {name} is {list(shape)}, the model's {list(_shape(modules[name]))}",
                "load the model that the adapter was trained on",
            )
        found[name] = modules[name]
    return found


def _first(layer: str) -> str:
    """The layer that decides for this one how it is computed; itself if it is computed alone."""
    block, _, leaf = layer.rpartition(".")
    return f"{block}.{_FIRST.get(leaf, leaf)}"


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(N, K)."""
    assert isinstance(layer, Linear | QuantizedLinear)
    return layer.product.shape if isinstance(layer, QuantizedLinear) else (layer.weight.shape[0], layer.weight.shape[1])


def _new_stack(layer: nn.Module) -> LowRankStack:
    """Room for adapters of a layer, in the dtype of its activations and where it is."""
    assert isinstance(layer, Linear | QuantizedLinear)
    numbers = layer.product if isinstance(layer, QuantizedLinear) else layer.weight
    return LowRankStack(*_shape(layer), numbers.dtype, numbers.device)
