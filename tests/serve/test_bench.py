"""`puna bench`: the figures belong together, the reports say whose they are, bad input is refused with numbers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from puna.base.console import PunaError
from puna.engine.options import EngineOptions
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.serve import bench, traffic
from puna.weights.folder import save_model

SMALL = EngineOptions(max_num_seqs=8, max_model_len=256, kv_memory=0.05)


def subject(**changes: object) -> bench.Subject:
    return bench.Subject(**{"model": "preset:debug", "device": "cpu", "options": SMALL, **changes})


def test_decode_counts_tokens_and_bytes() -> None:
    found = bench.decode(subject(), [1, 4], context=20, steps=5, rounds=1)
    spec = Spec.load("preset:debug")
    for row, batch in zip(found["rows"], (1, 4), strict=True):
        assert row["batch"] == batch
        assert row["weight_bytes"] == 4 * (spec.num_params() - spec.group_params()["norms"])  # the tied head is read
        assert row["kv_bytes"] == int(batch * 22.5 * spec.kv_bytes_per_token(4))
        seconds = row["ms_per_step"] / 1e3
        assert row["rate"] * seconds == pytest.approx(batch)  # a token of each sequence in a step
        assert row["bytes_per_second"] == pytest.approx((row["weight_bytes"] + row["kv_bytes"]) / seconds)
        assert row["bandwidth_share"] == pytest.approx(row["bytes_per_second"] / found["bandwidth"])
        assert 0 < row["host_share"] < 1


def test_every_round_begins_with_an_idle_engine(monkeypatch) -> None:
    """Otherwise later rounds would decode for the earlier ones as well."""
    idle: list[bool] = []
    inner = bench._decode_round

    def watched(engine, *given):
        idle.append(not engine.has_work and engine.cache.usage == 0)
        return inner(engine, *given)

    monkeypatch.setattr(bench, "_decode_round", watched)
    found = bench.decode(subject(), [2], context=33, steps=3, rounds=2)
    assert idle == [True] * 3
    assert found["rows"][0]["lowest"] <= found["rows"][0]["rate"] <= found["rows"][0]["highest"]


def test_a_format_packs_linear_layers_but_not_the_head() -> None:
    engine, _ = bench.open_engine(subject(model="preset:debug", quantize="int4_g32"))
    layers = engine.spec.num_hidden_layers * 7
    assert sum(bench.kernels(engine.model).values()) == layers
    plain, _ = bench.open_engine(subject())
    ids = [[3, 1, 4, 1, 5]]
    difference = (engine.runner.documents(ids) - plain.runner.documents(ids)).abs().max()
    assert 0 < difference < 1


def test_the_head_can_be_packed_too() -> None:
    form = "int4_g32,lm_head=int8"
    model = Transformer(Spec.load("preset:debug").replace(tie_word_embeddings=False))
    model.init_weights(torch.Generator().manual_seed(0))
    bench._quantize(model, form)
    assert model.lm_head.bits_per_weight > 8
    assert model.layers[0].mlp.up_proj.bits_per_weight < 5


def test_prefill_leaves_out_what_does_not_fit(capsys) -> None:
    found = bench.prefill(subject(), [16, 300], rounds=1)
    assert [row["tokens"] for row in found["rows"]] == [16]
    assert "left out" in capsys.readouterr().err
    row = found["rows"][0]
    assert row["matmul_share"] == pytest.approx(row["flops"] / found["matmul_flops"])


def test_flops_of_a_prompt_follow_the_training_convention() -> None:
    """A third of the training count, with half the attention, and one row of the head instead of one per token."""
    spec, tokens = Spec.load("preset:debug"), 64
    square = spec.flops_per_token(tokens) - 6 * spec.active_matmul_params()
    head = 2 * spec.vocab_size * spec.hidden_size
    expected = tokens * (spec.flops_per_token(tokens) / 3 - square / 6) - (tokens - 1) * head
    assert bench._prefill_flops(spec, tokens) == pytest.approx(expected)


def test_traffic_answers_everyone_and_counts_every_token() -> None:
    plan = traffic.Traffic(requests=7, concurrency=3, seed=1)
    found = traffic.serve(subject(), plan)
    row, lengths = found["rows"][0], plan.lengths(256)
    assert row["output_tokens"] == sum(output for _, output in lengths)
    assert row["prompt_tokens"] == sum(prompt for prompt, _ in lengths)
    assert row["rate"] == pytest.approx(row["output_tokens"] / row["seconds"])
    assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p90"] <= row["ttft_ms"]["p99"] <= 1e3 * row["seconds"]
    assert 0 < row["host_share"] < 1


def test_traffic_is_seeded_and_fits_the_context() -> None:
    plan = traffic.Traffic(requests=400, scale=0.5, seed=3)
    lengths = plan.lengths(900)
    assert lengths == plan.lengths(900) != traffic.Traffic(requests=400, scale=0.5, seed=4).lengths(900)
    assert all(1 <= prompt < 900 and output >= 1 and prompt + output <= 900 for prompt, output in lengths)
    prompts = sorted(prompt for prompt, _ in traffic.Traffic(requests=4000, scale=1.0).lengths(10**6))
    assert 0.9 < prompts[2000] / 1020 < 1.1


def test_load_compares_with_reading_the_files(tmp_path) -> None:
    model = Transformer(Spec.load("preset:debug"))
    model.init_weights(torch.Generator().manual_seed(0))
    folder = save_model(model, tmp_path / "model")
    found = bench.load(subject(model=str(folder)), rounds=1)
    row = found["rows"][0]
    assert found["file_bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert row["ratio"] == pytest.approx(row["load"] / row["read"])
    assert 0 < row["load"] < row["first_token"]


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda: bench.decode(subject(), [1], 250, 20, 1), "256"),
        (lambda: bench.decode(subject(), [9], 8, 2, 1), "max_num_seqs is 8"),
        (lambda: bench.decode(subject(), [0], 8, 2, 1), "--batch 0"),
        (lambda: bench.prefill(subject(), [400], 1), "256"),
        (lambda: bench.load(subject(), 1), "no files"),
        (lambda: traffic.Traffic(requests=0), "0 requests"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_numbers(call, numbers) -> None:
    with pytest.raises(PunaError, match=numbers) as error:
        call()
    assert error.value.hint


def test_command_line_reports_machine_commit_and_command() -> None:
    words = [
        "bench",
        "decode",
        "preset:debug",
        "--batch",
        "1,2",
        "--context",
        "8",
        "--tokens",
        "2",
        "--rounds",
        "1",
        "--kv-memory",
        "0.05",
        "--json",
    ]
    done = subprocess.run([sys.executable, "-m", "puna", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert {"rows", "machine", "commit", "command", "path", "kernels", "options"} <= set(found)
    assert found["command"].endswith(" ".join(words))
    assert [row["batch"] for row in found["rows"]] == [1, 2]


def test_command_line_shows_a_table_and_refuses_bad_numbers(monkeypatch, capsys) -> None:
    from puna.__main__ import main

    monkeypatch.setattr(
        sys,
        "argv",
        ["puna", "bench", "prefill", "preset:debug", "--lengths", "8", "--rounds", "1", "--kv-memory", "0.05"],
    )
    assert main() == 0
    out = capsys.readouterr().out
    assert "tok/s" in out
    assert "measured" in out
    monkeypatch.setattr(sys, "argv", ["puna", "bench", "decode", "preset:debug", "--batch", "1;8"])
    assert main() == 2
    assert "hint: write it as 1,8,32" in capsys.readouterr().err
