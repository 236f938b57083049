"""Floor 4: the training step, its optimizer, its metrics and its loop.

`puna.train(recipe)` is the library's name for a run and `puna.train` is this room: so the room can be called.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(
        self, recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run a recipe; see `puna.train.loop.train`."""
        from puna.train.loop import train

        return train(recipe, overrides)


sys.modules[__name__].__class__ = _Room
