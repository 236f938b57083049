"""Logits to one token. Shapes: V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from puna.engine.request import SamplingParams


class Sampler:
    """Draws the tokens of one answer; remembers what was said for the penalties, and its own random numbers.

    The draws depend on (seed, index) only, so the same seed gives the same text wherever and whenever it runs.
    """

    def __init__(self, params: SamplingParams, prompt_ids: list[int], index: int, device: torch.device):
        self.params = params
        self._random = torch.Generator(device)
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((params.seed * 1_000_003 + index) % 2**63)
        self._prompt = torch.tensor(sorted(set(prompt_ids)), device=device)
        self._counts: dict[int, int] = {}

    def draw(self, logits_V: Tensor) -> int:
        """Choose a token; `logits_V` is fp32 and not changed."""
        logits_V = self._penalize(logits_V)
        token = int(logits_V.argmax()) if self.params.temperature == 0 else self._sample(logits_V)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _sample(self, logits_V: Tensor) -> int:
        probabilities, ids = distribution(logits_V, self.params)
        choice = int(torch.multinomial(probabilities, 1, generator=self._random))
        return choice if ids is None else int(ids[choice])

    def _penalize(self, logits_V: Tensor) -> Tensor:
        params = self.params
        if params.repetition_penalty != 1:
            said = torch.tensor(list(self._counts), dtype=torch.int64, device=logits_V.device)
            seen = torch.cat((self._prompt, said)).unique()
            value = logits_V[seen]
            value = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
            logits_V = logits_V.index_put((seen,), value)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(self._counts), device=logits_V.device)
            times = torch.tensor(list(self._counts.values()), device=logits_V.device, dtype=logits_V.dtype)
            penalty = params.presence_penalty + params.frequency_penalty * times
            logits_V = logits_V.index_put((ids,), -penalty, accumulate=True)
        return logits_V


def distribution(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """What is drawn from: probabilities, and the token ids they belong to (None: all, in order).

    Order as in transformers and vLLM: temperature, top-k, top-p, min-p. Top-p keeps the smallest set of likeliest
    tokens whose mass reaches p (Holtzman et al. 2020, arXiv:1904.09751); min-p those with at least p times the
    likeliest one's probability (Nguyen et al. 2024, arXiv:2407.01082).
    """
    scaled_V = logits_V / params.temperature
    if not params.top_k and params.top_p >= 1:
        probabilities = scaled_V.softmax(-1)
        return _min_p(probabilities, params.min_p), None
    kept = min(params.top_k or len(scaled_V), len(scaled_V))
    values, ids = scaled_V.topk(kept)  # likeliest first
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities * (before < params.top_p)
    return _min_p(probabilities, params.min_p), ids


def _min_p(probabilities: Tensor, share: float) -> Tensor:
    if share > 0:
        probabilities = probabilities * (probabilities >= share * probabilities.max())
    return probabilities / probabilities.sum()
