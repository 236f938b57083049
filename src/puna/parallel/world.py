"""The process groups of a job: started from the recipe's [parallel] section, with time-outs a person chose."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from puna.base.console import PunaError
from puna.parallel.degrees import Degrees
from puna.parallel.launch import LostRank, Meeting, Place
from puna.parallel.mesh import build_mesh, data_ranks, submesh

# Variables of the communication libraries: two runs that differ in them can differ in their sums.
LIBRARIES = ("NCCL_", "GLOO_", "UCX_", "FI_")


@dataclass(frozen=True)
class Settings:
    """How ranks talk. `backend` empty: by the device. Time-outs in seconds; `environment`: NAME=value each.

    `flight`: folder for what each rank's last collectives were, written when one times out.
    """

    backend: str = ""
    first_timeout: float = 1800.0
    timeout: float = 300.0
    environment: tuple[str, ...] = ()
    flight: Path = Path("flight")


class World:
    """This rank's view of the job: its device, its mesh, its share of the data, and sums over everybody."""

    def __init__(self, meeting: Meeting, degrees: Degrees, device: torch.device, settings: Settings, needs_mesh: bool):
        self.meeting, self.degrees, self.device, self.settings = meeting, degrees, device, settings
        self.mesh: DeviceMesh | None = None
        if meeting.place.size > 1 or needs_mesh:
            _start(meeting, device, settings)
            self.mesh = build_mesh(degrees, device.type)
        self.data_rank, self.data_ranks = data_ranks(self.mesh) if self.mesh else (0, 1)

    @property
    def rank(self) -> int:
        return self.meeting.place.rank

    @property
    def size(self) -> int:
        return self.meeting.place.size

    def part(self, name: str) -> DeviceMesh | None:
        """The 1-D mesh of a dimension ('pp', 'tp', 'cp', ...), None where its size is 1."""
        return submesh(self.mesh, name) if self.mesh else None

    def place_in(self, name: str) -> int:
        """This rank's coordinate along a dimension."""
        part = self.part(name)
        return part.get_local_rank() if part else 0

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all ranks, in fp64, alike everywhere; one collective, and one wait for the device."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        dist.all_reduce(total)
        return total.tolist()

    def shorten_timeouts(self) -> None:
        """After the first step, which compiles, allocates and connects, ranks that hang are found sooner."""
        if self.mesh is None:
            return
        names = self.mesh.mesh_dim_names or ()
        for group in [None, *(self.mesh.get_group(name) for name in names)]:
            distributed_c10d._set_pg_timeout(timedelta(seconds=self.settings.timeout), group)

    def describe(self) -> str:
        """What decides how sums are made: backend, its version, and every variable that its library reads."""
        if self.mesh is None:
            return "one process"
        backend = dist.get_backend()
        version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else ""
        found = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(LIBRARIES)]
        return ", ".join([f"{self.size} ranks, {self.degrees}", f"{backend} {version}".strip(), *found])

    def explain(self, error: RuntimeError, step: int) -> Exception:
        """What a failed collective means to a person; any other error is itself."""
        text = str(error)
        if self.size == 1 or isinstance(error, torch.cuda.OutOfMemoryError):
            return error
        if "imed out" in text or "imeout" in text:
            flight = self.record_flight()
            return LostRank(
                f"step {step}: rank {self.rank} waited in vain for another rank: {text.splitlines()[0][:200]}",
                f"a rank hangs or is slow; {flight or self.settings.flight} says in which collective each one stood; "
                "if all is well but slow, raise --parallel.timeout",
            )
        if "closed by peer" in text or "reset by peer" in text or "remote process" in text:
            return LostRank(f"step {step}: another rank has died", "look for it in the logs; torchrun names it below")
        return error

    def record_flight(self) -> Path | None:
        """Write the last collectives of this rank, where torch has kept them; the file's path. NCCL does so itself."""
        dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
        if self.mesh is None or dump is None:
            return None
        path = self.settings.flight / f"rank-{self.rank:05d}.json"
        with suppress(OSError, RuntimeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = dump()
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            return path
        return None

    def close(self) -> None:
        """The orderly end, called by every rank."""
        if self.mesh is not None:
            dist.destroy_process_group()
        self.meeting.leave()


def choose_device(name: str, place: Place) -> torch.device:
    """The device of this rank: its own GPU, or the CPU. `name` as in `pick_device`, already checked.

    Raises PunaError where a node has fewer GPUs than ranks.
    """
    if name != "cuda":
        return torch.device(name)
    gpus = torch.cuda.device_count()
    if place.local_size > gpus:
        raise PunaError(
            f"{place.local_size} ranks were started on a machine with {gpus} GPUs",
            f"use --nproc_per_node={gpus}, or --train.device cpu",
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _start(meeting: Meeting, device: torch.device, settings: Settings) -> None:
    backend = settings.backend or ("nccl" if device.type == "cuda" else "gloo")
    _check_backend(backend, device)
    for entry in settings.environment:
        name, equals, value = entry.partition("=")
        if not equals or not name.startswith(LIBRARIES):
            raise PunaError(
                f"parallel.environment holds {entry!r}", f"write NAME=value; names begin with {', '.join(LIBRARIES)}"
            )
        os.environ[name] = value
    # Kept in memory by each rank, written when a collective times out: which rank waited where.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(settings.flight / "nccl-rank-"))
    if backend == "nccl":  # which writes only into a folder that is there
        with suppress(OSError):
            settings.flight.mkdir(parents=True, exist_ok=True)
    # torch 2.13 renamed two collectives; FSDP2 itself still calls them by the names that 2.11 knows.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    place = meeting.place
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("groups", meeting.store),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=settings.first_timeout),
        device_id=device if backend == "nccl" else None,
    )


def _check_backend(backend: str, device: torch.device) -> None:
    if backend not in ("nccl", "gloo"):
        raise PunaError(f"parallel.backend is {backend!r}", "use nccl (GPUs) or gloo")
    if backend == "nccl" and device.type != "cuda":
        raise PunaError(f"backend nccl works between GPUs, and train.device is {device.type}", "use gloo")
