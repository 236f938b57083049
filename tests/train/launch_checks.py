"""torchrun without its waiting time: the same program, but its ranks are forked from a process that has imported torch.

`Job` is one torchrun (or one of several agents) in a session of its own, with its output in files. Its agent is a child of
multiprocessing's fork server; torchrun's own code runs in it, and only "start a Python and import torch" became "fork".
Real launches, by the words a user types, are `real_torchrun`'s.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

QUIET = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
Quirk = Callable[[int], None]  # what goes otherwise on a rank, called in it before puna starts

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the fork server reads it once, when it imports torch
_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["puna.train.loop", "puna.cli.front", "torch.distributed.run", "matplotlib.figure"])


class Job:
    """A torchrun with these options that runs `puna` with these words; `quirk` must be a function of a module."""

    def __init__(self, log: Path, options: list[str], words: list[str], quirk: Quirk | None = None, **env: str):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._out, self._err, self._pids = (log.with_suffix(end) for end in (".out", ".err", ".pids"))
        for file in (self._out, self._err, self._pids):
            file.write_text("")
        files = tuple(map(str, (self._out, self._err, self._pids)))
        self._process = _fork.Process(target=_agent, args=(options, words, quirk, {**QUIET, **env}, files))
        self._process.start()
        self.agent: int = self._process.pid  # type: ignore[assignment]

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def ranks(self) -> dict[int, int]:
        """Process of each rank of the newest start."""
        return {int(rank): int(pid) for rank, pid in map(str.split, self._pids.read_text().splitlines())}

    def starts(self, ranks: int) -> int:
        """How often torchrun has started all of so many ranks."""
        return len(self._pids.read_text().splitlines()) // ranks

    def processes(self) -> list[int]:
        """All that were ever started and still run."""
        ranks = [int(line.split()[1]) for line in self._pids.read_text().splitlines()]
        return [pid for pid in [*ranks, self.agent] if _runs(pid)]

    def wait(self, seconds: float) -> int | None:
        """Exit code of the agent once all are gone; None where some still run after so many seconds."""
        return self._process.exitcode if until(lambda: not self.processes(), seconds) and self._reaped() else None

    def until_step(self, step: int, run: Path, seconds: float = 120) -> None:
        """Return once this step's row is in the run's metrics."""
        arrived = until(lambda: max(losses(run), default=0) >= step or not self.processes(), seconds)
        assert arrived, f"no step {step} within {seconds:.0f} s:\n{self.err[-3000:]}"

    def end(self) -> None:
        """SIGKILL for all that is left."""
        for pid in self.processes():
            send(pid, signal.SIGKILL)
        self._process.join(10)

    def _reaped(self) -> bool:
        self._process.join(10)
        return True


def train_alone(log: Path, words: list[str]) -> int | None:
    """`puna train` without torchrun, forked as well; its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _fork.Process(target=_alone, args=(["puna", "train", *words], str(log.with_suffix(".err"))))
    process.start()
    process.join(100)
    process.kill()
    return process.exitcode


def send(pid: int, number: int) -> None:
    """A signal to a process that may just have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Look until it holds; False where it did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def losses(run: Path) -> dict[int, float]:
    """{step: loss} of a run's metrics, also while they are being written."""
    with suppress(FileNotFoundError):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]
        return {row["step"]: row["loss"] for row in rows}
    return {}


def real_torchrun(options: list[str], words: list[str], prefix: tuple[str, ...] = (), **env: str) -> subprocess.Popen:
    """The command a user types, in a session of its own; its ranks have one each."""
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, "-m", "puna", *words]
    return subprocess.Popen(command, env={**os.environ, **QUIET, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)  # fmt: skip


def finish(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; what is left after so many seconds is killed, with its ranks."""
    deadline, found = time.monotonic() + seconds, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            for pid in [*children(process.pid), process.pid] if process.poll() is None else []:
                send(pid, signal.SIGKILL)
    return found


def children(pid: int) -> list[int]:
    """Processes that this one has started."""
    with suppress(FileNotFoundError):
        return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return []


def free_ports() -> Iterator[int]:
    """Below the range from which the kernel takes ports of outgoing connections: nobody else will have it by then."""
    for port in range(20000 + os.getpid() * 37 % 12000, 32768):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                yield port


def write_inputs(folder: Path) -> None:
    """Text and a tokenizer."""
    from puna.text.train_tokenizer import train_bpe

    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "value", "index", "count", "total"]
    texts = [" ".join(draw.choice(words) for _ in range(draw.choice([5, 40, 400]))) for _ in range(60)]
    (folder / "text").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:02d}.txt").write_text(text)
    train_bpe(texts, 290).save(folder / "tokenizer")


def write_recipe(folder: Path, name: str, **changes: dict[str, Any]) -> Path:
    """`folder`/NAME.toml, a run in `folder`/NAME; `changes` by section."""
    from puna.base.config import build, to_toml
    from puna.train.recipe import Recipe

    tables: dict[str, Any] = {
        "out": str(folder / name),
        "model": {"preset": "debug", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": "false"},
        "data": {"text": [f"{folder}/text"], "tokenizer": f"{folder}/tokenizer", "seq_len": 32, "packing": "best_fit",
                 "val_fraction": 0.2},
        "optim": {"lr": 1e-2, "eps": 1e-4, "warmup_steps": 1},
        "train": {"steps": 12, "batch_size": 4, "log_every": 1000},
        "parallel": {"timeout": 60.0, "first_timeout": 60.0},
        "checkpoint": {"every": 4},
        "validation": {"every": 0, "max_tokens": 5 * 32},
    }  # fmt: skip
    for section, values in changes.items():
        tables[section] |= values
    file = folder / f"{name}.toml"
    file.write_text(to_toml(build(Recipe, tables)))
    return file


def _runs(pid: int) -> bool:
    """Also False for one that has ended and that nobody has asked for yet."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _agent(
    options: list[str], words: list[str], quirk: Quirk | None, env: dict[str, str], files: tuple[str, ...]
) -> None:
    os.setsid()
    for number, file in zip((1, 2), files, strict=False):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(env)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def start(_: Any, args: tuple[str, ...], env: dict[str, str]) -> _Forked:
        rank = _Forked(list(args[args.index("puna") :]), env, quirk)
        with open(files[2], "a") as pids:
            pids.write(f"{env['RANK']} {rank.pid}\n")
        return rank

    SubprocessHandler._popen = start  # type: ignore[assignment]
    run.main([*options, "-m", "puna", *words])


def _alone(words: list[str], log: str) -> None:
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    _rank(words, {**os.environ, **QUIET, "RANK": "0"}, None)


class _Forked:
    """What torchrun needs of subprocess.Popen."""

    def __init__(self, words: list[str], env: dict[str, str], quirk: Quirk | None):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _rank(words, env, quirk)

    def poll(self) -> int | None:
        if self.returncode is None and (status := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(status[1])
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        if not until(lambda: self.poll() is not None, timeout):
            raise subprocess.TimeoutExpired("rank", timeout)
        return self.returncode  # type: ignore[return-value]


def _rank(words: list[str], env: dict[str, str], quirk: Quirk | None) -> None:
    """As a new Python would: own session, default signals, no files of the agent's."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = words
        if quirk is not None:
            quirk(int(env["RANK"]))
        from puna.__main__ import main

        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
