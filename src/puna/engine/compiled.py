"""The blocks of a model through torch.compile, for many rows at once; eager stays beside it, and steps in if it fails.

Compiled as one function for all layers: `attend` is left out (it writes pages, and reads lists that differ every
step), and the layer's number is a value, not a constant - as a constant every layer would be compiled again, and from
the ninth on dynamo gives up (its recompile_limit). What is compiled anew: one row, up to 8 rows, more rows (three sizes
in all, because `ops.linear` asks for them), another dtype.

It happens in the foreground, the first time a size comes: seconds to minutes. Not in a thread, since tracing patches
`nn.Module.__call__` for the whole process (torch.fx's Tracer), under the feet of answers that are being computed.
Results are kept in inductor's cache (TORCHINDUCTOR_CACHE_DIR), so that a second start is faster.

On a CPU it does not pay: the products are compiled to torch's, and ours are faster. 134M in fp32, one thread of a
shared EPYC, best of 6 in turns: 512 rows 3329 ms against 2353 eager, 32 rows 145 against 97, 1 row 36 against 33.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from puna.base.console import duration, say
from puna.model.attention import Attend
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal

# Rows that between them make all that will be compiled. Primes: a number of rows that is also a width of the model
# would be taken for it (dynamo's duck sizing), and the graph be good for that number only.
SIZES = (97, 1, 7)


class Compiled:
    """Called like its model: hidden states (T, D) of tokens, positions and `attend`. The model itself is not changed.

    It shares the model's parameters and layers. `failure`: why everything is eager now; empty while nothing failed.
    """

    def __init__(self, model: Transformer, backend: str | Callable[..., Any] = "inductor"):
        self._model, self.failure = model, ""
        self._twin = _with_layers(model, [_compiled(block, backend) for block in model.layers])

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Errors: those of the model itself. Whatever compiling raises is said once; the answer is computed eagerly."""
        if self.failure:
            return self._model(tokens_T, positions_T, attend)
        try:
            # Without this the number of a layer is a constant of its graph.
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
                hidden_TD: Tensor = self._twin(tokens_T, positions_T, _Apart(attend))
            return hidden_TD
        except Exception as error:  # what a compiler, a C++ compiler or a cache folder can raise has no list
            hidden_TD = self._model(tokens_T, positions_T, attend)  # raises as well, where the input is at fault
            self.failure = " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:2]])
            say(f"torch.compile failed, the model runs eagerly: {self.failure}")
            return hidden_TD

    @torch.inference_mode()
    def warm_up(self, sizes: Sequence[int] = SIZES) -> None:
        """Compile for these numbers of rows now, with a line before and after: then no request has to wait for it."""
        started, device = time.perf_counter(), self._model.embed.device
        slower = "; on a CPU it was slower than eager wherever it was measured" if device.type == "cpu" else ""
        say(f"torch.compile: compiling the blocks (a minute or more the first time{slower})")
        for rows in sizes:
            positions_T = torch.arange(rows, device=device)
            self(torch.zeros_like(positions_T), positions_T, PackedCausal.of([rows]))
        if not self.failure:
            say(f"torch.compile: ready after {duration(time.perf_counter() - started)}")


class _Apart:
    """An `attend` that dynamo does not look into."""

    def __init__(self, attend: Attend):
        self._attend = attend

    @property
    def max_len(self) -> int:
        return self._attend.max_len

    @torch.compiler.disable
    def __call__(self, *given: Any) -> Tensor:
        return self._attend(*given)


def _compiled(block: nn.Module, backend: str | Callable[..., Any]) -> nn.Module:
    """A copy that shares the block's parts: `compile` works in place, and the model may be somebody's in training."""
    twin = copy.copy(block)
    twin.compile(backend=backend, dynamic=True)
    return twin


def _with_layers(model: Transformer, layers: list[nn.Module]) -> Transformer:
    """A copy of the model that shares all but the list of its layers."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "layers": nn.ModuleList(layers)}
    return twin
