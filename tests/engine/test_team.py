"""Two processes that answer as one: under torchrun, and as workers that a program starts itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import puna
from puna.base.console import PunaError
from puna.engine.request import SamplingParams

PROMPTS = [[(7 * i + 3 * j) % 250 for i in range(length)] for j, length in enumerate((3, 17, 40, 1))]


def test_spawned_workers_answer_as_one_process(model_folder) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    seeded = SamplingParams(temperature=0.8, top_p=0.9, seed=3, n=2, max_tokens=8, ignore_eos=True)
    one = puna.LLM(model_folder)
    expected, drawn = one.generate(PROMPTS, params), one.generate(PROMPTS, seeded)
    with puna.LLM(model_folder, tensor_parallel=2, speculate="ngram", max_num_batched_tokens=16, max_num_seqs=4) as two:
        outputs = two.generate(PROMPTS, params)
        again = two.generate(PROMPTS, params)
        assert [o.token_ids for o in two.generate(PROMPTS, seeded)] == [o.token_ids for o in drawn]
        assert two.logprobs(PROMPTS[2])[1:] == pytest.approx(one.logprobs(PROMPTS[2])[1:], abs=1e-5)
        assert two.embed([PROMPTS[1]])[0] == pytest.approx(one.embed([PROMPTS[1]])[0], abs=1e-5)
        workers = two._team._workers  # type: ignore[union-attr]
        two.engine.cache.check_integrity([])
    assert [worker.returncode for worker in workers] == [0]
    for found in (outputs, again):
        for output, wanted in zip(found, expected, strict=True):
            assert output.token_ids == wanted.token_ids
            assert output.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
            assert output.prompt_logprobs[1:] == pytest.approx(wanted.prompt_logprobs[1:], abs=1e-5)


def test_torchrun_prints_one_answer_and_it_is_the_same(model_folder) -> None:
    end = ["-m", "puna", "generate", str(model_folder), "--prompt-ids", "5,6,7", "--temperature", "0", "--max-tokens", "12",
           "--logprobs", "--json"]  # fmt: skip
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=2"]
    run = subprocess.run([*torchrun, *end, "--parallel.tp", "2"], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    printed = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(printed) == 1
    alone = puna.LLM(model_folder).generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=12, logprobs=0))[0]
    assert printed[0]["outputs"][0]["token_ids"] == alone.token_ids
    assert printed[0]["outputs"][0]["logprobs"] == pytest.approx(alone.logprobs, abs=1e-5)


def test_a_worker_that_cannot_start_is_told_of(tmp_path) -> None:
    with pytest.raises(PunaError, match="worker 1 has ended with code 2"):
        puna.LLM(tmp_path, tensor_parallel=2)


def test_what_tensor_parallelism_does_not_do_is_refused(model_folder) -> None:
    with pytest.raises(PunaError, match="adapters under tensor parallelism"):
        puna.LLM(model_folder, tensor_parallel=2, adapters={"a": "b"})
