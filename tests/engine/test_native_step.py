"""engine/native_step.py: a whole step in one native call gives what the Transformer gives."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.engine.native_step import NativeStep, RopeTable, why_not
from puna.model.linear import Linear, QuantizedLinear, use_activations
from puna.model.rope import attention_scale, inverse_frequencies
from puna.model.spec import Rope, Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal, RoundedKV
from puna.ops.formats.gguf import quantize_gguf
from puna.ops.formats.gguf_layer import from_blocks
from puna.ops.formats.kv import KV_FLOAT8, KV_FLOAT8_HEAD, KV_INT8, KV_INT8_HEAD, KVScales
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import pack, round_to_nearest
from puna.ops.formats.rounding import code_dtype
from puna.ops.formats.scheme import FLOAT8_TOKEN, INT8_TOKEN
from puna.ops.native import library
from puna.ops.native import step as native
from puna.ops.paged import PagedCausal, Pages
from puna.ops.rope import cos_sin
from puna.quant.config import parse_format

MAX_LEN = 64
SMALL = Spec(vocab_size=67, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             intermediate_size=80)  # fmt: skip
WIDE = dataclasses.replace(SMALL, hidden_size=64, intermediate_size=96)  # whole groups of 32
FAMILIES = {
    "grouped": {},
    "every head its own": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1, "num_attention_heads": 6},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "head norms": {"qk_norm": True},
    "windows": {"sliding_windows": (3, None)},
    "tied": {"tie_word_embeddings": True},
    "heads of 64": {"head_dim": 64, "hidden_size": 96},
    "heads of 80": {"head_dim": 80, "num_attention_heads": 2},
    "heads of 128": {"head_dim": 128, "num_attention_heads": 2, "intermediate_size": 50},
    "dynamic rope": {"rope": Rope(rope_type="dynamic", factor=2.0, max_position_embeddings=8)},
    "yarn": {"rope": Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)},
}


@pytest.fixture(autouse=True)
def _native_is_here():
    """The step must be there wherever it could have been built."""
    if not native.available():
        if os.environ.get("PUNA_NATIVE") == "0" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no native kernels here: " + native.reason())
        pytest.fail(f"a C++ compiler is here, but the native kernels are {native.reason()}: pip install -e .")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def random_model(spec: Spec, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(spec)
    for name, parameter in model.named_parameters():
        scale = 1.0 if name == "embed" else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn_like(parameter) * scale + (1 if name.endswith("norm.weight") else 0))
    return model.to(dtype)


def pages_for(spec: Spec, size: int, dtype: torch.dtype = torch.float32, scales: KVScales | None = None) -> Pages:
    """Eighty pages, full of what must not be read."""
    shape = (spec.num_hidden_layers, 80, spec.num_key_value_heads, size, spec.head_dim)
    keys, values = (torch.full(shape, 100.0 if scales else torch.nan).to(dtype) for _ in range(2))
    return Pages(keys, values, scales)


class Sequences:
    """Token ids with pages in no order; `step` runs slices (sequence, start, count) and keeps the logits of each row."""

    def __init__(self, step: NativeStep, pages: Pages, ids: list[Tensor], seed: int = 0) -> None:
        free = random.Random(seed).sample(range(1, pages.num_pages), pages.num_pages - 1)
        self.tables = [[free.pop() for _ in range(-(-len(one) // pages.page_size))] for one in ids]
        self.native, self.pages, self.ids = step, pages, ids
        self.logits = [torch.full((len(one), step._step.num_words), torch.nan) for one in ids]

    def attend(self, slices: list[tuple[int, int, int]]) -> PagedCausal:
        return PagedCausal.of(self.pages, [(self.tables[i], start, count) for i, start, count in slices], MAX_LEN)

    def step(self, slices: list[tuple[int, int, int]]) -> None:
        tokens = torch.cat([self.ids[i][start : start + count] for i, start, count in slices])
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in slices])
        logits = self.native(tokens, positions, self.attend(slices), torch.arange(len(tokens)))
        for (i, start, count), rows in zip(slices, logits.split([s[2] for s in slices]), strict=True):
            self.logits[i][start : start + count] = rows

    def run(self, seed: int = 0, most: int = 5, least: int = 1) -> list[Tensor]:
        """All tokens in pieces of random lengths (the last one up to `least` longer), several sequences in a step.

        Returns their logits.
        """
        draw, done = random.Random(seed), [0] * len(self.ids)
        while left := [i for i, one in enumerate(self.ids) if done[i] < len(one)]:
            chosen = draw.sample(left, draw.randint(1, len(left)))
            left_of = {i: len(self.ids[i]) - done[i] for i in chosen}
            drawn = {i: min(draw.randint(least, most), left_of[i]) for i in chosen}
            slices = [(i, done[i], n if left_of[i] - n >= least else left_of[i]) for i, n in drawn.items()]
            self.step(slices)
            for i, _, count in slices:
                done[i] += count
        return self.logits


def some_ids(spec: Spec, *lengths: int) -> list[Tensor]:
    return [torch.randint(spec.vocab_size, (length,)) for length in lengths]


def trainers(model: Transformer, ids: Tensor, wrap=lambda attend: attend) -> Tensor:
    """Logits as the trainer's forward computes them: one document, no cache."""
    attend = dataclasses.replace(PackedCausal.of([len(ids)]), max_len=MAX_LEN)
    return model.logits(model(ids, torch.arange(len(ids)), wrap(attend))).float()


def assert_trainers(model: Transformer, pages: Pages, limit: float, wrap=lambda attend: attend) -> None:
    step = NativeStep.of(model, pages)
    assert step is not None, why_not(model, pages)
    ids = some_ids(model.spec, 21, 9, 14)
    for got, one in zip(Sequences(step, pages, ids).run(), ids, strict=True):
        expected = trainers(model, one, wrap)
        assert (got - expected).abs().max() <= limit * expected.abs().max()


# --- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 4, 16])
def test_every_family_as_the_trainer_computes_it(family, size) -> None:
    model = random_model(dataclasses.replace(SMALL, **FAMILIES[family]))
    assert_trainers(model, pages_for(model.spec, size), 3e-6)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(monkeypatch, level) -> None:
    if level > library.load().level:
        pytest.skip(f"this processor has no {library.LEVELS[level]}")
    monkeypatch.setattr(native, "_native", library.load()._replace(level=level))
    model = random_model(dataclasses.replace(SMALL, qk_norm=True, qkv_bias=True, head_dim=80))
    quantize(model, ["int4_g16", "none", "int8"])
    assert_trainers(model, pages_for(model.spec, 4), 3e-6)


@dataclasses.dataclass(frozen=True)
class CastKV:
    """Keys and values as a cache in `dtype` gives them back."""

    attend: PackedCausal
    dtype: torch.dtype

    @property
    def max_len(self) -> int:
        return self.attend.max_len

    def __call__(self, layer, q_THK, k_TGK, v_TGK, window):
        k, v = (x.to(self.dtype).to(x.dtype) for x in (k_TGK, v_TGK))
        return self.attend(layer, q_THK, k, v, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_in_half_precision(dtype) -> None:
    model = random_model(SMALL)
    # A sum in another order may fall on the other side between two numbers of the cache.
    assert_trainers(model, pages_for(SMALL, 4, dtype), 2e-3, lambda attend: CastKV(attend, dtype))


@pytest.mark.parametrize("scheme", [KV_INT8, KV_INT8_HEAD, KV_FLOAT8, KV_FLOAT8_HEAD], ids=str)
def test_a_cache_in_eight_bits(scheme) -> None:
    heads = 2 if scheme.granularity == "head" else 1
    sizes = torch.linspace(0.02, 0.06, 4 * heads).view(4, heads).unbind()
    scales = KVScales(scheme, tuple(sizes[:2]), tuple(sizes[2:]))
    model = random_model(SMALL)
    assert_trainers(model, pages_for(SMALL, 4, code_dtype(scheme), scales), 1e-2, lambda a: RoundedKV(a, scales))


@pytest.mark.parametrize("size", [1, 16])
def test_pages_hold_what_the_transformer_writes(size) -> None:
    model = random_model(SMALL)
    ids, ours, theirs = some_ids(SMALL, 23), pages_for(SMALL, size), pages_for(SMALL, size)
    sequences = Sequences(NativeStep(model, ours), ours, ids)
    sequences.run()
    expected = model.logits(model(ids[0], torch.arange(23), dataclasses.replace(
        sequences.attend([(0, 0, 23)]), pages=theirs)))  # fmt: skip
    assert (sequences.logits[0] - expected).abs().max() < 1e-5
    for mine, twins in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        assert torch.equal(mine.isnan(), twins.isnan())  # nothing else was written
        assert (mine - twins).nan_to_num().abs().max() < 1e-5


# --- weights ----------------------------------------------------------------------------------------------------------


def quantize(model: Transformer, formats: list[str], dtype=torch.float32, head=True, activations=None) -> None:
    """Linear layers in turn in each of the formats."""
    layers = [(n, m) for n, m in model.named_modules() if type(m) is Linear and (head or n != "lm_head")]
    for number, (name, layer) in enumerate(layers):
        scheme = parse_format(formats[number % len(formats)])
        if scheme is not None:
            packed = round_to_nearest(layer.weight.float(), scheme, torch.float16)
            replace(model, name, QuantizedWeight(packed, activations=activations), layer.bias, dtype)


def replace(model: Transformer, name: str, weight: QuantizedWeight, bias=None, dtype=torch.float32) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight, bias, dtype))


@pytest.mark.parametrize("formats", [
    ["int4_g16"], ["int4_g8_asym"], ["int4"], ["int8"], ["int8_g16_asym"], ["fp8"], ["fp8_tensor"], ["int3_g16"],
    ["none", "int4_g16", "int8_asym"], ["int4_g16", "int4_g8"],
], ids=" ".join)  # fmt: skip
def test_every_format_of_weights(formats) -> None:
    model = random_model(dataclasses.replace(SMALL, qkv_bias=True))
    quantize(model, formats)
    assert_trainers(model, pages_for(SMALL, 4), 3e-6)


@pytest.mark.parametrize("activations", [INT8_TOKEN, FLOAT8_TOKEN], ids=str)
def test_weights_that_round_their_inputs(activations) -> None:
    model = random_model(SMALL)
    quantize(model, ["int8" if activations is INT8_TOKEN else "fp8"], activations=activations)
    assert_trainers(model, pages_for(SMALL, 4), 2e-2)  # a sum in another order may move a code


@pytest.mark.parametrize("formats", [["int4_g32"], ["int8_asym"], ["int4_g32_asym", "none"]], ids=" ".join)
def test_inputs_rounded_to_int8_in_groups(formats) -> None:
    model = random_model(dataclasses.replace(WIDE, qkv_bias=True))
    quantize(model, formats)
    exact = trainers(model, ids := torch.arange(40))
    use_activations(model, "int8")
    assert_trainers(model, pages_for(WIDE, 4), 2e-2)  # a sum in another order may move a code
    pages = pages_for(WIDE, 4)
    got = Sequences(NativeStep(model, pages), pages, [ids]).run()[0]
    lost = (got - exact).norm() / exact.norm()
    assert 0.002 < lost < 0.03  # what rounding costs this model of two layers


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q5_1", "Q4_0"])
def test_weights_in_blocks_of_llama_cpp(kind) -> None:
    model = random_model(dataclasses.replace(WIDE, mlp_bias=True))
    for name, layer in [(n, m) for n, m in model.named_modules() if type(m) is Linear]:
        weight_ND = layer.weight.detach()
        weight = from_blocks(quantize_gguf(weight_ND, kind), kind, tuple(weight_ND.shape))
        replace(model, name, weight, layer.bias)
    assert_trainers(model, pages_for(WIDE, 4), 3e-6)


def test_columns_in_the_order_of_gptq() -> None:
    model = random_model(SMALL)
    for name in ("layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.1.mlp.down_proj"):
        weight_ND = model.get_submodule(name).weight
        scheme, width = parse_format("int4_g8"), weight_ND.shape[1]
        packed = round_to_nearest(weight_ND, scheme, torch.float16)
        order = torch.randperm(width)
        group_of_D = (torch.arange(width) // 8)[order].int()
        codes = packed.codes()[:, order].contiguous()
        replace(model, name, QuantizedWeight(pack(codes, scheme, packed.scales, None, group_of_D)))
    assert_trainers(model, pages_for(SMALL, 4), 3e-6)


@pytest.mark.parametrize("formats", [["none"], ["int8"], ["int4_g16"]], ids=" ".join)
def test_a_model_in_bf16_is_rounded_where_the_transformer_rounds(formats, monkeypatch) -> None:
    monkeypatch.setenv("PUNA_PACKED", "native")  # for more rows others compute with weights rounded to bf16
    spec = dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True, mlp_bias=True)
    model = random_model(spec, torch.bfloat16)
    quantize(model, formats, torch.bfloat16, head=False)
    ours, theirs = (pages_for(spec, 4, torch.bfloat16) for _ in range(2))
    sequences = Sequences(NativeStep(model, ours), ours, ids := some_ids(spec, 30))
    got = sequences.run()[0]
    attend = dataclasses.replace(sequences.attend([(0, 0, 30)]), pages=theirs)
    expected = model.logits(model(ids[0], torch.arange(30), attend)).float()
    # A number that lies between two of bf16 may fall to either side, and others follow it; without rounding few agree.
    assert (got == expected).float().mean() > 0.9


# --- a row's bits depend on nothing beside it -------------------------------------------------------------------------


@pytest.mark.parametrize("formats", ["none", "int4_g16", "int8_asym", "bf16", "int4_g32 int8"])
@pytest.mark.parametrize(("least", "most"), [(1, 1), (2, 9)], ids=["single tokens", "pieces"])
def test_the_same_bits_for_any_batch_and_threads(formats, least, most, threads) -> None:
    """Of single tokens and of pieces; between the two, attention differs by rounding (native/paged.cpp)."""
    dtype = torch.bfloat16 if formats == "bf16" else torch.float32
    spec = dataclasses.replace(WIDE, qkv_bias=True, qk_norm=True, head_dim=80, sliding_windows=(5, None))
    model = random_model(spec, dtype)
    if formats != "bf16":
        quantize(model, formats.split()[:1])
        use_activations(model, "int8" if " " in formats else "exact")
    ids = some_ids(spec, 21, 9, 14, 30)
    alone = []
    threads(1)
    for one in ids:
        pages = pages_for(spec, 4, dtype)
        alone.append(Sequences(NativeStep(model, pages), pages, [one]).run(least=least, most=least)[0])
    for count, size in ((1, 4), (2, 16), (5, 1)):
        threads(count)
        pages = pages_for(spec, size, dtype)
        together = Sequences(NativeStep(model, pages), pages, ids, seed=count).run(seed=count, least=least, most=most)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), count


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_long_context_is_divided_between_threads_in_the_same_places(threads) -> None:
    spec = dataclasses.replace(SMALL, num_attention_heads=1, num_key_value_heads=1, sliding_windows=(900, None))
    model = random_model(spec)
    shape = (2, 400, 1, 8, 16)
    keys, values = torch.randn(shape), torch.randn(shape)
    answers = []
    for count in (1, 4):
        threads(count)
        pages = Pages(keys.clone(), values.clone())
        attend = PagedCausal.of(pages, [(list(range(1, 399)), 3000, 1)], 4096)
        row = torch.tensor([0])
        answers.append(NativeStep(model, pages)(torch.tensor([5]), torch.tensor([3000]), attend, row))
    assert torch.equal(*answers)
    attend = PagedCausal.of(Pages(keys, values), [(list(range(1, 399)), 3000, 1)], 4096)
    expected = model.logits(model(torch.tensor([5]), torch.tensor([3000]), attend))
    assert (answers[0] - expected).abs().max() < 1e-5


# --- exactness --------------------------------------------------------------------------------------------------------


def test_errors_of_fp32_against_fp64() -> None:
    """Relative to the largest number, as the sums of fp32 leave it: keys and values of each layer, and logits."""
    spec = dataclasses.replace(
        SMALL, hidden_size=192, intermediate_size=512, head_dim=64, num_hidden_layers=3, sliding_windows=()
    )
    model = random_model(spec)
    ids, pages = some_ids(spec, 48), pages_for(spec, 16)
    sequences = Sequences(NativeStep(model, pages), pages, ids)
    logits = sequences.run()[0]
    seen: list[Tensor] = []
    expected = trainers_in_fp64(model, ids[0], seen)
    assert relative(logits, expected) < 2e-6
    slots = sequences.attend([(0, 0, 48)]).slots_T
    for layer, (k_TGK, v_TGK) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        for part, exact in ((pages.keys, k_TGK), (pages.values, v_TGK)):
            assert relative(part[layer].transpose(1, 2).flatten(0, 1)[slots], exact) < 2e-6


def trainers_in_fp64(model: Transformer, ids: Tensor, seen: list[Tensor]) -> Tensor:
    class Watched(CastKV):
        def __call__(self, layer, q_THK, k_TGK, v_TGK, window):
            seen.extend((k_TGK, v_TGK))
            return self.attend(layer, q_THK, k_TGK, v_TGK, window)

    wide = Transformer(model.spec).double()
    wide.load_state_dict(model.state_dict())
    attend = Watched(PackedCausal.of([len(ids)]), torch.float64)
    return wide.logits(wide(ids, torch.arange(len(ids)), attend))


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("family", ["grouped", "dynamic rope", "yarn"])
def test_the_rope_table_holds_the_models_numbers(family) -> None:
    spec = dataclasses.replace(SMALL, **FAMILIES[family])
    table = RopeTable(spec, torch.float32)
    for positions, max_len in ((3, 64), (700, 64), (5, 64), (9, 4096)):
        cos, sin = table.up_to(positions, max_len)
        assert len(cos) >= positions
        frequencies = inverse_frequencies(spec.rope, spec.head_dim, max_len)
        expected = cos_sin(torch.arange(len(cos)), frequencies, attention_scale(spec.rope), torch.float32)
        assert torch.equal(torch.cat((cos, cos), 1), expected[0][:, 0])
        assert torch.equal(torch.cat((-sin, sin), 1), expected[1][:, 0])


# --- rows, errors, and who is not served ------------------------------------------------------------------------------


def test_logits_of_the_rows_asked_for_and_no_others() -> None:
    model = random_model(SMALL)
    pages, ids = pages_for(SMALL, 4), some_ids(SMALL, 11)
    sequences = Sequences(step := NativeStep(model, pages), pages, ids)
    attend = sequences.attend([(0, 0, 11)])
    everything = step(ids[0], torch.arange(11), attend, torch.arange(11))
    assert torch.equal(step(ids[0], torch.arange(11), attend, torch.tensor([10, 3, 3])), everything[[10, 3, 3]])
    assert step(ids[0], torch.arange(11), attend, torch.tensor([], dtype=torch.long)).shape == (0, 67)
    nothing = torch.tensor([], dtype=torch.long)
    assert step(nothing, nothing, PagedCausal.of(pages, [], MAX_LEN), nothing).shape == (0, 67)


@pytest.mark.parametrize(("token", "row"), [(67, 0), (-1, 0), (3, 1), (3, -1)])
def test_a_token_or_a_row_that_does_not_exist(token, row) -> None:
    pages = pages_for(SMALL, 4)
    step, attend = NativeStep(random_model(SMALL), pages), PagedCausal.of(pages, [([7], 0, 1)], MAX_LEN)
    with pytest.raises(IndexError):
        step(torch.tensor([token]), torch.tensor([0]), attend, torch.tensor([row]))
    assert pages.keys[:, 1:].isnan().all()


class Watched(Linear):
    pass


def test_why_a_model_is_not_served(monkeypatch) -> None:
    pages = pages_for(SMALL, 4)
    reasons = {
        "in torch.float64": (random_model(SMALL).double(), pages),
        "a Watched in the model": (random_model(SMALL), pages),
        "somebody watches a MLP": (random_model(SMALL), pages),
        "over several ranks": (random_model(SMALL), pages),
        "a product by 'twin'": (random_model(SMALL), pages),
        "a cache of torch.float64": (random_model(SMALL), pages_for(SMALL, 4, torch.float64)),
        "torch.bfloat16 in a Linear": (random_model(SMALL), pages),
    }
    models = {text: model for text, (model, _) in reasons.items()}
    models["a Watched in the model"].layers[1].mlp.up_proj = Watched(48, 80)
    models["somebody watches a MLP"].layers[1].mlp.register_forward_hook(print)
    models["over several ranks"].score = print
    models["torch.bfloat16 in a Linear"].layers[0].attn.q_proj.bfloat16()
    with monkeypatch.context() as patch:
        patch.setenv("PUNA_PACKED", "twin")
        quantize(models["a product by 'twin'"], ["int4_g16"])
    for text, (model, cache) in reasons.items():
        assert text in (why_not(model, cache) or "")
        assert NativeStep.of(model, cache) is None
    monkeypatch.setattr(native, "_native", library.Library(None, 0, "off (PUNA_NATIVE=0)"))
    assert why_not(random_model(SMALL), pages) == "native kernels: off (PUNA_NATIVE=0)"


def test_a_table_that_is_a_slice_of_a_wider_one() -> None:
    model = random_model(SMALL)
    pages, ids = pages_for(SMALL, 4), some_ids(SMALL, 6, 10)
    sequences = Sequences(step := NativeStep(model, pages), pages, ids)
    attend = sequences.attend(slices := [(0, 0, 6), (1, 0, 10)])
    wide = np.full((2, 9), 39, dtype=np.int32)
    wide[:, :3] = attend.tables_BM
    sliced = dataclasses.replace(attend, tables_BM=torch.from_numpy(wide)[:, :3])
    sequences.step(slices)
    again = step(torch.cat(ids), torch.cat((torch.arange(6), torch.arange(10))), sliced, torch.arange(16))
    assert torch.equal(again, torch.cat(sequences.logits))
