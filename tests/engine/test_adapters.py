"""engine/adapters.py: LoRA adapters in one batch, on plain and quantized models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from puna.base.console import PunaError
from puna.engine.adapters import Adapters
from puna.engine.llm import LLM
from puna.engine.request import SamplingParams
from puna.model import linear as model_linear
from puna.model.linear import Linear, QuantizedLinear
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.formats.gguf import quantize_gguf
from puna.ops.formats.gguf_layer import GgufWeight
from puna.quant.config import parse_format
from puna.weights.adapter import Adapter, Delta, save_adapter
from puna.weights.folder import hf_state
from weights.quantized_models import quantize, random_model

ATTENTION, MLP = (
    ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
EVERY = (*ATTENTION, *MLP)
PROMPTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 1, 12, 3, 5, 1)]


def make_adapter(model: Transformer, seed: int, rank: int = 4, names=EVERY, layers=(0, 1)) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in [f"layers.{i}.{name}" for i in layers for name in names]:
        layer = model.get_submodule(name)
        outputs, inputs = layer.product.shape if isinstance(layer, QuantizedLinear) else layer.weight.shape
        down, up = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
        deltas[name] = Delta(down * 0.05, up * 0.5, 2.0)
    return Adapter.of(deltas)


def quantized_model(text: str = "int4_g32", overrides=None) -> Transformer:
    model = random_model()
    for name, weight in quantize(model, parse_format(text), overrides=overrides).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight))
    return model


def blocks_model() -> Transformer:
    """As a GGUF file gives it."""
    model = random_model()
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            parent, _, leaf = name.rpartition(".")
            weight = GgufWeight(quantize_gguf(layer.weight, "Q5_0"), "Q5_0", tuple(layer.weight.shape))
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight))
    return model


KINDS = pytest.mark.parametrize("make", [random_model, quantized_model, blocks_model], ids=["plain", "int4", "Q5_0"])


@torch.no_grad()
def forward(model: Transformer, prompts) -> list[torch.Tensor]:
    """The logits of each prompt, all in one batch."""
    lengths = [len(prompt) for prompt in prompts]
    positions = torch.cat([torch.arange(n) for n in lengths])
    return list(model.logits(model(torch.cat(list(prompts)), positions, PackedCausal.of(lengths))).split(lengths))


def answers(adapters: Adapters, names, prompts=PROMPTS) -> list[torch.Tensor]:
    """As `forward`, each prompt with the adapter of its name."""
    slots = [adapters.slot(name) for name, prompt in zip(names, prompts, strict=True) for _ in prompt]
    adapters.rows(slots)
    return forward(adapters.model, prompts)


def kinds(model: Transformer) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_adapter_is_the_merged_model(family):
    model, merged = random_model(family), random_model(family)
    adapter = make_adapter(model, 1)
    adapters = Adapters(model)
    adapters.add("a", adapter)
    for name, delta in adapter.deltas.items():
        merged.get_submodule(name).weight.data += delta.weight()
    for prompts in (PROMPTS, PROMPTS[1:2]):
        for mine, theirs, plain in zip(
            answers(adapters, ["a"] * len(prompts), prompts), forward(merged, prompts),
            forward(random_model(family), prompts), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(mine.log_softmax(-1), theirs.log_softmax(-1), rtol=1e-5, atol=1e-5)
            assert (mine - plain).abs().max() > 0.1


@KINDS
def test_three_adapters_and_the_base_in_one_batch(make):
    model = make()
    adapters = Adapters(model)
    adapters.add("all", make_adapter(model, 1))
    adapters.add("values", make_adapter(model, 2, rank=9, names=("attn.v_proj", "attn.q_proj")))
    adapters.add("up", make_adapter(model, 3, rank=2, names=("mlp.up_proj",), layers=(1,)))
    names = ["up", "values", None, "all", "values", "all"]
    together = answers(adapters, names)
    for prompt, name, mine in zip(PROMPTS, names, together, strict=True):
        (alone,) = answers(adapters, [name], [prompt])
        torch.testing.assert_close(mine.log_softmax(-1), alone.log_softmax(-1), rtol=1e-5, atol=1e-5)
        (fresh,) = forward(make(), [prompt])
        assert (name is None) == bool((alone - fresh).abs().max() < 1e-4)


@KINDS
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2]], ids=["prompts", "one token"])
def test_the_base_keeps_its_bits(make, prompts):
    model = make()
    plain = forward(model, prompts)
    adapters = Adapters(model)
    adapters.add("a", make_adapter(model, 1))
    untouched = [forward(model, prompts), answers(adapters, [None] * len(prompts), prompts)]
    adapters.rows(None)
    untouched.append(forward(model, prompts))
    for found in untouched:
        assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    mixed = answers(adapters, ["a"] * len(prompts) + [None] * len(prompts), [*prompts, *prompts])
    adapters.rows(None)
    same_batch = forward(model, [*prompts, *prompts])
    for one, other in zip(mixed[len(prompts) :], same_batch[len(prompts) :], strict=True):
        assert torch.equal(one, other)


def test_a_quantized_base_is_merged_as_numbers():
    model, merged = quantized_model(), random_model()
    adapter, adapters = make_adapter(model, 1), Adapters(model)
    for name in kinds(model):
        layer = model.get_submodule(name)
        if isinstance(layer, QuantizedLinear):
            more = adapter.deltas[name].weight()
            merged.get_submodule(name).weight.data.copy_(layer.dequantize(torch.float32) + more)
    adapters.add("a", adapter)
    for mine, theirs in zip(answers(adapters, ["a"] * 6), forward(merged, PROMPTS), strict=True):
        torch.testing.assert_close(mine.log_softmax(-1), theirs.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_layers_of_two_kinds_in_one_group():
    """q and v quantized, k plain, as in models of mixed precision."""
    mixed = {"k_proj": None, "gate_proj": None}
    model, plain = (quantized_model(overrides=mixed) for _ in range(2))
    assert type(model.layers[0].attn.k_proj) is Linear
    adapter = make_adapter(model, 5)
    adapters = Adapters(model)
    adapters.add("a", adapter)
    for name, delta in adapter.deltas.items():  # the twin: every layer by itself, the low-rank product beside it
        layer, weight = plain.get_submodule(name), delta.weight()
        layer.register_forward_hook(lambda _, x, y, w=weight: y + x[0] @ w.t())
        layer.forward_all = lambda layers, x: [layer(x) for layer in layers]
    for mine, theirs in zip(answers(adapters, ["a"] * 6), forward(plain, PROMPTS), strict=True):
        torch.testing.assert_close(mine.log_softmax(-1), theirs.log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("attn.v_proj",), ("mlp.up_proj",), EVERY])
def test_what_is_computed_together_stays_together(names, monkeypatch):
    model = random_model()
    adapters, sizes = Adapters(model), []
    adapters.add("a", make_adapter(model, 1, names=names))
    group = model_linear.ops.linear_group
    monkeypatch.setattr(model_linear.ops, "linear_group", lambda x, w, b: [sizes.append(len(w)), group(x, w, b)][1])
    answers(adapters, ["a"] * 6)
    assert sizes == [3, 2, 3, 2]


@KINDS
def test_the_model_stays_what_it_is(make):
    model = make()
    before, state, named = kinds(model), model.state_dict(), dict(model.named_parameters())
    adapters = Adapters(model)
    adapters.add("a", make_adapter(model, 1))
    adapters.add("b", make_adapter(model, 2, names=("attn.v_proj",)))
    assert kinds(model) != before
    assert [*model.state_dict()] == [*state]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(parameter is named[name] for name, parameter in model.named_parameters())
    assert len(named) == len(dict(model.named_parameters()))
    assert all(isinstance(model.get_submodule(name), kind) for name, kind in before.items())
    hf_state(model)
    adapters.unload("a")
    adapted = {name for name, kind in kinds(model).items() if kind is not before[name]}
    assert adapted == {f"layers.{i}.attn.{leaf}" for i in (0, 1) for leaf in ("q_proj", "v_proj")}  # q decides for v
    adapters.unload("b")
    assert kinds(model) == before
    assert adapters.nbytes == 0
    assert "stack" not in vars(model.layers[0].attn.q_proj)


def test_a_copy_of_an_adapted_model_computes_the_same():
    model = random_model()
    adapters = Adapters(model)
    adapters.add("a", make_adapter(model, 1))
    found = answers(adapters, ["a"] * 6)
    for one, other in zip(forward(copy.deepcopy(model), PROMPTS), found, strict=True):
        assert torch.equal(one, other)


def test_another_adapter_under_the_same_name(tmp_path):
    model = random_model()
    adapters = Adapters(model)
    for seed in (1, 2):
        save_adapter(make_adapter(model, seed), tmp_path / f"{seed}")
    adapters.load("poet", tmp_path / "1")
    first, digest = answers(adapters, ["poet"] * 6), adapters.digest("poet")
    with pytest.raises(PunaError, match="'poet' is loaded"):
        adapters.load("poet", tmp_path / "2")
    adapters.unload("poet")
    adapters.load("poet", tmp_path / "2")
    assert adapters.digest("poet") != digest
    assert (answers(adapters, ["poet"] * 6)[0] - first[0]).abs().max() > 0.1
    adapters.unload("poet")
    adapters.load("poet", tmp_path / "1")
    assert adapters.digest("poet") == digest
    assert all(torch.equal(a, b) for a, b in zip(answers(adapters, ["poet"] * 6), first, strict=True))
    assert adapters.digest(None) == b""


def test_names_and_capacity():
    model = random_model()
    adapters = Adapters(model, capacity=2)
    with pytest.raises(PunaError, match="no adapter is called 'poet'") as caught:
        adapters.slot("poet")
    assert caught.value.hint == "loaded: none"
    adapters.add("poet", make_adapter(model, 1))
    adapters.add("lawyer", make_adapter(model, 2))
    for ask in (adapters.slot, adapters.digest, adapters.unload):
        with pytest.raises(PunaError, match="'peot'; did you mean 'poet'") as caught:
            ask("peot")
        assert caught.value.hint == "loaded: poet, lawyer"
    with pytest.raises(PunaError, match="2 adapters are loaded, and no more than 2 may be"):
        adapters.add("third", make_adapter(model, 3))
    assert adapters.names == ("poet", "lawyer")
    expected = answers(adapters, ["lawyer"] * 6)
    answers(adapters, ["poet"] * 6)
    adapters.unload("poet")
    adapters.add("third", make_adapter(model, 3))  # in the poet's slot
    for one, plain in zip(forward(model, PROMPTS), forward(random_model(), PROMPTS), strict=True):
        assert torch.equal(one, plain)  # what was said of the poet's rows is forgotten
    assert (adapters.slot(None), {adapters.slot("third"), adapters.slot("lawyer")}) == (0, {1, 2})
    assert all(torch.equal(a, b) for a, b in zip(answers(adapters, ["lawyer"] * 6), expected, strict=True))
    for unknown in ([3], torch.tensor([0, 3]), np.array([3, 1])):
        with pytest.raises(AssertionError, match="slots"):
            adapters.rows(unknown)


def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path):
    model = random_model()
    adapters = Adapters(model)
    before = kinds(model)
    good = make_adapter(model, 1).deltas
    narrow = Delta(torch.ones(2, 64), torch.ones(128, 2), 1.0)
    for name, says in (("layers.0.attn.q_proj", r"is \[128, 64\], the model's \[128, 128\]"), ("layers.7.mlp.up_proj", "missing"),
                       ("norm", "RMSNorm")):  # fmt: skip
        with pytest.raises(PunaError, match=says):
            adapters.add("bad", Adapter.of(good | {name: narrow}))
    with pytest.raises(PunaError, match="no adapter folder"):
        adapters.load("bad", tmp_path / "nothing")
    assert (adapters.names, adapters.nbytes, kinds(model)) == ((), 0, before)


def test_when_memory_ends_nothing_of_it_stays(monkeypatch):
    model = random_model()
    adapters = Adapters(model)
    adapters.add("a", make_adapter(model, 1))
    expected, put, left = answers(adapters, ["a"] * 6), "puna.engine.adapters.LowRankStack.put", [5]
    from puna.ops.grouped import LowRankStack

    real = LowRankStack.put

    def fails_at_last(self, *parts):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("not enough memory")
        real(self, *parts)

    monkeypatch.setattr(put, fails_at_last)
    with pytest.raises(RuntimeError, match="memory"):
        adapters.add("b", make_adapter(model, 2))
    monkeypatch.setattr(put, real)
    assert adapters.names == ("a",)
    adapters.add("c", make_adapter(model, 3, names=("attn.o_proj",)))
    assert all(torch.equal(a, b) for a, b in zip(answers(adapters, ["a"] * 6), expected, strict=True))
    only_o = Adapters(random_model())
    only_o.add("c", make_adapter(model, 3, names=("attn.o_proj",)))
    for mine, alone in zip(answers(adapters, ["c"] * 6), answers(only_o, ["c"] * 6), strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-5, atol=1e-4)


def test_in_the_engine_an_adapters_cache_is_never_anothers():
    """The same prompt with two adapters and none, in one batch, and once more when its pages are cached."""
    model, prompt, params = random_model(), [*range(30, 70)], SamplingParams(temperature=0, max_tokens=8, logprobs=1)
    made = {"a": make_adapter(model, 1), "b": make_adapter(model, 2, rank=9, names=("attn.v_proj", "mlp.up_proj"))}
    expected = {}
    for name in (None, *made):
        merged = random_model()
        for layer, delta in made[name].deltas.items() if name else ():
            merged.get_submodule(layer).weight.data += delta.weight()
        (expected[name],) = LLM.of(merged, None).generate([prompt], params)
    assert len({tuple(output.token_ids) for output in expected.values()}) == 3
    engine = LLM.of(model, None, max_num_seqs=8).engine
    for name, adapter in made.items():
        engine.adapters.add(name, adapter)
    for names in ((None, "a", "b", None, "b"), ("b", "a", None), ("a",)):
        wanted = {engine.add(prompt, params, adapter=name): expected[name] for name in names}
        outputs = {}
        while len(outputs) < len(wanted):
            outputs |= {part.request_id: part.output for part in engine.step() if part.output.finish_reason}
        for request, output in outputs.items():
            assert output.token_ids == wanted[request].token_ids
            assert output.logprobs == pytest.approx(wanted[request].logprobs, abs=1e-5)
    with pytest.raises(PunaError, match="no adapter is called 'c'"):
        engine.add(prompt, params, adapter="c")
