"""Speculation: how much of a proposal comes true, what that is worth, and what it costs where it is worth nothing.

    python benchmarks/speculative.py texts                     # n-gram and suffix on texts a model might say, no model
    python benchmarks/speculative.py texts --row-cost 0.03
    python benchmarks/speculative.py engine --model 134M         # a real engine: guesses that are right so and so often
    python benchmarks/speculative.py pair MODEL DRAFT --text F   # a draft model: how often it is right, by temperature

texts: a made-up target says exactly the text; a step of r rows takes 1 + row_cost * r. `fixed` always proposes 8,
`paced` what pays. Python's standard library: a file repeated with some names changed (edit), a file's second half after
its first (code); and tokens at random of a small vocabulary, where something always stood before, in vain (noise).
engine: contenders take turns, the best of all rounds counts: on a shared machine the rest is somebody else's.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from puna.base.console import table
from puna.engine.engine import Engine
from puna.engine.options import EngineOptions
from puna.engine.request import SamplingParams
from puna.engine.sampling.randomness import draw_seeds
from puna.engine.sampling.row_blocks import race
from puna.engine.sequence import Request, Sequence, Slice, Status
from puna.engine.speculate.pace import Pace
from puna.engine.speculate.speculative import NGram, Proposal, Proposer, Speculation
from puna.engine.speculate.suffix import Suffix
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.text.train_tokenizer import train_bpe
from puna.weights.folder import load_model
from puna.weights.model_files import find_tokenizer

LIBRARY = Path(asyncio.__file__).parent.parent
Pairs = list[tuple[list[int], list[int]]]  # prompts and answers


class Always(Pace):
    """As many as there may be."""

    def length(self, sequence: Sequence, num_sequences: int, grade: int) -> int:
        return self.max_drafts


# --- texts


def edited(text: str, luck: random.Random) -> str:
    names = sorted(set(re.findall(r"\b[a-z_]{5,}\b", text)))
    for name in luck.sample(names, min(6, len(names))):
        text = re.sub(rf"\b{name}\b", name + "_x", text)
    return text


def texts() -> dict[str, Pairs]:
    luck = random.Random(0)
    files = [file.read_text()[:10000] for file in sorted(LIBRARY.glob("*.py")) if 4000 < file.stat().st_size < 60000]
    tokenizer = train_bpe(files[:60], 4096)
    found: dict[str, Pairs] = {"edit": [], "code": [], "noise": []}
    for text in files[:15]:
        ids = tokenizer.encode(text)
        found["edit"].append((tokenizer.encode(text[:4000]), tokenizer.encode(edited(text[:4000], luck))))
        found["code"].append((ids[: len(ids) // 2], ids[len(ids) // 2 :]))
        found["noise"].append(([luck.randrange(256) for _ in range(500)], [luck.randrange(256) for _ in range(500)]))
    return found


def replay(speculation: Speculation, pairs: Pairs, row_cost: float) -> tuple[float, float]:
    """How many times faster on the made-up clock than a token a step; seconds of the processor per token."""
    plain = made_up = host = tokens = 0.0
    for key, (prompt, answer) in enumerate(pairs):
        request = Request(key, prompt, SamplingParams(max_tokens=len(answer)))
        seq = Sequence(key, request, 0, prompt + answer[:1], len(prompt), len(prompt), status=Status.RUNNING)
        while (done := seq.num_generated) < len(answer):
            began = time.process_time()
            speculation.propose([seq])
            rows = 1 + len(seq.drafts)
            got = speculation.verify(seq, seq.drafts, answer[done : done + rows])
            took = 1 + row_cost * rows
            speculation.timed([Slice(seq, done, rows, rows - 1, True)], took)
            host += time.process_time() - began
            seq.token_ids += got
            seq.num_computed_tokens += len(got)
            made_up, plain, tokens = made_up + took, plain + len(got) * (1 + row_cost), tokens + len(got)
        speculation.forget(seq)
    return plain / made_up, host / tokens


def on_texts(row_cost: float) -> None:
    rows = []
    for name, pairs in texts().items():
        for make in (NGram, Suffix):
            fixed = replay(Speculation(make(), 10**9, Always(8)), pairs, row_cost)[0]
            speculation = Speculation(make(), 10**9, Pace(8))
            faster, host = replay(speculation, pairs, row_cost)
            report = speculation.report()
            rows.append(
                [name, make.name, f"{fixed:.3f}", f"{faster:.3f}", f"{report['acceptance'] or 0:.2f}",
                 f"{report['tokens_per_step']:.2f}", f"{host * 1e6:.1f}"]
            )  # fmt: skip
    print(table(rows, ["text", "proposer", "fixed, x", "paced, x", "accepted", "tokens/step", "CPU us/token"]))


# --- an engine


class Oracle:
    """Knows the answers, and is wrong so and so often."""

    name, num_grades = "oracle", 1

    def __init__(self, answers: dict[tuple[int, ...], list[int]], right: float):
        self.answers, self.right, self.luck = answers, right, random.Random(0)

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[Proposal]:
        return [Proposal(self._guess(seq, limit)) for seq, limit in wanted]

    def forget(self, sequence: Sequence) -> None: ...

    def _guess(self, seq: Sequence, limit: int) -> list[int]:
        ids = self.answers[tuple(seq.request.prompt_ids)][seq.num_generated :][:limit]
        return [token if self.luck.random() < self.right else token ^ 1 for token in ids]


def answer(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[float, dict[tuple[int, ...], list[int]]]:
    """Seconds from the first drawn token to the end, and what was said."""
    names = {
        engine.add(p, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)): tuple(p) for p in prompts
    }
    said: dict[tuple[int, ...], list[int]] = {}
    engine.step()
    began = time.perf_counter()
    while engine.has_work:
        for progress in engine.step():
            if progress.output.finish_reason:
                said[names[progress.request_id]] = progress.output.token_ids
    return time.perf_counter() - began, said


def on_engine(model_name: str, form: str, batch: int, tokens: int, rounds: int) -> None:
    from native_step import SHAPES, random_model

    engine = Engine(random_model(SHAPES[model_name], form), None, EngineOptions(max_model_len=1024, kv_memory=0.5))
    luck = random.Random(0)
    prompts = [[luck.randrange(4000) for _ in range(64)] for _ in range(batch)]
    truth = answer(engine, prompts, tokens)[1]
    contenders: dict[str, Callable[[], Proposer | None]] = {"none": lambda: None, "n-gram": NGram, "suffix": Suffix}
    for right in (0, 0.3, 0.6, 0.8, 0.95):
        contenders[f"right {right:.0%}"] = lambda right=right: Oracle(truth, right)  # type: ignore[misc]
    seconds, reports = dict.fromkeys(contenders, float("inf")), {}
    for _ in range(rounds):
        for name, make in contenders.items():
            proposer = make()
            engine.cache.reset_prefix_cache()
            engine.speculation = proposer and Speculation(proposer, 1024, Pace(8))
            took, said = answer(engine, prompts, tokens)
            assert said == truth, "other tokens than without speculation"
            if took < seconds[name]:
                seconds[name] = took
                reports[name] = engine.speculation.report() if engine.speculation else {}
    rows = []
    for name, took in seconds.items():
        report = reports[name]
        rows.append(
            [name, f"{batch * tokens / took:.1f}", f"{seconds['none'] / took:.2f}", f"{report.get('proposed', 0)}",
             f"{report.get('acceptance') or 0:.2f}", f"{report.get('tokens_per_step', 1):.2f}",
             f"{report.get('row_cost', 0):.3f}"]
        )  # fmt: skip
    print(f"{model_name} {form}, batch {batch}, {tokens} tokens each; {engine.runner.path}")
    print(table(rows, ["proposals", "tok/s", "x", "proposed", "accepted", "tokens/step", "row cost"]))


# --- a draft model


def logits(model: Transformer, ids_T: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids_T, torch.arange(len(ids_T)), PackedCausal.of([len(ids_T)]))).float()


@torch.inference_mode()
def on_pair(target: str, draft: str, file: str, tokens: int) -> None:
    """The next token after every one of a text. likeliest: the draft's argmax; same clocks: drawn as theirs."""
    models, tokenizer = [load_model(target), load_model(draft)], find_tokenizer(target)
    assert tokenizer is not None, "the target has no tokenizer"
    ids_T = torch.tensor(tokenizer.encode(Path(file).read_text()))[:tokens]
    theirs, ours = (torch.cat([logits(model, part) for part in ids_T.split(512)]) for model in models)
    seeds = draw_seeds([1] * len(ids_T), range(len(ids_T)))
    rows = []
    for temperature in (0.01, 0.5, 0.8, 1.0):
        p, q = (theirs / temperature).softmax(-1), (ours / temperature).softmax(-1)
        drawn = race(p, seeds)
        hits = [q.argmax(-1) == drawn, race(q, seeds) == drawn]
        shares = [hit.float().mean().item() for hit in hits] + [torch.minimum(p, q).sum(-1).mean().item()]
        rows.append([f"{temperature}", *(f"{share:.3f}" for share in shares)])
    print(table(rows, ["temperature", "likeliest", "same clocks", "most possible"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("texts")
    verb.add_argument("--row-cost", type=float, default=0.1)
    verb = verbs.add_parser("engine")
    verb.add_argument("--model", default="134M")
    verb.add_argument("--format", default="int4_g32")
    verb.add_argument("--batch", type=int, default=1)
    verb.add_argument("--tokens", type=int, default=128)
    verb.add_argument("--rounds", type=int, default=3)
    verb = verbs.add_parser("pair")
    verb.add_argument("target")
    verb.add_argument("draft")
    verb.add_argument("--text", required=True)
    verb.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    if args.verb == "texts":
        on_texts(args.row_cost)
    elif args.verb == "engine":
        on_engine(args.model, args.format, args.batch, args.tokens, args.rounds)
    else:
        on_pair(args.target, args.draft, args.text, args.tokens)
