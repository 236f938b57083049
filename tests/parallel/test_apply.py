"""Parallel passes: the placement table by itself, everything else on four and two ranks in one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import ranks
from parallel.apply_checks import ALL_BIASES, SPEC, TIED, WORLDS, samples, whole_model
from puna.base.console import PunaError
from puna.model.rope import inverse_frequencies
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.rope import cos_sin
from puna.parallel.plan import bounds, check_tensor_parallel, cut_dim, kv_heads, local_part, role_of
from puna.parallel.recompute import checkpoint_activations, compile_blocks

CHECKS = [f"{check.__name__}@{world}" for world, checks in WORLDS.items() for check in checks]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return ranks.run(Path(__file__).with_name("apply_checks.py"))


@pytest.mark.parametrize("name", CHECKS)
def test_on_ranks(report: dict[str, Any], name: str) -> None:
    assert report[name]["ok"], report[name]["error"]


@pytest.mark.parametrize(("mode", "recomputed"), [("none", 0), ("selective", 3), ("full", 6)])
def test_what_is_recomputed(mode: str, recomputed: int) -> None:
    """Of a block's seven matrix products, one forward and two backward: how many are done again. Gradients stay."""
    blocks = list(whole_model(SPEC).layers)
    sample = samples(SPEC.vocab_size)[1]
    x_TD = torch.randn(len(sample.tokens_T), SPEC.hidden_size, requires_grad=True)
    tables = cos_sin(sample.positions_T, inverse_frequencies(SPEC.rope, SPEC.head_dim), 1.0, torch.float32)
    blocks[0](x_TD, *tables, PackedCausal.of(sample.lengths)).square().sum().backward()
    expected, x_TD.grad = x_TD.grad, None
    checkpoint_activations(blocks, mode)
    with ProductCount() as seen:
        blocks[0](x_TD, *tables, PackedCausal.of(sample.lengths)).square().sum().backward()
    assert seen.products == 21 + recomputed  # the last one's result nobody asks for, so torch stops before it
    torch.testing.assert_close(x_TD.grad, expected, rtol=1e-5, atol=1e-5)


class ProductCount(TorchDispatchMode):
    """Counts matrix products; seven a block in the forward pass."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_compiler_gets_every_block() -> None:
    model, seen = whole_model(SPEC), []
    before = dict(model.named_parameters()).keys()
    compile_blocks(list(model.layers), lambda forward: seen.append(forward) or (lambda *inputs: inputs[0] * 2))
    assert [forward.__self__ for forward in seen] == list(model.layers)
    assert torch.equal(model.layers[1](torch.ones(2)), torch.full((2,), 2.0))
    assert dict(model.named_parameters()).keys() == before


@pytest.mark.parametrize("spec", [SPEC, TIED, ALL_BIASES], ids=["plain", "tied", "biases"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_parts_make_the_whole(spec: Any, tp: int) -> None:
    """Every parameter has a line in the table, and what the ranks hold, side by side, is the parameter."""
    model = Transformer(spec)
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        parts = [local_part(name, parameter, spec, rank, tp) for rank in range(tp)]
        dim = cut_dim(name, spec, tp)
        joined = parts[0] if dim is None else torch.cat(parts, dim)
        assert torch.equal(joined, parameter), name


def test_table_says_what_is_cut() -> None:
    assert [role_of(f"layers.11.{name}") for name in ("attn.q_proj.weight", "attn.o_proj.bias", "attn.k_norm.weight")] \
        == ["column", "row", "replicate"]  # fmt: skip
    assert (role_of("layers.0.attn_norm.weight"), role_of("norm.weight")) == ("sequence", "sequence")
    assert (role_of("embed"), role_of("lm_head.weight")) == ("vocabulary", "vocabulary")
    assert cut_dim("layers.0.mlp.down_proj.weight", SPEC, 2) == 1
    assert cut_dim("layers.0.mlp.down_proj.bias", SPEC, 2) is None
    assert cut_dim("layers.0.attn.k_proj.weight", SPEC, 4) == 0
    assert cut_dim("layers.0.attn.k_proj.weight", SPEC, 8) is None  # 4 kv heads on 8 ranks: whole everywhere
    with pytest.raises(PunaError, match="no placement for"):
        role_of("layers.0.conv.weight")


def test_query_heads_find_their_kv_heads() -> None:
    """Rank r's query heads look at the kv heads that grouped-query attention gives them in one process."""
    for kv in (1, 2, 4, 8):
        spec = SPEC.replace(num_key_value_heads=kv)
        for tp in (1, 2, 4, 8):
            for rank in range(tp):
                first, end = bounds(8, rank, tp)
                assert kv_heads(spec, rank, tp) == (first * kv // 8, (end - 1) * kv // 8 + 1)


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, "num_attention_heads 6 is not divisible by tp 4"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, "num_key_value_heads 6 and tp 4"),
        ({"vocab_size": 5}, 4, "vocab_size 5 leaves nothing for the last of tp 4 ranks"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes: dict[str, int], tp: int, message: str) -> None:
    with pytest.raises(PunaError, match=message):
        check_tensor_parallel(SPEC.replace(**changes), tp)
