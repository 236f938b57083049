"""The command line as a contract: verbs, `--json`, exit codes, and bad input without tracebacks."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from puna.__main__ import main
from puna.base.config import build, to_toml
from puna.train.recipe import Recipe


@pytest.fixture
def puna(monkeypatch, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*words: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["puna", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_help_names_every_verb(puna) -> None:
    code, out, _ = puna("--help")
    assert code == 0
    for verb in ("quickstart", "tokenizer train", "tokenize", "shards import", "shards export", "shards verify", "train",
                 "plan", "generate", "chat", "info", "quantize", "convert", "bench decode", "bench prefill",
                 "bench load", "bench serve"):  # fmt: skip
        assert f"puna {verb}" in out
        code, text, err = puna(*verb.split(), "--help")
        assert code == 0
        assert "--json" in text
        assert not err


def test_generate_json_contract(puna, model_folder) -> None:
    code, out, _ = puna("generate", model_folder, "--prompt-ids", "1,2,3", "--logprobs", "--json", "--max-tokens", 4)
    assert code == 0
    assert len(out.splitlines()) == 1
    answer = last_json(out)
    assert set(answer["outputs"][0]) == {"text", "token_ids", "logprobs", "finish_reason"}
    assert len(answer["outputs"][0]["logprobs"]) == len(answer["outputs"][0]["token_ids"])
    assert answer["usage"]["prompt_tokens"] == 3


def test_generate_streams_text_to_stdout(puna, model_folder) -> None:
    code, out, err = puna("generate", model_folder, "--prompt", "def ", "--temperature", 0, "--max-tokens", 8)
    _, again, _ = puna("generate", model_folder, "--prompt", "def ", "--temperature", 0, "--max-tokens", 8, "--json")
    assert code == 0
    assert out == last_json(again)["outputs"][0]["text"] + "\n"
    assert "tok/s" in err


def test_generate_refuses_more_tokens_than_the_context_holds(puna, model_folder) -> None:
    code, _, err = puna("generate", model_folder, "--prompt-ids", "1,2,3", "--max-tokens", 510)
    assert code == 2
    assert "3 tokens and max_tokens is 510: 513 together, the limit is 512" in err
    code, _, err = puna("generate", model_folder, "--prompt-ids", "1,2,3", "--max-tokens", 5, "--speculate", "nothing")
    assert code == 2
    assert "speculate is 'nothing'" in err
    code, _, err = puna("generate", model_folder, "--prompts", "x.jsonl", "--prompt", "a")
    assert code == 2
    assert "--out" in err


def test_generate_with_beams_several_answers_and_speculation(puna, model_folder) -> None:
    base = ("generate", model_folder, "--prompt", "def ", "--max-tokens", 6, "--ignore-eos", "--json")
    code, out, err = puna(*base, "--beams", 3, "--n", 2)
    assert code == 0, err
    assert len(last_json(out)["outputs"]) == 2
    plain = last_json(puna(*base, "--n", 3, "--best-of", 4, "--seed", 2)[1])["outputs"]
    found = last_json(puna(*base, "--n", 3, "--best-of", 4, "--seed", 2, "--speculate", "ngram", "--no-native")[1])
    assert [one["token_ids"] for one in found["outputs"]] == [one["token_ids"] for one in plain]
    assert found["speculation"]["proposer"]


def test_generate_n_with_a_seed_and_a_stop(puna, model_folder) -> None:
    words = (
        "generate",
        model_folder,
        "--prompt",
        "a",
        "--n",
        2,
        "--seed",
        3,
        "--max-tokens",
        9,
        "--stop",
        "zzz",
        "--json",
    )
    first, second = (last_json(puna(*words)[1])["outputs"] for _ in range(2))
    assert first == second
    assert len(first) == 2


def test_chat_reads_a_pipe(puna, model_folder) -> None:
    code, out, _ = puna(
        "chat", model_folder, "--max-tokens", 5, "--seed", 1, "--json", stdin="hi\n/reset\nhello\nyou\n"
    )
    assert code == 0
    assert [m["role"] for m in last_json(out)["messages"]] == ["user", "assistant"] * 2
    assert last_json(out)["messages"][0]["content"] == "hello"


def test_info_of_presets_and_folders(puna, model_folder) -> None:
    code, out, _ = puna("info", "preset:llama3_405b")
    assert code == 0
    assert "405,853,388,800" in out
    assert "12 L H Q T" in out
    code, out, _ = puna("info", model_folder, "--json")
    card = last_json(out)
    assert card["parameters"] == sum(card["groups"].values())
    assert "model.safetensors" in card["files"]
    assert card["checks"]["tokenizer"] == "there"


def test_tokenizer_train(puna, corpus, tmp_path) -> None:
    code, out, _ = puna("tokenizer", "train", corpus, "--vocab-size", 300, "--out", tmp_path / "t", "--json")
    assert code == 0
    assert last_json(out)["vocab_size"] == 300
    assert (tmp_path / "t" / "tokenizer.json").exists()


def write_recipe(tmp_path, recipe: dict) -> str:
    file = tmp_path / "r.toml"
    file.write_text(to_toml(build(Recipe, recipe)))
    return str(file)


def test_train_with_overrides(puna, recipe, tmp_path) -> None:
    file = write_recipe(tmp_path, recipe)
    code, out, _ = puna("train", file, "--train.steps", "3", "--optim.lr=1e-4", "--json")
    assert code == 0
    assert last_json(out)["step"] == 3
    assert last_json(out)["model"] == f"{recipe['out']}/latest"


def test_info_verifies_a_save(puna, recipe, tmp_path) -> None:
    """All as saved; then a flipped bit and a lost file are named, also where the card could not be read any more."""
    run = tmp_path / "run"
    assert puna("train", write_recipe(tmp_path, {**recipe, "out": str(run)}), "--train.steps", "1", "--json")[0] == 0
    code, out, _ = puna("info", run / "latest", "--verify", "--json")
    save = (run / "latest").resolve()
    files = sum(1 for file in save.rglob("*") if file.is_file() and file.name != "manifest.json")
    assert (code, last_json(out)["verified"], last_json(out)["files"]) == (0, True, files)
    assert f"{files} files, all as saved" in puna("info", run / "latest", "--verify")[1]
    weights = bytearray((save / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (save / "model.safetensors").write_bytes(weights)
    (save / "config.json").unlink()
    code, out, err = puna("info", save, "--verify", "--json")
    assert (code, out) == (2, "")
    assert "2 of its files" in err
    assert "model.safetensors" in err
    assert "config.json" in err
    assert "save before it" in err


BAD = {
    "unknown verb": (["trian"], "no verb 'trian'", "puna train"),
    "unknown key": (["train", "RECIPE", "--optim.lrr", "1"], "unknown key 'optim.lrr'", "'optim.lr'"),
    "unknown section": (["train", "RECIPE", "--optimm.lr", "1"], "unknown key 'optimm'", "'optim'"),
    "wrong type": (["train", "RECIPE", "--train.steps", "many"], "'train.steps' must be a whole number, got 'many'", "100"),
    "heads": (["train", "RECIPE", "--model.num_attention_heads", "7"], "hidden_size 64 is not divisible by", "head_dim"),
    "kv heads": (["train", "RECIPE", "--model.num_key_value_heads", "3"], "4 is not divisible by num_key_value_heads 3", "1, 2, 4"),
    "vocabulary": (["train", "RECIPE", "--model.vocab_size", "100"], "tokenizer has 320 tokens, the model's vocabulary only 100", "320"),
    "micro batch": (["train", "RECIPE", "--train.micro_batch_size", "-1"], "train.micro_batch_size is -1", "0"),
    "validation share": (["train", "RECIPE", "--data.val_fraction", "1"], "data.val_fraction is 1", "0.05"),
    "no text": (["train", "RECIPE", "--data.text", "/none/x"], "/none/x does not exist", "check the path"),
    "empty corpus": (["train", "RECIPE", "--data.text", "EMPTY"], "no text in", "UTF-8"),
    "short corpus": (["train", "RECIPE", "--data.seq_len", "99999"], "one sequence needs 99999", "smaller data.seq_len"),
    "no recipe": (["train", "none.toml"], "no recipe at none.toml", "toml"),
    "no tokenizer": (["train", "RECIPE", "--data.tokenizer", "/none"], "/none", ""),
    "no model": (["generate", "/none", "--prompt", "x"], "no model folder at /none", "preset"),
    "no preset": (["info", "preset:lama3_8b"], "no preset is called 'lama3_8b'; did you mean 'llama3_8b'", "presets"),
    "long prompt": (["generate", "MODEL", "--prompt-ids", ",".join(["5"] * 600)], "has 600 tokens, the model's context is 512", "88"),
    "no manifest": (["info", "MODEL", "--verify"], "holds no manifest.json", "step folder"),
    "no prompt": (["generate", "MODEL"], "either --prompt or --prompt-ids", "--prompt"),
    "bad ids": (["generate", "MODEL", "--prompt-ids", "1,x"], "not a list of numbers", "1,2,3"),
    "bad knob": (["generate", "MODEL", "--prompt", "x", "--top-p", "2"], "top_p is 2", "from"),
    "truncated": (["generate", "BROKEN", "--prompt", "x"], "not a whole safetensors file", "copy it again"),
    "small vocabulary": (["tokenizer", "train", "CORPUS", "--vocab-size", "10", "--out", "x"], "10", "261"),
    "minutes": (["quickstart", "--minutes", "0"], "--minutes is 0", "0.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(puna, name, recipe, corpus, model_folder, tmp_path, monkeypatch) -> None:
    """Exit code 2, the numbers, a hint, no traceback, nothing written."""
    words, message, hint = BAD[name]
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    (tmp_path / "empty").mkdir()
    places = {"RECIPE": write_recipe(tmp_path, recipe), "EMPTY": tmp_path / "empty", "MODEL": model_folder,
              "BROKEN": broken, "CORPUS": corpus}  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    code, out, err = puna(*(places.get(word, word) for word in words))
    assert code == 2
    assert f"error: {message}" in err or message in err
    assert "hint: " in err
    assert hint in err[err.index("hint: ") :]
    assert "Traceback" not in err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bug_is_exit_code_1_with_a_traceback() -> None:
    code = (
        "import sys, puna.cli.front, puna.__main__\n"
        "def broken() -> None:\n    1 / 0\n"
        "puna.cli.front.VERBS['info'] = broken\n"
        "sys.argv = ['puna', 'info']\n"
        "sys.exit(puna.__main__.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
