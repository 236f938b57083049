"""ops/paged: any mixture of chunks and new tokens equals plain attention in fp64, and the kernel gives the same bits always."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from puna.base.console import PunaError
from puna.ops.attention import PackedCausal, RoundedKV, causal_mask
from puna.ops.formats.kv import KV_FLOAT8, KV_FLOAT8_HEAD, KV_INT8, KV_INT8_HEAD, KVScales
from puna.ops.native import library
from puna.ops.native import paged as native
from puna.ops.paged import NULL_PAGE, PagedCausal, Pages

SCHEMES = {"int8": KV_INT8, "int8_head": KV_INT8_HEAD, "float8": KV_FLOAT8, "float8_head": KV_FLOAT8_HEAD}
NUMBERS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHES = [*NUMBERS, *SCHEMES]
LAYERS = 2
FEW = 3  # in paged.cpp: a single new token with no more query heads to a kv head is computed in another way


@pytest.fixture(autouse=True, scope="module")
def kernel():
    """The kernel must be there wherever it could have been built."""
    if not library.available():
        if os.environ.get("PUNA_NATIVE") == "0" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no native kernels here: " + library.load().reason)
        pytest.fail(f"a C++ compiler is here, but the native kernels are {library.load().reason}: pip install -e .")


@pytest.fixture(params=["baseline", "AVX2", "AVX-512", "torch"])
def path(request, monkeypatch):
    """Each way of computing; the name of the one."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_native", library.load()._replace(kernels=None))
        return request.param
    level = library.LEVELS.index(request.param)
    if level > library.load().level:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(native, "_native", library.load()._replace(level=level))
    return request.param


def scales_of(cache: str, groups: int) -> KVScales | None:
    if cache in NUMBERS:
        return None
    numbers = [0.02 + 0.01 * n for n in range(groups if cache.endswith("head") else 1)]
    layers = tuple(torch.tensor(numbers) * (1 + layer) for layer in range(LAYERS))
    return KVScales(SCHEMES[cache], layers, tuple(1.3 * scale for scale in layers))


class Scene:
    """Sequences of random keys and values (`before` positions known, `count` new), in pages full of nan."""

    def __init__(self, sizes, heads=4, groups=2, width=32, page_size=16, cache="float32", dtype=torch.float32, seed=0):
        generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
        self.sizes, self.groups, self.cache = sizes, groups, cache
        self.q, self.k, self.v = (
            [torch.randn(before + count, n, width, generator=generator).to(dtype) for before, count in sizes]
            for n in (heads, groups, groups)
        )
        each = [-(-(before + count) // page_size) for before, count in sizes]
        ids = list(range(1, 2 * sum(each) + 2))
        order.shuffle(ids)
        self.tables = [[ids.pop() for _ in range(count)] for count in each]
        self.scales = scales_of(cache, groups)
        self.pages = Pages.of(
            LAYERS, groups, width, 2 * sum(each) + 2, page_size, NUMBERS.get(cache, torch.int8), scales=self.scales
        )
        for part in (self.pages.keys, self.pages.values):
            part[:, 1:].view(torch.uint8).fill_(0x7F if self.scales else 0xFF)  # the largest code, or nan

    def attend(self, layer=1, window=None, new=None) -> list[torch.Tensor]:
        """What the new tokens of each sequence see, the earlier ones written before; all in one call."""
        for before, *sequence in zip([b for b, _ in self.sizes], self.tables, self.k, self.v, strict=True):
            table, k, v = sequence
            slots = PagedCausal.of(self.pages, [(table, 0, before)], before).slots_T
            self.pages.write(layer, slots, k[:before], v[:before])
        attend = PagedCausal.of(
            self.pages,
            [(table, *size) for table, size in zip(self.tables, self.sizes, strict=True)],
            max(before + count for before, count in self.sizes),
        )
        rows = [torch.cat([x[before:] for x, (before, _) in zip(part, self.sizes, strict=True)]) for part in self.parts]
        return list(attend(layer, *rows, window).split([count for _, count in self.sizes]))

    @property
    def parts(self):
        return self.q, self.k, self.v

    def exact(self, layer=1, window=None) -> list[torch.Tensor]:
        """The same in fp64 from the keys and values themselves, as the cache rounds them."""
        outputs = []
        for (before, count), q, k, v in zip(self.sizes, *self.parts, strict=True):
            if self.scales:
                k, v = self.scales.round(layer, k.float(), v.float())
            else:
                k, v = k.to(self.pages.keys.dtype), v.to(self.pages.keys.dtype)
            repeat = q.shape[1] // self.groups
            k_HNK, v_HNK = (x.double().repeat_interleave(repeat, 1).transpose(0, 1) for x in (k, v))
            scores = q[before:].double().transpose(0, 1) @ k_HNK.transpose(1, 2) * q.shape[2] ** -0.5
            mask = causal_mask(count, before + count, window, q.device)
            outputs.append((scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v_HNK).transpose(0, 1))
        return outputs


def assert_exact(scene, window=None, bound=3e-6, layer=1):
    for out, expected in zip(scene.attend(layer, window), scene.exact(layer, window), strict=True):
        assert out.shape == expected.shape
        assert (out.double() - expected).abs().max() <= bound * expected.abs().max().clamp(min=1)  # false for nan, too


MIXED = [(0, 5), (70, 1), (3, 1), (511, 1), (500, 40), (1100, 3), (0, 1), (64, 64)]


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache(path, cache):
    assert_exact(Scene(MIXED, cache=cache))
    assert_exact(Scene(MIXED, cache=cache, width=80, heads=6, groups=1, page_size=8), window=37, layer=0)


@pytest.mark.parametrize(
    ("heads", "groups", "width"),
    [(1, 1, 16), (3, 3, 20), (8, 1, 128), (71, 1, 64), (12, 4, 96), (10, 2, 80), (2, 2, 7)],
)
def test_every_shape(path, heads, groups, width):
    for page_size, window in ((1, None), (8, 100), (16, 1), (64, 513)):
        scene = Scene([(9, 4), (77, 1), (600, 30)], heads, groups, width, page_size, seed=width)
        assert_exact(scene, window)


def test_one_long_chunk_of_many_tasks(path):
    assert_exact(Scene([(30, 1100)], heads=4, groups=1, width=16))
    assert_exact(Scene([(30, 700)], heads=2, groups=2, width=16), window=64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 90)), min_size=1, max_size=5),
    groups=st.integers(1, 3),
    sharing=st.integers(1, 5),
    width=st.sampled_from([16, 24, 48, 64]),
    page_size=st.sampled_from([1, 8, 16, 64]),
    cache=st.sampled_from(CACHES),
    window=st.none() | st.integers(1, 800),
    seed=st.integers(0, 9),
)
def test_any_mixture(sizes, groups, sharing, width, page_size, cache, window, seed):
    assert_exact(Scene(sizes, groups * sharing, groups, width, page_size, cache, seed=seed), window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", ["bfloat16", "float16", "int8_head", "float8"])
def test_short_queries_are_rounded_once(path, dtype, cache):
    scene = Scene(MIXED, cache=cache, dtype=dtype)
    for out, expected in zip(scene.attend(), scene.exact(), strict=True):
        assert out.dtype is dtype
        if path == "torch":
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
        else:
            bound = torch.finfo(dtype).eps / 2 * expected.abs() + 3e-6
            assert ((out.double() - expected).abs() <= bound).all()


def test_one_chunk_is_packed_attention(path):
    q, k, v = (torch.randn(600, n, 64, generator=torch.Generator().manual_seed(3)) for n in (4, 2, 2))
    for window in (None, 100):
        pages = Pages.of(1, 2, 64, 40)
        paged = PagedCausal.of(pages, [(range(1, 39), 0, 600)], 600)(0, q, k, v, window)
        torch.testing.assert_close(paged, PackedCausal.of([600])(0, q, k, v, window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("cache", ["int8", "float8_head"])
def test_codes_count_as_the_trainers_rounding_says(path, cache):
    scene = Scene([(100, 1)], cache=cache)
    q, k, v = (part[0] for part in scene.parts)
    rounded = RoundedKV(PackedCausal.of([101]), scene.scales)(1, q, k, v, None)
    torch.testing.assert_close(scene.attend()[0], rounded[100:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", CACHES)
def test_rows_are_written_as_torch_rounds(cache, dtype):
    """Ties, the smallest and the largest numbers, and what lies outside, in every cache; other rows stay as they were."""
    powers = torch.cat([2.0 ** torch.arange(-30, 12), torch.arange(1, 23) / 16])
    row = torch.cat([powers, -powers, powers * 1.0625, powers * 1.09375, torch.zeros(4), torch.rand(60) * 40])
    row = torch.cat([row, torch.tensor([65519.0, 65520.0, 1e9, -1e9])]) if dtype is not torch.float16 else row
    k = torch.stack([row, row.flip(0)])[None].to(dtype)
    pages = [
        Pages.of(LAYERS, 2, k.shape[2], 4, 4, NUMBERS.get(cache, torch.int8), scales=scales_of(cache, 2))
        for _ in range(2)
    ]
    for part in pages:
        for tensor in (part.keys, part.values):
            tensor.view(torch.uint8).fill_(1)
    PagedCausal.of(pages[0], [([3], 1, 1)], 2)(1, k[:, [0, 1, 0, 1]], k, -k, None)
    pages[1].write(1, torch.tensor([3 * 4 + 1]), k, -k)
    for kernel, torchs in ((pages[0].keys, pages[1].keys), (pages[0].values, pages[1].values)):
        assert torch.equal(kernel.view(torch.uint8), torchs.view(torch.uint8))


class TestSameBits:
    """On the native path a row's numbers do not depend on anything but the row, what it sees, and if it comes alone."""

    @pytest.fixture(autouse=True)
    def native_only(self, path):
        if path == "torch":
            pytest.skip("torch's attention is the same up to rounding only")

    @pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8_head"])
    @pytest.mark.parametrize(("heads", "groups", "window"), [(8, 1, None), (3, 3, None), (4, 2, 700)])
    def test_in_pieces_and_alone(self, cache, heads, groups, window):
        """A prompt at once; in pieces of every kind; and its last tokens one by one between other sequences."""
        whole = Scene([(0, 1300)], heads, groups, cache=cache)
        expected = whole.attend(window=window)[0]
        for before, count in ((0, 1), (1, 7), (8, 500), (508, 8), (1024, 276), (1299, 1)):
            piece = self.like(whole, [(before, count)], page_size=8 if count == 500 else 16)
            self.assert_same(piece.attend(window=window)[0], expected[before : before + count], heads // groups)
        mixed = self.like(whole, [(40, 3), (1299, 1), (600, 1), (0, 100)])
        for out, (before, count) in zip(mixed.attend(window=window), mixed.sizes, strict=True):
            self.assert_same(out, expected[before : before + count], heads // groups)

    @pytest.mark.parametrize("heads", [2, 3, 5])
    def test_in_any_company(self, heads):
        """Tiles of rows and tasks of every size: how a task is cut depends on what else is in the batch."""
        whole, draws = Scene([(0, 700)], heads, 1, 16), random.Random(heads)
        expected = whole.attend()[0]
        for _ in range(12):
            firsts = [draws.choice([draws.randrange(700), draws.randrange(80)]) for _ in range(draws.randint(1, 6))]
            sizes = [(first, draws.randint(1, min(150, 700 - first))) for first in firsts]
            for out, (before, count) in zip(self.like(whole, sizes).attend(), sizes, strict=True):
                self.assert_same(out, expected[before : before + count], heads)

    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize(
        ("heads", "groups", "width", "window"), [(2, 2, 64, None), (4, 2, 80, 300), (3, 1, 7, None)]
    )
    def test_single_tokens_in_any_company(self, cache, heads, groups, width, window):
        """The last tokens of one sequence, each alone; then all in one batch between pieces, in pages of other sizes."""
        whole = Scene([(0, 1100)], heads, groups, width, cache=cache)
        places = [0, 1, 63, 64, 511, 512, 1024, 1099]
        alone = [self.like(whole, [(before, 1)]).attend(window=window)[0] for before in places]
        sizes = [size for before in places for size in ((before, 1), (before // 2, 2 + before // 30))]
        for page_size in (1, 8, 64):
            outs = self.like(whole, sizes, page_size).attend(window=window)
            for before, out, expected in zip(places, outs[::2], alone, strict=True):
                assert torch.equal(out, expected), (before, page_size)

    def test_a_piece_is_one_whatever_tasks_it_is_cut_into(self):
        """33 tokens are a task of 32 and one of a single token when nothing else is there, and one task in company."""
        whole = Scene([(0, 900)], 2, 1, 16)
        (alone,) = self.like(whole, [(40, 33)]).attend()
        assert torch.equal(self.like(whole, [(40, 33), (0, 900)]).attend()[0], alone)
        assert torch.equal(self.like(whole, [(40, 34)]).attend()[0][:33], alone)

    def test_any_number_of_threads(self):
        """One long sequence: with more threads its positions are divided between them."""
        threads = torch.get_num_threads()
        scenes = [Scene([(3000, count)], 4, 2, cache="bfloat16") for count in (1, 5, 100)]
        try:
            torch.set_num_threads(1)
            alone = [scene.attend()[0] for scene in scenes]
            torch.set_num_threads(3)
            assert all(torch.equal(scene.attend()[0], out) for scene, out in zip(scenes, alone, strict=True))
        finally:
            torch.set_num_threads(threads)

    @staticmethod
    def assert_same(out, expected, sharing: int) -> None:
        """Bit for bit, but for a token that came alone: `expected` is of a piece."""
        if len(out) > 1 or sharing > FEW:
            assert torch.equal(out, expected)
        else:
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)

    @staticmethod
    def like(scene: Scene, sizes, page_size=16) -> Scene:
        """The beginnings of the scene's only sequence as sequences of their own, on other pages."""
        heads, groups, width = scene.q[0].shape[1], scene.groups, scene.q[0].shape[2]
        other = Scene(sizes, heads, groups, width, page_size, scene.cache, seed=5)
        other.q, other.k, other.v = ([part[0][: sum(size)] for size in sizes] for part in scene.parts)
        return other


def test_pages_behind_a_window_may_be_gone(path):
    scene = Scene([(200, 3), (90, 1)], page_size=8)
    expected = scene.exact(window=50)
    outs = scene.attend(window=50)
    for table, (before, _) in zip(scene.tables, scene.sizes, strict=True):
        table[: (before - 49) // 8] = [NULL_PAGE] * ((before - 49) // 8)
    scene.pages.keys[:, NULL_PAGE] = scene.pages.values[:, NULL_PAGE] = (
        torch.nan
    )  # padded rows of a graph are written here
    attend = PagedCausal.of(scene.pages, [(t, *s) for t, s in zip(scene.tables, scene.sizes, strict=True)], 203)
    rows = [torch.cat([x[before:] for x, (before, _) in zip(part, scene.sizes, strict=True)]) for part in scene.parts]
    again = attend(1, *rows, 50).split([3, 1])
    for out, first, exact in zip(again, outs, expected, strict=True):
        assert torch.equal(out, first)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=3e-6)


def test_rows_may_lie_apart(path):
    """Queries, keys and values as parts of one projection."""
    scene = Scene([(40, 2), (7, 1)])
    expected = scene.attend()
    joined = [torch.cat([q, k, v], 1) for q, k, v in zip(*scene.parts, strict=True)]
    scene.q, scene.k, scene.v = ([x.split([4, 2, 2], 1)[n] for x in joined] for n in range(3))
    new = torch.cat([x[before:] for x, (before, _) in zip(joined, scene.sizes, strict=True)]).split([4, 2, 2], 1)
    attend = PagedCausal.of(scene.pages, [(t, *s) for t, s in zip(scene.tables, scene.sizes, strict=True)], 42)
    assert not new[0].is_contiguous()
    assert torch.equal(attend(1, *new, None), torch.cat(expected))


def test_no_tokens(path):
    pages = Pages.of(1, 2, 16, 2)
    nothing = torch.empty(0, 2, 16)
    assert PagedCausal.of(pages, [], 0)(0, nothing, nothing, nothing, None).shape == (0, 2, 16)


def test_the_kernel_steps_aside():
    q, pages = torch.randn(1, 2, 16), Pages.of(1, 2, 16, 2)
    assert native.serves(q, q, q, pages.keys)
    assert not native.serves(q.double(), q.double(), q.double(), pages.keys)
    assert not native.serves(q, q.bfloat16(), q, pages.keys)
    assert not native.serves(q.requires_grad_(), q, q, pages.keys)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert not native.serves(q, q, q, pages.keys)


class TestPages:
    def test_one_allocation_and_its_size(self):
        pages = Pages.of(3, 2, 8, 5, 4, torch.bfloat16)
        assert pages.keys.untyped_storage().data_ptr() == pages.values.untyped_storage().data_ptr()
        assert (pages.num_pages, pages.page_size, pages.bytes_per_token) == (5, 4, 2 * 3 * 2 * 8 * 2)
        assert pages.keys.shape == (3, 5, 2, 4, 8)
        assert not pages.keys[:, NULL_PAGE].any()

    def test_copy(self):
        pages = Pages.of(2, 1, 4, 4, 2)
        pages.keys.normal_()
        pages.values.normal_()
        before = pages.keys.clone()
        pages.copy(1, 3)
        assert torch.equal(pages.keys[:, 3], before[:, 1])
        assert torch.equal(pages.values[:, 3], pages.values[:, 1])
        assert torch.equal(pages.keys[:, :3], before[:, :3])

    def test_scales_of_another_model(self):
        with pytest.raises(PunaError, match="scales for 2 layers, the model has 3 of 2"):
            Pages.of(3, 2, 8, 5, scales=scales_of("int8", 2))
        with pytest.raises(PunaError, match="2 layers of 4 heads, the model has 2 of 2"):
            Pages.of(2, 2, 8, 5, scales=scales_of("int8_head", 4))
