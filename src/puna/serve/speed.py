"""How fast a model answers on this machine, beside what its memory allows: decoding reads every weight per token."""

from __future__ import annotations

import time
from functools import lru_cache
from statistics import median

import torch
from torch import nn

from puna.engine.llm import LLM
from puna.engine.request import SamplingParams
from puna.model.linear import Linear, QuantizedLinear
from puna.quant.report import Speed

_PROBE = 64 << 20  # numbers of fp32: 256 MiB, several times what caches hold
_ROUNDS, _TOKENS = 3, 24


@lru_cache(maxsize=1)
def memory_bandwidth() -> float:
    """Bytes per second that torch's threads read together: the best of a few passes over 256 MiB."""
    numbers = torch.ones(_PROBE)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - started)
    return 4 * _PROBE / best


def compare_speed(paths: list[str], dtype: str = "float32", device: str = "cpu") -> tuple[list[Speed], dict[str, str]]:
    """Decoding speed of several models, taking turns: the median round of each; and the last one's kernels by layer."""
    models = [LLM(path, dtype, device) for path in paths]
    prompt = [1 % models[0].spec.vocab_size] * 8
    params = SamplingParams(temperature=0, max_tokens=_TOKENS, ignore_eos=True)
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(_ROUNDS + 1):
        for model, times in zip(models, seconds, strict=True):
            started = time.perf_counter()
            for _ in model.stream(prompt, params):
                pass
            if turn:  # the first round warms caches
                times.append(time.perf_counter() - started)
    found = []
    for model, times in zip(models, seconds, strict=True):
        rate, size = _TOKENS / median(times), read_per_token(model.model)
        found.append(Speed(rate, size, memory_bandwidth()))
    modules = models[-1].model.named_modules()
    return found, {name: module.kernel for name, module in modules if isinstance(module, QuantizedLinear)}


def read_per_token(model: nn.Module) -> int:
    """Bytes of weights that one token is multiplied by: every linear layer, and the head where it is the embedding."""
    total = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.nbytes
        elif isinstance(module, Linear):
            total += module.weight.nbytes
    embed = getattr(model, "embed", None)
    if getattr(model, "lm_head", None) is None and isinstance(embed, torch.Tensor):
        total += embed.nbytes
    return total
