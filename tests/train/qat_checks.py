"""Training with rounded numbers on a mesh, as `ranks.run` calls it. 64 wide, 96 in the feed-forward: groups of 16 fit."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # it is run as a file

from train.parallel_checks import case

OWN_GROUPS = True
INT4 = {"quant__weights": "int4_g16"}
BFLOAT16 = {"train__dtype": "bfloat16", "train__device": "cpu"}

WORLDS = {
    1: [case("reference", **INT4), case("one_bfloat16", **INT4, **BFLOAT16)],
    2: [
        case("ddp", dp_replicate=2, **INT4),
        case("fsdp", **INT4, train__activation_checkpointing="full"),
        case("fsdp_bfloat16", **INT4, **BFLOAT16),
        case("tp_overlap", tp=2, async_tp=True, **INT4),
        case("pp", pp=2, **INT4),
    ],
    4: [case("fsdp_tp_without_sequence", tp=2, sequence_parallel=False, **INT4)],
}
