"""`puna.LLM`: a folder in, answers out. Many prompts at once, one engine behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puna.base.console import PunaError
from puna.base.hardware import parse_dtype, pick_device
from puna.engine.answer import choose_best
from puna.engine.beam import BeamParams, beam_search
from puna.engine.embed import pool
from puna.engine.engine import Engine, Progress
from puna.engine.options import EngineOptions
from puna.engine.ranks.shard import load_part
from puna.engine.ranks.team import Team
from puna.engine.request import Output, SamplingParams
from puna.engine.speculate.choice import make_speculation
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer
from puna.weights.fetch import local_folder
from puna.weights.folder import load_model
from puna.weights.model_files import find_tokenizer

Prompt = str | Sequence[int]
_AT_ONCE = 4096  # tokens of prompts embedded in one forward


class LLM:
    """A model and its tokenizer, ready to generate.

    `path` is a model folder, a GGUF file, a save's URL, or `preset:NAME` (random weights). Without a tokenizer (a
    preset, a bare folder) prompts are token ids and answers have no text. `kv`: "auto" keeps the cache as the folder
    says (in eight bits where the model was quantized with --kv), "none" in `dtype`. adapters: LoRA folders by name.
    tensor_parallel: processes that hold it together. `limits`: fields of `EngineOptions`, such as max_num_seqs=64.
    Raises PunaError for unusable input.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: str = "float32",
        device: str = "cpu",
        kv: str = "auto",
        adapters: Mapping[str, str] | None = None,
        tensor_parallel: int = 1,
        options: EngineOptions | None = None,
        **limits: Any,
    ):
        options, team = options or make_options(kv, limits), None
        folder = str(local_folder(path, state=False))  # of a URL; anything else is itself
        if tensor_parallel > 1:
            team = _spawn(folder, dtype, device, tensor_parallel, adapters)
            model = load_part(folder, parse_dtype(dtype), pick_device(device), team.part)
        else:
            model = load_model(folder, dtype, device)
        self._set_up(model, find_tokenizer(folder), options, team)
        for name, place in (adapters or {}).items():
            self.engine.load_adapter(name, place)

    @classmethod
    def of(
        cls,
        model: Transformer,
        tokenizer: Tokenizer | None,
        options: EngineOptions | None = None,
        team: Team | None = None,
        **limits: Any,
    ) -> LLM:
        """Around a model that is in memory already, for instance in the middle of its training."""
        llm = cls.__new__(cls)
        llm._set_up(model, tokenizer, options or make_options(limits.pop("kv", "auto"), limits), team)
        return llm

    @staticmethod
    def tokenizer_of(path: str | Path) -> Tokenizer | None:
        """The tokenizer beside a model; None where there is none."""
        return find_tokenizer(local_folder(path, state=False))

    def _set_up(
        self, model: Transformer, tokenizer: Tokenizer | None, options: EngineOptions, team: Team | None
    ) -> None:
        self.model, self.tokenizer, self.spec = model, tokenizer, model.spec
        self.device, self.dtype = model.embed.device, model.embed.dtype
        self._team = team
        self.engine = Engine(model, tokenizer, options, team)
        self.engine.speculation = make_speculation(self.engine, options)
        self._mail: dict[int, deque[Progress]] = {}  # of streams that are read in turns

    def close(self) -> None:
        """End the workers of tensor parallelism; without them nothing needs to be ended."""
        if self._team is not None:
            self._team.stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- answers

    def generate(
        self,
        prompts: Sequence[Prompt] | Prompt,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | None = None,
        priority: int = 0,
        watch: Callable[[int, Output], None] | None = None,
    ) -> list[Output]:
        """Answers to each prompt (text or token ids), `params.n` per prompt, prompt by prompt; all in one batch.

        params: one for all or one per prompt. watch: told (number of the prompt, answer) when an answer is finished.
        Errors: PunaError, before anything runs, if one prompt cannot be answered. An answer that fails on the way (its
        logits are no numbers, say) comes back with finish_reason "error" and its reason; the others are not touched.
        """
        given = [prompts] if _is_single(prompts) else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(given)
        if len(each) != len(given):
            raise PunaError(f"{len(given)} prompts with {len(each)} parameters", "give one for all or one for each")
        encoded = [self.encode(prompt) for prompt in given]  # type: ignore[arg-type]
        for ids, one in zip(encoded, each, strict=True):
            self.engine.check(ids, one, adapter)
        numbers: dict[int, int] = {}
        found: list[list[Output]] = [[] for _ in given]
        try:
            for number, (ids, one) in enumerate(zip(encoded, each, strict=True)):
                numbers[self.engine.add(ids, one, priority, adapter)] = number
            while any(len(outputs) < one.num_answers for outputs, one in zip(found, each, strict=True)):
                self._step(numbers, found, watch)
        except BaseException:
            for request_id in numbers:
                self.engine.abort(request_id)
            raise
        return [output for outputs, one in zip(found, each, strict=True) for output in in_order(outputs, one)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, index: int = 0, adapter: str | None = None
    ) -> Iterator[tuple[str, Output]]:
        """Pieces of one answer as they become sure, each with the answer so far; the last one has `finish_reason`.

        A piece never shows half a character nor the beginning of a stop string. `index`: which of the n answers a seed
        stands for. Several streams may be read in turns: they share the engine's steps. Closing it aborts the answer.
        """
        params = params or SamplingParams()
        if params.is_ranked:
            raise PunaError("best_of chooses when all answers are done: nothing can be streamed", "leave best_of out")
        request_id = self.engine.add(self.encode(prompt), params, adapter=adapter, indices=[index])
        mail = self._mail[request_id] = deque()
        try:
            while True:
                while not mail:
                    self._step({}, [], None)
                progress = mail.popleft()
                yield progress.piece, progress.output
                if progress.is_last:
                    return
        finally:
            del self._mail[request_id]
            self.engine.abort(request_id)

    def beam_search(self, prompt: Prompt, params: BeamParams, adapter: str | None = None) -> list[Output]:
        """The likeliest answers by beam search, best first.

        A step of it asks for one token behind every beam; what beams share is found in the prefix cache.
        """
        ids = self.encode(prompt)
        self.engine.check(ids, SamplingParams(max_tokens=params.max_tokens), adapter)

        def expand(hypotheses: Sequence[Sequence[int]], top: int) -> list[list[tuple[int, float]]]:
            one = SamplingParams(temperature=0, max_tokens=1, logprobs=top, ignore_eos=True, detokenize=False)
            outputs = self.generate([list(ids) + list(tail) for tail in hypotheses], one, adapter)
            return [list((output.top_logprobs or [{}])[0].items()) for output in outputs]

        return beam_search(expand, params, self.engine.eos_ids, self.tokenizer, len(ids))

    # --- numbers

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        """log p(token t | tokens before it) of given ids, by the trainer's own forward; the first entry is None.

        Where the cache rounds keys and values, so does this: what decoding reports is what is found here.
        """
        ids = self.encode(token_ids)
        runner, found = self.engine.runner, list[float | None]([None])
        runner.documents([ids])
        for start in range(0, len(ids) - 1, 256):  # 256 rows of logits at a time: never all of them
            rows_RV = runner.logits(np.arange(start, min(start + 256, len(ids) - 1))).log_softmax(-1)
            targets_R = torch.tensor(ids[start + 1 : start + 1 + len(rows_RV)], device=rows_RV.device)
            found += rows_RV.gather(1, targets_R[:, None])[:, 0].tolist()
        return found

    @torch.inference_mode()
    def embed(
        self, prompts: Sequence[Prompt] | Prompt, pooling: str = "last", normalize: bool = True
    ) -> list[list[float]]:
        """A vector (D,) for each prompt: the hidden state of its last token, or their mean.

        Many prompts share a forward, side by side without seeing each other. Errors: PunaError for another pooling.
        """
        given = [prompts] if _is_single(prompts) else list(prompts)
        encoded = [self.encode(prompt) for prompt in given]  # type: ignore[arg-type]
        vectors: list[list[float]] = []
        for some in _packed(encoded):
            lengths = [len(ids) for ids in some]
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            pooled = pool(self.engine.runner.documents(some), starts, lengths, pooling, normalize)
            vectors += pooled.tolist()
        return vectors

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked: bos before text, ids within the vocabulary, room in the context."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PunaError(
                    "this model has no tokenizer", "give token ids (--prompt-ids 1,2,3), or add tokenizer.json"
                )
            ids = self.tokenizer.encode(prompt, bos=True)
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise PunaError("the prompt is empty (0 tokens)", "give at least one character or token id")
        if wrong := [token for token in ids if not 0 <= token < self.spec.vocab_size]:
            raise PunaError(f"token id {wrong[0]} is outside the vocabulary of {self.spec.vocab_size}", "check the ids")
        if len(ids) > self.spec.max_len:
            raise PunaError(
                f"the prompt has {len(ids)} tokens, the model's context is {self.spec.max_len}",
                f"shorten it by {len(ids) - self.spec.max_len} tokens or use a model with a longer context",
            )
        return ids

    # --- inside

    def _step(
        self, numbers: dict[int, int], found: list[list[Output]], watch: Callable[[int, Output], None] | None
    ) -> None:
        """One step of the engine, and its news to whom they belong."""
        for progress in self.engine.step():
            output = progress.output
            if progress.request_id in self._mail:
                self._mail[progress.request_id].append(progress)
            elif progress.request_id in numbers and progress.is_last:
                number = numbers[progress.request_id]
                found[number].append(output)
                if watch is not None:
                    watch(number, output)


def in_order(outputs: list[Output], params: SamplingParams) -> list[Output]:
    """The answers to one prompt by their numbers; of best_of answers the n best, best first."""
    return choose_best(sorted(outputs, key=lambda output: output.index), params)


def make_options(kv: str, limits: Mapping[str, Any]) -> EngineOptions:
    """Options from keywords. Errors: PunaError for one that does not exist."""
    unknown = set(limits) - set(EngineOptions.__dataclass_fields__)
    if unknown:
        known = ", ".join(EngineOptions.__dataclass_fields__)
        raise PunaError(f"{sorted(unknown)[0]!r} is no option of the engine", f"use one of {known}")
    return EngineOptions(kv=kv, **limits)


def _spawn(path: str, dtype: str, device: str, size: int, adapters: object) -> Team:
    if adapters:
        raise PunaError("adapters under tensor parallelism are not served", "merge the adapter, or use one process")
    if pick_device(device).type != "cpu":
        raise PunaError("workers of one process share the CPU", "on GPUs start torchrun with --parallel.tp")
    return Team.spawn(path, parse_dtype(dtype), size)


def _is_single(prompts: Sequence[Prompt] | Prompt) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _packed(encoded: list[list[int]]) -> Iterator[list[list[int]]]:
    """Neighbours that together have at most `_AT_ONCE` tokens (or one that has more)."""
    some: list[list[int]] = []
    for ids in encoded:
        if some and sum(map(len, some)) + len(ids) > _AT_ONCE:
            yield some
            some = []
        some.append(ids)
    if some:
        yield some
