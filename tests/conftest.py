"""Small texts, tokenizers and model folders that the tests make themselves; nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Toy models gain nothing from threads, and idle OpenMP threads spin: one each is faster, and steadier on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import logging
import random
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from puna.model.spec import Spec
from puna.text.tokenizer import Tokenizer
from puna.text.train_tokenizer import train_bpe
from puna.weights.folder import empty_model, save_model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Twelve small files of Python-like text."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "value", "index", "count", "total"]
    for number in range(12):
        lines = []
        for _ in range(60):
            a, b = draw.choice(words), draw.choice(words)
            lines.append(f"def {a}_{b}({a}, {b}={draw.randrange(100)}):\n    return {a} + {b}\n")
        (folder / f"{number:02d}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([file.read_text() for file in sorted(corpus.iterdir())], 320).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    """The debug preset with random weights and the tokenizer above."""
    spec = Spec.preset("debug").replace(vocab_size=tokenizer.vocab_size)
    model = empty_model(spec, torch.float32, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)  # spread the logits, so that greedy choices are no ties
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_ids": tuple(tokenizer.eos_ids)}
    model.spec = model.spec.replace(**ids)
    return save_model(model, tmp_path_factory.mktemp("model") / "m", tokenizer)


@pytest.fixture
def recipe(corpus, tokenizer_folder, tmp_path) -> dict:
    """A recipe that trains the debug model for 24 steps."""
    return {
        "out": str(tmp_path / "run"),
        "data": {"text": [str(corpus)], "tokenizer": str(tokenizer_folder), "seq_len": 32, "val_fraction": 0.2},
        "optim": {"lr": 3e-3, "warmup_steps": 4},
        "train": {"steps": 24, "batch_size": 4},
        "checkpoint": {"every": 5},
        "validation": {"every": 10, "max_tokens": 1024},
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3 server (moto's) on loopback; its address."""
    server = pytest.importorskip("moto.moto_server.threaded_moto_server").ThreadedMotoServer(
        "127.0.0.1", 0, verbose=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3_bucket(s3_server, monkeypatch, tmp_path) -> str:
    """'s3://<a new bucket>' and the environment to reach it, which subprocesses inherit."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "AKIDPUNATEST",
        "AWS_SECRET_ACCESS_KEY": "very-secret-access-key",
        "AWS_REGION": "us-east-1",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1",  # nothing but loopback is asked
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{bucket}", method="PUT"), timeout=30).close()
    return f"s3://{bucket}"


@pytest.fixture
def fault_proxy(s3_server, s3_bucket, monkeypatch):
    """tests/fault_proxy.py before the server; AWS_ENDPOINT_URL leads through it."""
    place = importlib.util.spec_from_file_location("fault_proxy", Path(__file__).with_name("fault_proxy.py"))
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    proxy = module.FaultProxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("PUNA_STORE_TIMEOUT", "10")
    yield proxy
    proxy.close()
