"""llama.cpp itself as an oracle, through the C functions in the xllamacpp wheel; run as a program of its own.

    python llama_cpp.py JOBS.json    ->  one JSON list on stdout, an answer per job

Jobs: {"file", "texts": [...], "prompts": [[ids]], "new_tokens": n} -> {"ids": ids of each text, "parsed": the same with
special tokens recognised, "answers": greedy ids, "logits": of each prompt's last token}. One thread: several would spin
against each other on a small machine.

Structs that cross by value are opaque here (the defaults are taken as they are), but for the first three numbers of the
context's parameters and the batch, which have stood still for years.
"""

import ctypes
import json
import sys
from importlib.util import find_spec
from pathlib import Path


class Opaque(ctypes.Structure):
    """Larger than any of llama.cpp's parameter structs; what is beyond their end nobody reads."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ["token", "embd", "pos", "n_seq_id", "seq_id", "logits"]],
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
POINTERS = ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_logits_ith")


def library():
    folder = find_spec("xllamacpp").submodule_search_locations[0]
    c = ctypes.CDLL(str(next(Path(folder).glob("*.so"))))
    for name in POINTERS:
        getattr(c, name).restype = ctypes.c_void_p
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(c, name).restype = Opaque
    c.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Opaque]
    c.llama_init_from_model.argtypes = [ctypes.c_void_p, Opaque]
    c.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    c.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    c.llama_batch_get_one.restype = Batch
    c.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    c.llama_tokenize.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    return c


def tokenize(c, vocab, text, parse):
    data = text.encode()
    room = (ctypes.c_int32 * (4 * len(data) + 8))()
    count = c.llama_tokenize(vocab, data, len(data), room, len(room), False, parse)
    return list(room[:count])


def logits_after(c, context, tokens, size):
    held = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch only points to it
    assert c.llama_decode(context, c.llama_batch_get_one(held, len(tokens))) == 0
    return c.llama_get_logits_ith(context, -1)[:size]


def answer(c, model, vocab, prompt, new_tokens):
    params = c.llama_context_default_params()
    params.words[0] = params.words[1] = params.words[2] = 128  # n_ctx, n_batch, n_ubatch
    context = c.llama_init_from_model(model, params)
    assert context
    c.llama_set_n_threads(ctypes.c_void_p(context), 1, 1)
    size = c.llama_vocab_n_tokens(ctypes.c_void_p(vocab))
    first = logits = logits_after(c, context, prompt, size)
    tokens = []
    while len(tokens) < new_tokens:
        tokens.append(max(range(size), key=logits.__getitem__))
        logits = logits_after(c, context, tokens[-1:], size)
    c.llama_free(ctypes.c_void_p(context))
    return tokens, first


def run(c, job):
    model = c.llama_model_load_from_file(job["file"].encode(), c.llama_model_default_params())
    if not model:
        return {"error": "not loaded"}
    vocab = c.llama_model_get_vocab(ctypes.c_void_p(model))
    ids = [
        [tokenize(c, ctypes.c_void_p(vocab), text, parse) for text in job.get("texts", [])] for parse in (False, True)
    ]
    answers = [answer(c, model, vocab, prompt, job.get("new_tokens", 0)) for prompt in job.get("prompts", [])]
    c.llama_model_free(ctypes.c_void_p(model))
    return {"ids": ids[0], "parsed": ids[1], "answers": [a for a, _ in answers], "logits": [x for _, x in answers]}


if __name__ == "__main__":
    native = library()
    lines = []
    log = LOG(lambda level, text, _: lines.append(text.decode(errors="replace")) if level >= 3 else None)
    native.llama_log_set(log, None)
    native.llama_backend_init()
    native.ggml_backend_load_all()
    results = [run(native, job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps([{**result, "log": "".join(lines)} for result in results]))
