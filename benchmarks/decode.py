"""Decoding at batch 1 on this CPU against transformers' `generate`: tokens/s on a ~100M model, fp32 and bf16.

    python benchmarks/decode.py                # 5 rounds, about 4 minutes on 2 cores

Both read the same folder (random weights), take the same prompt of 64 ids and add 128 greedy tokens; the time of a
1-token answer is subtracted, so prefill and set-up are not in the figure. Ours is `puna.LLM.generate`.
"""

from __future__ import annotations

import tempfile
import time

import torch
from side_by_side import arguments, compare, report, shape

PROMPT, TOKENS = 64, 128


def make_folder(folder: str) -> None:
    from puna.model.spec import Spec
    from puna.weights.folder import empty_model, save_model

    model = empty_model(Spec.from_config(shape("100M")), torch.float32, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder)


def ours(folder: str, dtype: str):
    import puna
    from puna.weights.folder import load_model

    llm = puna.LLM.of(load_model(folder, dtype), None)
    return lambda ids, n: llm.generate(ids, puna.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True))


def transformers_generate(folder: str, dtype: str):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(ids: list[int], n: int):
        return model.generate(torch.tensor([ids]), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

    return generate


def worker(who: str, dtype: str, folder: str) -> None:
    generate = (ours if who == "puna" else transformers_generate)(folder, dtype)
    ids = [(i * 7919) % 32000 for i in range(PROMPT)]
    generate(ids, 8)
    times = []
    for n in (1, TOKENS):
        ids = [*ids[1:], n]  # a new prompt: nothing to reuse
        started = time.perf_counter()
        generate(ids, n)
        times.append(time.perf_counter() - started)
    print((TOKENS - 1) / (times[1] - times[0]))


if __name__ == "__main__":
    given = arguments()
    if given.worker:
        worker(*given.worker)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_folder(folder)
            cases = [[dtype, folder] for dtype in (given.cases or ("float32", "bfloat16"))]
            rows = compare(__file__, cases, "puna", "transformers", given.rounds, "tok/s")
        rows = [{**row, "case": f"100M {row['case'].split()[0]}"} for row in rows]
        report("decode", rows, "puna", "transformers", "tok/s")
