"""`puna.LLM`: a folder in, answers out. One request at a time; batching and paging come behind the same face."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.engine.kv_cache import SequenceCache
from puna.engine.request import Output, SamplingParams, StopText
from puna.engine.sampler import Sampler
from puna.model.attention import Attend
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal, RoundedKV
from puna.text.tokenizer import Tokenizer
from puna.weights.fetch import local_folder
from puna.weights.folder import load_model
from puna.weights.model_files import find_tokenizer

Prompt = str | Sequence[int]


class LLM:
    """A model and its tokenizer, ready to generate.

    `path` is a model folder, a save's URL, or `preset:NAME` (random weights). Without a tokenizer (a preset, a bare
    folder) prompts are token ids and answers have no text. `kv`: "auto" keeps the cache as the folder says (in eight
    bits where the model was quantized with --kv), "none" in `dtype`. Raises PunaError for unusable input.
    """

    def __init__(self, path: str | Path, dtype: str = "float32", device: str = "cpu", kv: str = "auto"):
        check_kv(kv)
        path = local_folder(path, state=False)  # of a URL; anything else is itself
        model = load_model(str(path), dtype, device)
        self._set_up(model, find_tokenizer(path), kv)

    @classmethod
    def of(cls, model: Transformer, tokenizer: Tokenizer | None, kv: str = "auto") -> LLM:
        """Around a model that is in memory already, for instance in the middle of its training."""
        check_kv(kv)
        llm = cls.__new__(cls)
        llm._set_up(model, tokenizer, kv)
        return llm

    def _set_up(self, model: Transformer, tokenizer: Tokenizer | None, kv: str) -> None:
        self.model, self.tokenizer, self.spec = model, tokenizer, model.spec
        self.device, self.dtype = model.embed.device, model.embed.dtype
        if tokenizer and tokenizer.vocab_size > self.spec.vocab_size:
            raise PunaError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {self.spec.vocab_size}",
                "the folder mixes files of two models; fetch it again",
            )
        # Rows that pad the embedding beyond the tokenizer have no text: they are never drawn.
        self._drawable = tokenizer.vocab_size if tokenizer else self.spec.vocab_size
        self._eos = set(self.spec.eos_token_ids) | set(tokenizer.eos_ids if tokenizer else ())
        scales = getattr(model, "kv_scales", None) if kv == "auto" else None
        self._cache = SequenceCache(self.spec, self.dtype, self.device, scales)

    def generate(self, prompts: Sequence[Prompt] | Prompt, params: SamplingParams | None = None) -> list[Output]:
        """Answers to each prompt (text or token ids), `params.n` per prompt, prompt by prompt."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        outputs: list[Output] = []
        for prompt in [prompts] if single else prompts:
            outputs += self._answer(prompt, params or SamplingParams())  # type: ignore[arg-type]
        return outputs

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, index: int = 0
    ) -> Iterator[tuple[str, Output]]:
        """Pieces of one answer as they become sure, each with the answer so far; the last one has `finish_reason`.

        A piece never shows half a character nor the beginning of a stop string.
        """
        params = params or SamplingParams()
        ids = self.encode(prompt)
        logits_V = self._prefill(ids)
        yield from self._decode(ids, logits_V, self._cache, params, index)

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        """log p(token t | tokens before it) of given ids, by the trainer's own forward; the first entry is None.

        Where the cache rounds keys and values, so does this: what decoding reports is what is found here.
        """
        ids = self.encode(token_ids)
        tokens_T = torch.tensor(ids, device=self.device)
        positions_T = torch.arange(len(ids), device=self.device)
        hidden_TD = self.model(tokens_T, positions_T, self._attend(len(ids)))
        found: list[float | None] = [None]
        for start in range(0, len(ids) - 1, 256):  # 256 rows of logits at a time: never all of them
            rows = self.model.logits(hidden_TD[start : min(start + 256, len(ids) - 1)]).float().log_softmax(-1)
            found += rows.gather(1, tokens_T[start + 1 : start + 1 + len(rows), None])[:, 0].tolist()
        return found

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked: bos before text, ids within the vocabulary, room left in the context."""
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

    def _attend(self, tokens: int) -> Attend:
        plain = PackedCausal.of([tokens])
        return plain if self._cache.scales is None else RoundedKV(plain, self._cache.scales)

    def _answer(self, prompt: Prompt, params: SamplingParams) -> list[Output]:
        ids = self.encode(prompt)
        logits_V = self._prefill(ids)
        outputs = []
        for index in range(params.n):
            cache = self._cache.fork() if index < params.n - 1 else self._cache
            *_, (_, output) = self._decode(ids, logits_V, cache, params, index)
            outputs.append(output)
        return outputs

    def _prefill(self, ids: list[int]) -> Tensor:
        """Run the prompt, without the beginning it shares with the last request; logits after its last token."""
        kept = self._cache.reuse(ids, self.spec.max_len)
        return self._forward(self._cache, ids[kept:])

    @torch.inference_mode()
    def _forward(self, cache: SequenceCache, new_ids: list[int]) -> Tensor:
        """Compute `new_ids` behind what `cache` holds; fp32 logits of the next token (V,)."""
        start = len(cache.token_ids)
        attend = cache.room_for(len(new_ids))
        tokens_T = torch.tensor(new_ids, device=self.device)
        positions_T = torch.arange(start, start + len(new_ids), device=self.device)
        hidden_TD = self.model(tokens_T, positions_T, attend)
        cache.commit(new_ids)
        return self.model.logits(hidden_TD[-1:])[0].float()

    @torch.inference_mode()
    def _decode(
        self, ids: list[int], logits_V: Tensor, cache: SequenceCache, params: SamplingParams, index: int
    ) -> Iterator[tuple[str, Output]]:
        """Token by token: draw, show what is sure, stop or go on."""
        sampler = Sampler(params, ids, index, self.device)
        output = Output(prompt_tokens=len(ids))
        text, stop = self.tokenizer.stream(skip_specials=True) if self.tokenizer else None, StopText(params.stop)
        room = self.spec.max_len - len(ids)
        while True:
            token = sampler.draw(logits_V[: self._drawable])
            _record(output, token, logits_V, params.logprobs)
            ended = (token in self._eos and not params.ignore_eos) or token in params.stop_token_ids
            piece = "" if text is None or ended else stop.push(text.push(token))
            if ended or stop.found:
                output.finish_reason = "stop"
            elif len(output.token_ids) >= min(params.max_tokens, room + 1):
                output.finish_reason = "length"
            if output.finish_reason:
                piece += "" if text is None or stop.found else stop.push(text.flush()) + stop.flush()
                output.text += piece
                yield piece, output
                return
            output.text += piece
            yield piece, output
            logits_V = self._forward(cache, [token])


def check_kv(kv: str) -> None:
    """Refuse what is no way to keep a cache: scales come from calibration, so they cannot be asked for here."""
    if kv not in ("auto", "none"):
        raise PunaError(
            f"kv is {kv!r}", "use auto (as the folder says) or none; `puna quantize --kv int8` calibrates a cache"
        )


def _record(output: Output, token: int, logits_V: Tensor, top: int | None) -> None:
    """Append a token, and its log-probabilities when they are asked for."""
    output.token_ids.append(token)
    if top is None:
        return
    logprobs_V = logits_V.log_softmax(-1)
    output.logprobs = [*(output.logprobs or []), float(logprobs_V[token])]
    values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    likeliest = dict(zip(ids.tolist(), values.tolist(), strict=True))
    output.top_logprobs = [*(output.top_logprobs or []), likeliest]
