"""What keeps the native kernels off: tensors that are not ordinary, and anyone who must see torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)  # the exact types: FakeTensor, DTensor and other subclasses are kept out


def is_watched() -> bool:
    """Autocast, jit tracing, torch.func transforms, forward-mode derivatives, or a dispatch or function mode is on."""
    return (
        torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )
