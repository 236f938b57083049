"""How every verb ends: what it printed as figures, once more for machines."""

from __future__ import annotations

import sys
from typing import Any

from puna.base.console import emit_json


def answer(payload: dict[str, Any], json: bool) -> None:
    """The verb's figures as one JSON object on the last line of stdout, if asked for."""
    sys.stdout.flush()
    if json:
        emit_json(payload)
