"""Recipes over shard folders: what is read, in which shares, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.base.config import build
from puna.base.console import PunaError
from puna.data.decompose import kept_tokens
from puna.data.shards import Shard
from puna.text.tokenizer import Tokenizer
from puna.train.loop import Trainer, train
from puna.train.metrics import WaitReport, read_rows
from puna.train.recipe import Recipe
from puna.train.sources import open_sources
from shard_folders import upload, write_folder


def make(
    folder: Path, tokenizer: Tokenizer, seed: int, shards: int = 2, tags: bool = False, longest: int = 120
) -> Path:
    """Documents `bos ids eos` of a sequence a model can learn: each id is the one before plus a step."""
    draw, made = np.random.default_rng(seed), []
    for _ in range(shards):
        rows = []
        for length in draw.integers(8, longest, 60):
            ids = 10 + (draw.integers(0, 300) + (seed + 1) * np.arange(length)) % 300
            rows.append(np.concatenate(([tokenizer.bos_id], ids, tokenizer.eos_ids[:1])).astype(np.uint16))
        starts = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
        made.append(Shard(np.concatenate(rows), starts, np.full(len(rows), 2, np.uint16) if tags else None))
    return write_folder(folder, made, tokenizer.vocab_hash, tokenizer.vocab_size)


@pytest.fixture
def web_and_code(recipe, tokenizer, tmp_path) -> dict[str, Any]:
    """The toy recipe over two shard folders, both with documents held out."""
    for number, name in enumerate(("web", "code")):
        make(tmp_path / name, tokenizer, number)
        make(tmp_path / name / "validation", tokenizer, 10 + number, shards=1)
    data = {key: value for key, value in recipe["data"].items() if key not in ("text", "val_fraction")}
    return recipe | {"data": data | {"shards": [str(tmp_path / "web"), str(tmp_path / "code")]}}


def recipe_with(tables: dict[str, Any], **data: Any) -> dict[str, Any]:
    return tables | {"data": tables["data"] | data}


def ids(trainer: Trainer, steps: range) -> list[int]:
    return [i for step in steps for batch in trainer.loader.make(step)[0] for i in batch.tokens_T.tolist()]


@pytest.mark.parametrize(
    "packing",
    [
        {},
        {"packing": "best_fit"},
        {"packing": "decompose", "shortest": 8, "curriculum": "short_to_long"},
        {"cross_documents": True},
    ],
)
def test_a_run_over_two_sources_learns_both(web_and_code, packing, capsys) -> None:
    result = train(recipe_with(web_and_code, weights=[0.75, 0.25], **packing))
    rows = list(read_rows(Path(result["metrics"])))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    last = rows[-1]
    assert {"val_loss/web", "val_loss/code", "val_loss", "val_bits_per_byte"} <= last.keys()
    low, high = sorted((last["val_loss/web"], last["val_loss/code"]))
    assert low < last["val_loss"] < high
    assert result["epochs"]["web"] > 2 * result["epochs"]["code"] > 0
    assert all(row["data_ms"] >= 0 for row in rows)
    shown = capsys.readouterr().err
    assert "web: " in shown
    assert "held out  web" in shown


def test_decomposed_sources_keep_their_weights_whatever_their_lengths(web_and_code, tokenizer, tmp_path) -> None:
    """One source of long documents, one of short ones, 0.6 to 0.4 of all tokens and within each length as it comes."""
    make(tmp_path / "short", tokenizer, 6, longest=24)
    shards = [str(tmp_path / "web"), str(tmp_path / "short")]
    made = recipe_with(web_and_code, shards=shards, weights=[0.6, 0.4], packing="decompose", shortest=8)
    recipe = build(Recipe, made, {"train.steps": 400})
    sources = open_sources(recipe, Tokenizer.load(recipe.data.tokenizer))
    kept = [
        sum(kept_tokens(info.bits, recipe.data.seq_len, 8) for info in reader.manifest.shards)
        for reader in sources.readers
    ]
    tokens = [epochs * n for epochs, n in zip(sources.epochs(400).values(), kept, strict=True)]
    assert sum(tokens) == pytest.approx(400 * 4 * 32)
    assert tokens[0] / sum(tokens) == pytest.approx(0.6, abs=0.005)
    stream = sources.stream
    for number, epochs in enumerate(sources.epochs(400).values()):  # all lengths of a source are gone through alike
        for width, lanes in stream.lanes.items():
            if lane := lanes[number]:
                served = stream.mixtures[width].counts(stream._served(width, 1600))[number]
                assert served / lane.order.total == pytest.approx(epochs, rel=0.1)


def test_validation_looks_at_as_many_tokens_as_it_may(web_and_code) -> None:
    trainer = Trainer(build(Recipe, web_and_code, {"validation.max_tokens": 1024}))
    seen: list[int] = []
    real = trainer.compute.loss
    trainer.compute.loss = lambda batch: seen.append(len(batch.tokens_T)) or real(batch)  # type: ignore[method-assign]
    trainer.validate()
    assert sum(seen) == 1024


def test_nothing_held_out_is_said_and_no_error(web_and_code, tokenizer, tmp_path, capsys) -> None:
    make(tmp_path / "plain", tokenizer, 5)
    result = train(recipe_with(web_and_code, shards=[str(tmp_path / "plain")]), {"train.steps": 2})
    assert result["val_bits_per_byte"] is None
    assert "nothing is held out" in capsys.readouterr().err


def test_a_schedule_changes_the_mixture_at_its_step(web_and_code) -> None:
    trainer = Trainer(build(Recipe, recipe_with(web_and_code, weights=[1, 0], schedule=["3: 0 1"])))
    web, code = (Trainer(build(Recipe, recipe_with(web_and_code, weights=w))) for w in ([1, 0], [0, 1]))
    assert ids(trainer, range(3)) == ids(web, range(3))
    assert ids(trainer, range(3, 6)) == ids(code, range(3))


def test_a_schedule_may_grow_behind_a_save_but_the_past_is_fixed(web_and_code) -> None:
    first = recipe_with(web_and_code, weights=[0.5, 0.5])
    train(first, {"train.steps": 5})
    train(recipe_with(first, schedule=["5: 0.9 0.1"]), {"train.steps": 6})
    with pytest.raises(PunaError, match="schedule"):
        train(recipe_with(first, schedule=["2: 0.9 0.1"]), {"train.steps": 8})
    with pytest.raises(PunaError, match="weights"):
        train(recipe_with(first, weights=[0.6, 0.4]), {"train.steps": 8})
    with pytest.raises(PunaError, match="packing"):
        train(recipe_with(first, packing="best_fit"), {"train.steps": 8})


def test_changed_shards_are_refused_on_resume(web_and_code, tokenizer, tmp_path) -> None:
    train(web_and_code, {"train.steps": 5})
    make(tmp_path / "code", tokenizer, 77)
    with pytest.raises(PunaError, match="trained with other inputs: data"):
        train(web_and_code, {"train.steps": 8})


def test_best_fit_counts_of_odd_lengths_are_kept(web_and_code, tmp_path, monkeypatch) -> None:
    """No figure in the manifest for 48 tokens: the documents are looked at once, then remembered."""
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("puna.data.counts.FEW", 1)
    recipe = build(Recipe, recipe_with(web_and_code, packing="best_fit", seq_len=48))
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    first = open_sources(recipe, tokenizer).stream.batch(0, 4)
    kept = sorted((tmp_path / "cache" / "counts").iterdir())
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    assert open_sources(recipe, tokenizer).stream.batch(0, 4).tokens_T.equal(first.tokens_T)
    assert [path.stat().st_mtime_ns for path in kept] == times
    kept[0].write_text("[1,")  # damaged: counted anew
    assert open_sources(recipe, tokenizer).stream.batch(0, 4).tokens_T.equal(first.tokens_T)


def test_tags_are_masked_unless_asked_otherwise(web_and_code, tokenizer, tmp_path) -> None:
    make(tmp_path / "tagged", tokenizer, 3, tags=True)
    made = recipe_with(web_and_code, shards=[str(tmp_path / "tagged")], packing="best_fit")
    masked, scored = (
        Trainer(build(Recipe, recipe_with(made, mask_tags=mask))).loader.make(0)[0][0] for mask in (True, False)
    )
    assert masked.tokens_T.equal(scored.tokens_T)
    starts = int((masked.tokens_T == tokenizer.bos_id).sum())
    assert scored.valid - masked.valid == 2 * starts > 0


def test_shards_in_a_bucket_train_alike(web_and_code, s3_bucket, tmp_path) -> None:
    local = ids(Trainer(build(Recipe, web_and_code)), range(6))
    urls = [upload(tmp_path / name, f"{s3_bucket}/{name}") for name in ("web", "code")]
    far = recipe_with(web_and_code, shards=urls, cache_dir=str(tmp_path / "cache"))
    result = train(far, {"train.steps": 6})
    assert "val_loss/web" in list(read_rows(Path(result["metrics"])))[-1]
    assert ids(Trainer(build(Recipe, far, {"out": str(tmp_path / "other")})), range(6)) == local


def test_folders_of_one_name_are_told_apart(web_and_code, tokenizer, tmp_path) -> None:
    make(tmp_path / "other" / "web", tokenizer, 4)
    make(tmp_path / "other" / "web" / "validation", tokenizer, 14, shards=1)
    both = recipe_with(web_and_code, shards=[str(tmp_path / "web"), str(tmp_path / "other" / "web")])
    result = train(both, {"train.steps": 2})
    assert set(result["epochs"]) == {"web-0", "web-1"}
    assert {"val_loss/web-0", "val_loss/web-1"} <= list(read_rows(Path(result["metrics"])))[-1].keys()


BAD = {
    "both": ({"text": ["x"]}, "both text and shards"),
    "packing": ({"packing": "tight"}, "data.packing is 'tight'"),
    "weights": ({"weights": [1.0]}, "1 weights for 2 sources"),
    "fim without room": ({"fim_rate": 0.5}, "data.fim_rate is 0.5 and data.packing concat"),
    "fim without markers": ({"fim_rate": 0.5, "packing": "best_fit"}, "fill-in-the-middle marker"),
    "fim rate": ({"fim_rate": 2.0, "packing": "best_fit"}, "data.fim_rate is 2"),
    "decompose": ({"packing": "decompose", "seq_len": 48}, "no power of two"),
    "decompose and cross": ({"packing": "decompose", "cross_documents": True}, "the one rules out the other"),
    "shortest": ({"packing": "decompose", "shortest": 64}, "longer than the longest"),
    "curriculum": ({"packing": "decompose", "shortest": 8, "curriculum": "random"}, "no curriculum 'random'"),
    "schedule": ({"schedule": ["soon: 1 1"]}, "data.schedule has 'soon: 1 1'"),
    "missing": ({"shards": ["nowhere"]}, "nowhere does not exist"),
    "too long": ({"seq_len": 100_000}, "one sequence needs 100000 of one shard"),
    "cache": ({"cache_gib": 0.0}, "data.cache_gib is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused(web_and_code, case) -> None:
    data, message = BAD[case]
    with pytest.raises(PunaError, match=message) as error:
        Trainer(build(Recipe, recipe_with(web_and_code, **data))).loader.make(0)
    assert error.value.hint


def test_slow_storage_is_said_once_in_a_while(capsys) -> None:
    report = WaitReport()
    for step in range(300):
        report.add({"ms": 100.0, "data_ms": 30.0 if step > 20 else 1.0})
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2
    assert "storage is slower than the model" in shown[0]
    quiet = WaitReport()
    for _ in range(300):
        quiet.add({"ms": 100.0, "data_ms": 5.0})
    assert not capsys.readouterr().err


def test_slow_storage_shows_in_the_log_of_a_run(web_and_code, fault_proxy, s3_bucket, tmp_path, capsys) -> None:
    far = [upload(tmp_path / name, f"{s3_bucket}/{name}") for name in ("web", "code")]
    fault_proxy.delay = 0.4
    fault_proxy.always("delay")
    result = train(recipe_with(web_and_code, shards=far, cache_dir=str(tmp_path / "cache")))
    assert "storage is slower than the model" in capsys.readouterr().err
    assert next(read_rows(Path(result["metrics"])))["data_ms"] > 400
