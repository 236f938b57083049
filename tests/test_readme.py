"""The README is run: its commands and its five lines, in a folder where the quickstart has been."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from puna.serve import quickstart

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, corpus) -> Path:
    """What `make quickstart` leaves, made in seconds from a small text."""
    folder = tmp_path_factory.mktemp("readme")
    before = quickstart.VOCAB
    quickstart.VOCAB = 320
    try:
        quickstart.run_quickstart(str(folder / "quickstart"), 0.02, [str(corpus)])
    finally:
        quickstart.VOCAB = before
    return folder


def puna_commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.startswith((".venv/bin/", "echo"))]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", "\n".join(blocks("bash")), re.M)
    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("command", puna_commands())
def test_commands_of_the_readme(command: str, workplace: Path) -> None:
    command = command.replace(".venv/bin/puna", f"{shlex.quote(sys.executable)} -m puna")
    command = command.replace(".venv/bin/torchrun", f"{shlex.quote(str(Path(sys.executable).parent))}/torchrun")
    if " puna train " in command and "torchrun" not in command:
        command += " --train.steps 12"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=workplace, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).strip()


def test_five_lines_of_python(workplace: Path) -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line]) == 5
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
