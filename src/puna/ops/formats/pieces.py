"""Work on a large tensor in pieces, each small enough for one core and its cache, several side by side.

torch splits every operation over all cores and waits for the last of them before the next. A chain of twenty cheap
operations waits twenty times, on a busy machine for milliseconds each (Q4_1 was seen at 3 MB/s instead of 1300). Pieces
below torch's own grain are not split; a thread per core then works through them without waiting, and memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from puna.ops.native.guard import PLAIN, is_watched

PIECE = 30 << 10  # numbers; torch splits from 32768 on
_DEVICE_PIECE = 1 << 24  # on a GPU: few launches, and still bounded


def for_each_piece(tensor: Tensor, work: Callable[[slice], None], size: int = PIECE) -> None:
    """Call work(rows) for consecutive ranges of rows of `tensor` (rows, ...) of about `size` numbers; without gradient.

    `work` writes its rows of a result and touches nothing else, so ranges may run at the same time and in any order.
    """
    rows = tensor.shape[0]
    width = max(1, tensor.numel() // max(1, rows))
    step = max(1, (size if tensor.is_cpu else _DEVICE_PIECE) // width)
    if not tensor.is_cpu or rows <= step or not _may_use_threads(tensor):
        _run(work, rows, step, range(0, rows, step))
        return
    starts = range(0, rows, step)
    threads = min(torch.get_num_threads(), len(starts))
    inference = torch.is_inference_mode_enabled()  # a property of the thread

    def share(first: int) -> None:
        with torch.inference_mode(inference):
            _run(work, rows, step, starts[first::threads])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


def _run(work: Callable[[slice], None], rows: int, step: int, starts: range) -> None:
    with torch.no_grad():
        for start in starts:
            work(slice(start, min(rows, start + step)))


def _may_use_threads(tensor: Tensor) -> bool:
    """Not for tracers, fake tensors and the like: what they know belongs to the calling thread."""
    return not torch.compiler.is_compiling() and type(tensor) in PLAIN and not is_watched()
