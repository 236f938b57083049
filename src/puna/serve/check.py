"""`puna info --verify`: is every file of a save what it was when the save was sealed?"""

from __future__ import annotations

from typing import Any

from puna.base import files
from puna.base.console import PunaError
from puna.data.shards import FORMAT
from puna.weights.fetch import follow_latest
from puna.weights.manifest import MANIFEST, read_manifest, verify


def check_save(model: str) -> dict[str, Any]:
    """Compare a save's files with its manifest: {"model", "verified": True, "files": how many}.

    Raises PunaError for a folder without a manifest, and with the names of files that are missing or differ.
    """
    if files.is_remote(model):
        model = follow_latest(model)
    manifest = files.join(model, MANIFEST)
    if files.stat(manifest) is None:
        raise PunaError(
            f"{model} holds no {MANIFEST}: there is nothing to verify it against",
            "give a step folder of a run, such as RUN/latest; presets and other folders have no manifest",
        )
    if FORMAT.encode() in files.read_file(manifest)[:200]:
        raise PunaError(f"{model} holds token shards, not a model", f"puna shards verify {model}")
    damaged = verify(model)
    if damaged:
        shown = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        raise PunaError(
            f"{model} is damaged: {len(damaged)} of its files are missing or not as saved ({shown})",
            "resume from the save before it with --checkpoint.resume RUN/step-NNNNNN, or copy it again",
        )
    return {"model": model, "verified": True, "files": len(read_manifest(model))}
