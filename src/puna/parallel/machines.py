"""GPUs by name: peak rates, memory, links. Data sheets, with the one fitted number named as such."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from puna.base.console import PunaError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One GPU and what connects it. Rates in FLOP/s (dense, no sparsity) and bytes/s, one direction.

    `peak`: by 'bfloat16', 'float8', 'float32' (TF32 where there is one). `achieved`: share of that which the matrix
    products of a whole training step reach in PyTorch at full power, launch gaps and cold caches included: fitted for
    Hopper (tests/parallel/test_throughput.py shows all rows at once), assumed for the others. `memory`: bytes that
    programs see. `link`: within a node, per GPU; `network`: across nodes, per GPU. `power`: limit / design power.
    """

    name: str
    peak: Mapping[str, float]
    achieved: Mapping[str, float]
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str
    per_node: int = 8
    power: float = 1.0

    @property
    def clock(self) -> float:
        """Clock under a power limit as a share of the full one: dynamic power goes with f V^2, so about with f^3."""
        return self.power ** (1 / 3)

    def rate(self, dtype: str) -> float:
        """Sustained FLOP/s of large matrix products."""
        kind = "bfloat16" if dtype == "float16" else dtype
        return self.peak[kind] * self.achieved[kind] * self.clock


HOPPER = {"bfloat16": 989e12, "float8": 1979e12, "float32": 494e12}
HOPPER_ACHIEVED = {"bfloat16": 0.53, "float8": 0.45, "float32": 0.53}

MACHINES = {
    machine.name: machine
    for machine in (
        Machine("h100", HOPPER, HOPPER_ACHIEVED, 79.6 * GIB, 3.35e12, 450e9, 50e9,
                "NVIDIA H100 SXM5 data sheet (700 W); network: 400 Gb/s per GPU"),
        Machine("h100-500w", HOPPER, HOPPER_ACHIEVED, 95.6 * GIB, 2.4e12, 450e9, 50e9,
                "torchtitan benchmarks, Dec 2024: 96 GB HBM2e at 2.4 TB/s, 500 W", power=500 / 700),
        Machine("h200", HOPPER, HOPPER_ACHIEVED, 140 * GIB, 4.8e12, 450e9, 50e9,
                "NVIDIA H200 SXM data sheet (700 W); network: 400 Gb/s per GPU"),
        Machine("a100-80", {"bfloat16": 312e12, "float32": 156e12}, {"bfloat16": 0.65, "float32": 0.65},
                79.2 * GIB, 2.039e12, 300e9, 25e9,
                "NVIDIA A100 80GB SXM data sheet (400 W); network: 200 Gb/s per GPU"),
        Machine("b200", {"bfloat16": 2250e12, "float8": 4500e12, "float32": 1125e12},
                {"bfloat16": 0.5, "float8": 0.42, "float32": 0.5}, 179 * GIB, 7.7e12, 900e9, 50e9,
                "NVIDIA DGX B200 data sheet (8 GPUs, dense half of the sparse figures); network: 400 Gb/s per GPU"),
        Machine("mi300x", {"bfloat16": 1307e12, "float8": 2615e12, "float32": 654e12},
                {"bfloat16": 0.38, "float8": 0.33, "float32": 0.38}, 192 * GIB, 5.3e12, 448e9, 50e9,
                "AMD Instinct MI300X data sheet (750 W): 7 links of 64 GB/s; network: 400 Gb/s per GPU"),
    )
}  # fmt: skip


def machine(name: str) -> Machine:
    """A machine by its name; PunaError names the nearest one."""
    if name in MACHINES:
        return MACHINES[name]
    near = difflib.get_close_matches(name, MACHINES, 1)
    raise PunaError(
        f"no GPU is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""), f"GPUs: {', '.join(MACHINES)}"
    )
