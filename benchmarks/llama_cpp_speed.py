"""llama.cpp's speed through the C functions in the xllamacpp wheel; a program of its own, its defaults but the threads.

    python benchmarks/llama_cpp_speed.py decode MODEL.gguf --batch 8 --context 512 --tokens 32
    python benchmarks/llama_cpp_speed.py prefill MODEL.gguf --context 512

Prints tokens per second. Sequences of a batch are decoded together, one token each per call, and the likeliest token of
each goes on. Structs that cross by value are opaque, but for the first four numbers of the context's parameters (what
llama.cpp then says of itself is checked) and the batch, which have stood still for years.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

WARM_UP, AT_ONCE = 4, 512  # steps before the clock; tokens of a prompt per call


class Opaque(ctypes.Structure):
    """Larger than any of llama.cpp's parameter structs; what is beyond their end nobody reads."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
QUIET = LOG(lambda level, text, data: None)


def library() -> ctypes.CDLL:
    folder = find_spec("xllamacpp").submodule_search_locations[0]
    c = ctypes.CDLL(str(next(Path(folder).glob("*.so"))))
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
        getattr(c, name).restype = ctypes.c_void_p
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(c, name).restype = Opaque
    c.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Opaque]
    c.llama_init_from_model.argtypes = [ctypes.c_void_p, Opaque]
    c.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    c.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    c.llama_batch_init.restype = Batch
    c.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    c.llama_log_set(QUIET, None)
    c.llama_backend_init()
    c.ggml_backend_load_all()
    return c


class Model:
    """A GGUF file in llama.cpp, with room for `sequences` of `length` tokens each."""

    def __init__(self, file: str, sequences: int, length: int, threads: int):
        self.c = c = library()
        model = c.llama_model_load_from_file(file.encode(), c.llama_model_default_params())
        assert model, f"{file} was not loaded"
        vocab = ctypes.c_void_p(c.llama_model_get_vocab(ctypes.c_void_p(model)))
        self.num_words = c.llama_vocab_n_tokens(vocab)
        params = c.llama_context_default_params()
        length = -(-length // 256) * 256  # each sequence's share is rounded to this
        params.words[0], params.words[3] = sequences * length, sequences  # n_ctx, n_seq_max
        self.context = ctypes.c_void_p(c.llama_init_from_model(model, params))
        assert self.context, "no context"
        assert c.llama_n_seq_max(self.context) == sequences, "the parameters' layout has changed"
        assert c.llama_n_ctx(self.context) >= sequences * length, "the parameters' layout has changed"
        c.llama_set_n_threads(self.context, threads, threads)
        self.batch = c.llama_batch_init(AT_ONCE, 0, 1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of (token, position, sequence, is wanted); the likeliest next token of the wanted ones."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert self.c.llama_decode(self.context, batch) == 0
        return [self._likeliest(i) for i, row in enumerate(rows) if row[3]]

    def _likeliest(self, row: int) -> int:
        logits = self.c.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.num_words,)).argmax())

    def read(self, ids: list[int], sequence: int) -> int:
        """A prompt; the token after it."""
        found = [0]
        for start in range(0, len(ids), AT_ONCE):
            part = range(start, min(start + AT_ONCE, len(ids)))
            found = self.decode([(ids[p], p, sequence, p == len(ids) - 1) for p in part])
        return found[0]

    def forget(self) -> None:
        self.c.llama_get_memory.restype = ctypes.c_void_p
        self.c.llama_memory_clear(ctypes.c_void_p(self.c.llama_get_memory(self.context)), True)


def random_ids(num_words: int, length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, num_words, length).tolist()


def decode_speed(file: str, batch: int, context: int, tokens: int, threads: int) -> float:
    """Tokens per second of `batch` sequences behind `context` tokens each."""
    model = Model(file, batch, context + tokens + WARM_UP, threads)
    last = [model.read(random_ids(model.num_words, context, s), s) for s in range(batch)]
    started = 0.0
    for step in range(WARM_UP + tokens):
        if step == WARM_UP:
            started = time.perf_counter()
        last = model.decode([(last[s], context + step, s, True) for s in range(batch)])
    return batch * tokens / (time.perf_counter() - started)


def prefill_speed(file: str, context: int, threads: int) -> float:
    """Tokens per second of a prompt of `context` tokens, to its first answer; the first of two prompts warms up."""
    model = Model(file, 1, context, threads)
    seconds = 0.0
    for turn in range(2):
        ids = random_ids(model.num_words, context, turn)
        model.forget()
        started = time.perf_counter()
        model.read(ids, 0)
        seconds = time.perf_counter() - started
    return context / seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["decode", "prefill"])
    parser.add_argument("file")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    if given.what == "decode":
        print(decode_speed(given.file, given.batch, given.context, given.tokens, given.threads))
    else:
        print(prefill_speed(given.file, given.context, given.threads))
