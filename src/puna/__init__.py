"""puna: Llama-family language models from raw text to served tokens.

`import puna` is instant: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "PunaError": "puna.base.console",
    "Spec": "puna.model.spec",
    "Tokenizer": "puna.text.tokenizer",
    "Chat": "puna.text.chat",
    "load_model": "puna.weights.folder",
    "save_model": "puna.weights.folder",
    "SamplingParams": "puna.engine.request",
    "BeamParams": "puna.engine.beam",
    "LLM": "puna.engine.llm",
    "QuantConfig": "puna.quant.config",
    "quantize": "puna.serve.quantize",
}
__all__ = [*_HOME, "__version__", "train"]

if TYPE_CHECKING:
    from puna.base.console import PunaError
    from puna.engine.beam import BeamParams
    from puna.engine.llm import LLM
    from puna.engine.request import SamplingParams
    from puna.model.spec import Spec
    from puna.quant.config import QuantConfig
    from puna.serve.quantize import quantize
    from puna.text.chat import Chat
    from puna.text.tokenizer import Tokenizer
    from puna.train.loop import train
    from puna.weights.folder import load_model, save_model


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("puna.train")  # a room that can be called
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'puna' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
