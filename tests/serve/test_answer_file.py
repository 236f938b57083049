"""A file of prompts to a file of answers: order, ids, errors of single lines, going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import puna
from puna.base.console import PunaError
from puna.engine.request import SamplingParams
from puna.serve.answer_file import Job, answer_file

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path) -> Path:
    rows = [{"prompt": f"def alpha{'_beta' * (i % 4)}", "id": f"p{i}"} for i in range(9)]
    rows[3] = {"prompt_ids": [5, 6, 7], "max_tokens": 3, "logprobs": 1}
    rows[5] = {"prompt": "class", "n": 2, "temperature": 1.0, "seed": 4}
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_answers_come_in_the_order_of_the_prompts(model_folder, prompts, tmp_path) -> None:
    llm, out = puna.LLM(model_folder, max_num_seqs=2), tmp_path / "deep" / "out.jsonl"
    report = answer_file(llm, None, Job(prompts, out, PARAMS, "m"))
    found = lines_of(out)
    assert [row["line"] for row in found] == list(range(1, 10))
    assert found[0]["id"] == "p0"
    assert found[1]["outputs"][0]["token_ids"] == llm.generate("def alpha_beta", PARAMS)[0].token_ids
    assert len(found[3]["outputs"][0]["logprobs"]) == 3
    assert len(found[5]["outputs"]) == 2
    assert report["lines"] == 9
    assert report["failed"] == 0
    assert report["completion_tokens"] == sum(len(o["token_ids"]) for row in found for o in row["outputs"])
    assert os.listdir(out.parent) == ["out.jsonl"]
    with pytest.raises(PunaError, match="exists"):
        answer_file(llm, None, Job(prompts, out, PARAMS, "m"))


def test_a_line_that_cannot_be_answered_says_so_and_the_others_are(model_folder, tmp_path) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    bad = [{"prompt_ids": [9999]}, {"prompt_ids": [1] * 600}, {"prompt_ids": []}, {"messages": [{"role": "user"}]},
           {"prompt": "a", "temperature": -1}, {"prompt": "a", "max_tokens": "x"}, {"prompt": "a", "adapter": "no"}]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in [*bad, {"prompt": "def"}]))
    report = answer_file(puna.LLM(model_folder), None, Job(path, out, PARAMS, "m"))
    found = lines_of(out)
    assert report["failed"] == len(bad)
    assert all("error" in row for row in found[:-1])
    assert "600 tokens" in found[1]["error"]
    assert len(found[-1]["outputs"][0]["token_ids"]) == 6


@pytest.mark.parametrize(("text", "match"), [
    ("", "has no prompts"), ("{", "1 is no JSON"), ('{"x": 1}', "no prompt"), ('{"prompt": 3}', ":1 has prompt"),
    ('{"prompt": "a", "prompt_ids": [1]}', "prompt and prompt_ids"), ('{"prompt": "a", "tempt": 1}', "unknown field 'tempt'"),
])  # fmt: skip
def test_a_file_with_a_broken_line_is_refused_before_anything_runs(model_folder, tmp_path, text, match) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(PunaError, match=match):
        answer_file(puna.LLM(model_folder), None, Job(path, tmp_path / "o", PARAMS, "m"))
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_an_interrupted_run_goes_on_where_it_was(model_folder, prompts, tmp_path, monkeypatch) -> None:
    llm, out, whole = puna.LLM(model_folder, max_num_seqs=1), tmp_path / "o.jsonl", tmp_path / "whole.jsonl"
    answer_file(llm, None, Job(prompts, whole, PARAMS, "m"))
    step, calls = llm.engine.step, []

    def dies():
        calls.append(None)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        answer_file(llm, None, Job(prompts, out, PARAMS, "m"))
    part = out.with_name("o.jsonl.part")
    done = len(lines_of(part)) - 1
    assert 0 < done < 9
    with open(part, "a") as file:
        file.write('{"line": 7, "outp')  # a kill in the middle of a write
    with pytest.raises(PunaError, match="another job"):
        answer_file(puna.LLM(model_folder), None, Job(prompts, out, SamplingParams(), "m"))
    report = answer_file(puna.LLM(model_folder), None, Job(prompts, out, PARAMS, "m"))
    assert report["resumed"] == done
    assert out.read_text() == whole.read_text()
    assert not part.exists()


def test_the_command_survives_a_kill(model_folder, tmp_path) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    path.write_text("\n".join(json.dumps({"prompt_ids": [i % 300, 1, 2]}) for i in range(60)))
    command = [sys.executable, "-m", "puna", "generate", str(model_folder), "--prompts", str(path), "--out", str(out),
               "--temperature", "0", "--max-tokens", "40", "--ignore-eos", "--max-num-seqs", "2", "--json"]  # fmt: skip
    part = tmp_path / "o.jsonl.part"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if part.exists() and part.read_bytes().count(b"\n") > 3:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    second = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr
    report = json.loads(second.stdout.splitlines()[-1])
    assert report["resumed"] >= 3
    assert report["lines"] == 60
    assert [row["line"] for row in lines_of(out)] == list(range(1, 61))
