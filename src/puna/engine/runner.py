"""A batch through the model: logits of the rows to draw from.

Shapes: T tokens of the step, R rows whose logits are wanted, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from puna.engine.adapters import Adapters
from puna.engine.batch import Batch
from puna.engine.compiled import Compiled
from puna.engine.native_step import NativeStep, why_not
from puna.model.attention import Attend
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal, RoundedKV
from puna.ops.paged import PagedCausal, Pages


class Runner:
    """The one `Transformer` over pages of keys and values; the native step in its place where it serves and is allowed.

    max_len: the longest sequence, which 'dynamic' rope is turned for. `path` says for a card who computes.
    """

    def __init__(
        self,
        model: Transformer,
        pages: Pages,
        max_len: int,
        adapters: Adapters | None = None,
        native: bool = True,
        compile: bool = False,
    ):
        self.model, self.pages, self.adapters = model, pages, adapters
        self.device, self._max_len = model.embed.device, max_len
        reason = why_not(model, pages) if native else "switched off"
        self._step = NativeStep(model, pages) if reason is None else None
        self.path = "native step" if reason is None else f"layer by layer (no native step: {reason})"
        self._forward: Callable[..., Tensor] = model
        if compile:
            self._forward = compiled = Compiled(model)
            compiled.warm_up()  # at the start, so that no request waits for it
        self._hidden_TD = torch.empty(0)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Write the batch's keys and values; fp32 logits (R, V) of its wanted rows."""
        if self._step is not None and len(batch.tokens_T) <= self._step.max_rows and batch.adapters_T is None:
            tokens_T, positions_T = torch.from_numpy(batch.tokens_T), torch.from_numpy(batch.positions_T)
            return self._step(tokens_T, positions_T, self._attend(batch), torch.from_numpy(batch.rows_R))
        self._compute(batch)
        return self._score(batch.rows_R)

    def hidden(self, batch: Batch) -> None:
        """As `run`, but all rows' hidden states are kept, for any `logits` of them: those of a prompt."""
        self._compute(batch)

    def logits(self, rows_R: np.ndarray) -> Tensor:
        """fp32 logits (R, V) of rows of what was computed last."""
        return self._score(rows_R)

    def documents(self, documents: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states (T, D) of documents side by side, as training computes them: no page is touched.

        Where the cache rounds keys and values, so does this.
        """
        return self._compute_documents(documents)

    @torch.inference_mode()
    def _compute(self, batch: Batch) -> None:
        if self.adapters is not None:
            self.adapters.rows(batch.adapters_T)
        tokens_T, positions_T = self._tensor(batch.tokens_T), self._tensor(batch.positions_T)
        self._hidden_TD = self._forward(tokens_T, positions_T, self._attend(batch))

    @torch.inference_mode()
    def _score(self, rows_R: np.ndarray) -> Tensor:
        return self.model.logits(self._hidden_TD[self._tensor(rows_R)]).float()

    @torch.inference_mode()
    def _compute_documents(self, documents: Sequence[Sequence[int]]) -> Tensor:
        if self.adapters is not None:
            self.adapters.rows(None)
        lengths = [len(ids) for ids in documents]
        attend: Attend = PackedCausal.of(lengths)
        if self.pages.scales is not None:
            attend = RoundedKV(attend, self.pages.scales)
        tokens_T = torch.tensor([token for ids in documents for token in ids], device=self.device)
        positions_T = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        self._hidden_TD = self._forward(tokens_T, positions_T, attend)
        return self._hidden_TD

    def _attend(self, batch: Batch) -> PagedCausal:
        return PagedCausal(
            self.pages,
            self._tensor(batch.slots_T),
            torch.from_numpy(batch.starts_B1),
            torch.from_numpy(batch.lengths_B),
            torch.from_numpy(batch.tables_BM),
            self._max_len,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)
