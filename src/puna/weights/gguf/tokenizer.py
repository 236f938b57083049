"""A tokenizer as GGUF metadata, and back, with the same ids.

llama.cpp does not run a tokenizer.json: it has two machines of its own, and the file says which and with what words.

- `gpt2`: byte-level BPE by a list of merges; how text is first cut into words is one of the patterns it has built in,
  chosen by name (tokenizer.ggml.pre).
- `llama`: sentencepiece's BPE: of all neighbours whose union is a token, the best-scored are joined.

So a tokenizer is written only if it provably is one of these; anything else is refused. (It may still be a file without
a tokenizer.) Beside llama.cpp's keys stands the whole tokenizer.json (tokenizer.huggingface.json, GGUF's own key for
it), and reading prefers that. Known difference: for Qwen llama.cpp leaves out the Unicode normalization (NFC).

Source: gguf.md, "Tokenizer"; llama.cpp, src/llama-vocab.cpp (behaviour, checked against the program in the tests).
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Engine

from puna.base.console import PunaError
from puna.text.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, ranked_merges
from puna.text.tiktoken import byte_alphabet
from puna.text.tokenizer import Tokenizer
from puna.weights.gguf.vocabulary import IDS, IGNORES_MERGES, PATTERNS, tokenizer_of

__all__ = ["tokenizer_metadata", "tokenizer_of"]

_SPELLED = {p.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)",
                      "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"): name
            for p, name in PATTERNS.items()}  # fmt: skip
_WORDS = f"{SPACE}*[^{SPACE}]+|{SPACE}+"  # text.sentencepiece cuts so where it changes no id


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Everything a GGUF file says of a tokenizer; `vocab_size` rows of the embedding, the last ones may have no token.

    Errors: PunaError for a tokenizer with more tokens than that, or one that llama.cpp would not follow to the letter.
    """
    if tokenizer.vocab_size > vocab_size:
        raise PunaError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}",
            "the folder mixes files of two models; fetch it again",
        )
    state = json.loads(tokenizer.to_json())
    engine = Engine.from_str(tokenizer.to_json())
    if state["model"]["type"] != "BPE":
        raise _refusal(f"its model is {state['model']['type']}, not BPE")
    _check_added(state)
    write = _write_sentencepiece if state["model"].get("byte_fallback") else _write_byte_level
    keys = write(state, engine, vocab_size)
    return keys | _write_parts(tokenizer, engine) | {"tokenizer.huggingface.json": tokenizer.to_json()}


def _write_parts(tokenizer: Tokenizer, engine: Engine) -> dict[str, Any]:
    """Which tokens play which part, and the chat template."""
    ids = {name: engine.token_to_id(text) for name, text in tokenizer.token_names.items()}
    keys: dict[str, Any] = {
        f"tokenizer.ggml.{short}_token_id": ids[name] for name, short in IDS.items() if ids.get(name) is not None
    }
    for token in tokenizer.eos_ids:
        if token != keys.get("tokenizer.ggml.eos_token_id"):
            kind = "eom" if "eom" in (engine.id_to_token(token) or "") else "eot"
            keys.setdefault(f"tokenizer.ggml.{kind}_token_id", token)
    if tokenizer.eos_ids:
        keys["puna.stop_token_ids"] = tokenizer.eos_ids
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.bos_id is not None
    keys["tokenizer.ggml.add_eos_token"] = False
    if tokenizer.chat_template is not None:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def _check_added(state: dict[str, Any]) -> None:
    """Added tokens must be found by their plain spelling, wherever they stand."""
    for token in state.get("added_tokens", []):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise _refusal(f"its token {token['content']!r} swallows spaces or must be a word")
        if token.get("normalized") and not token.get("special") and state.get("normalizer"):
            raise _refusal(f"its token {token['content']!r} is looked up in normalized text")
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if state["model"].get(name)]
    if odd:
        raise _refusal(f"its BPE has a {odd[0]}")


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def _write_byte_level(state: dict[str, Any], engine: Engine, vocab_size: int) -> dict[str, Any]:
    if (state.get("decoder") or {}).get("type") != "ByteLevel":
        raise _refusal("it is neither byte-level BPE nor sentencepiece's with byte fallback")
    pre, model = _pre_name(state), state["model"]
    added = {token["content"] for token in state["added_tokens"]}
    missing = set(byte_alphabet()) - model["vocab"].keys()
    if missing:
        raise _refusal(f"{len(missing)} of the 256 bytes have no token")
    if bool(model.get("ignore_merges")) != (pre in IGNORES_MERGES):
        lone = _unreachable(state, added)
        if lone is not None:
            raise _refusal(f"no merges lead to its token {lone!r}, which '{pre}' would treat in another way")
    tokens, types = _table(state, engine, vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _unreachable(state: dict[str, Any], added: set[str]) -> str | None:
    """A token that the merges do not make of its own bytes; without one, `ignore_merges` changes no id."""
    engine = Engine.from_str(json.dumps({**state, "model": {**state["model"], "ignore_merges": False}}))
    words = (token for token in state["model"]["vocab"] if token not in added)
    return next((token for token in words if len(engine.model.tokenize(token)) > 1), None)


def _pre_name(state: dict[str, Any]) -> str:
    """llama.cpp's name for the way this tokenizer cuts text into words."""
    steps = _steps(state.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        uses_regex = steps[-1].get("use_regex", True)
        if kinds == ["Split", "ByteLevel"] and not uses_regex and _is_plain_split(steps[0]):
            pattern = steps[0]["pattern"].get("Regex", "")
            name = PATTERNS.get(pattern) or _SPELLED.get(pattern)
            if name and _normalizes(state) in ([], ["NFC"] if name == "qwen2" else []):
                return name
        if not _normalizes(state) and uses_regex:
            if kinds == ["ByteLevel"]:
                return "gpt-2"
            if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
                return "smollm"
    shown = " + ".join([*_normalizes(state), *kinds]) or "nothing"
    raise _refusal(f"it cuts text into words in a way that llama.cpp has no name for ({shown})")


def _is_plain_split(step: dict[str, Any]) -> bool:
    return step["behavior"] == "Isolated" and not step.get("invert")


def _normalizes(state: dict[str, Any]) -> list[str]:
    return [step["type"] for step in _steps(state.get("normalizer"), "normalizers")]


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A sequence's members, one after another; a single step is a sequence of one."""
    if part is None:
        return []
    return [s for inner in part[name] for s in _steps(inner, name)] if part["type"] == "Sequence" else [part]


# --- sentencepiece's BPE ----------------------------------------------------------------------------------------------


def _write_sentencepiece(state: dict[str, Any], engine: Engine, vocab_size: int) -> dict[str, Any]:
    model = state["model"]
    steps = _steps(state.get("normalizer"), "normalizers")
    prefix = [step.get("prepend") for step in steps if step["type"] == "Prepend"]
    replaces = [step for step in steps if step["type"] == "Replace"]
    plain = len(replaces) == 1 and (replaces[0]["pattern"], replaces[0]["content"]) == ({"String": " "}, SPACE)
    if not plain or prefix not in ([], [SPACE]) or len(prefix) + 1 != len(steps):
        raise _refusal(f"it normalizes text by {' + '.join(_normalizes(state)) or 'nothing'}")
    tokens, types = _table(state, engine, vocab_size)
    _check_words(state, [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL])
    lacking = sum(f"<0x{byte:02X}>" not in model["vocab"] for byte in range(256))
    if lacking:
        raise _refusal(f"{lacking} of the 256 bytes have no token")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": _scores(model, tokens, types),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": bool(prefix),
    }


def _check_words(state: dict[str, Any], tokens: list[str]) -> None:
    """Only the cut before each space is known, which changes no id as long as no token reaches across one."""
    steps = _steps(state.get("pre_tokenizer"), "pretokenizers")
    is_known = all(s["type"] == "Split" and _is_plain_split(s) and s["pattern"] == {"Regex": _WORDS} for s in steps)
    crossing = next((token for token in tokens if SPACE in token.lstrip(SPACE)), None)
    if not is_known or (steps and crossing is not None) or state["model"].get("ignore_merges"):
        kinds = " + ".join(step["type"] for step in steps) or "merges that are left out"
        raise _refusal(f"it cuts text in a way that llama.cpp does not ({kinds}); user-defined symbols do that")


def _scores(model: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """Scores in the order of the merges, which must be all that sentencepiece would make."""
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    joined = list(dict.fromkeys(left + right for left, right in merges))
    ordinary = {token: 0.0 for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    every = {text: ranked_merges([text], ordinary) for text in joined}
    place, at = {text: -float(rank) for rank, text in enumerate(joined)}, 0
    for text in joined:
        if sorted(merges[at : at + len(every[text])]) != sorted(every[text]):
            raise _refusal(f"its merges to {text!r} are not the {len(every[text])} that its vocabulary implies")
        at += len(every[text])
    skipped = next((text for text in ordinary if text not in place and ranked_merges([text], ordinary)), None)
    if at != len(merges) or skipped is not None:
        raise _refusal(f"its merges do not lead to {skipped!r}" if skipped else "its merges are in no order of tokens")
    return [place.get(token, -float(len(joined))) if kind == NORMAL else 0.0
            for token, kind in zip(tokens, types, strict=True)]  # fmt: skip


def _table(state: dict[str, Any], engine: Engine, vocab_size: int) -> tuple[list[str], list[int]]:
    """(token, type) of each id; ids without a token get a name that no text becomes."""
    added = {token["id"]: token for token in state["added_tokens"]}
    has_bytes, unknown = bool(state["model"].get("byte_fallback")), state["model"].get("unk_token")
    tokens, types = [], []
    for token_id in range(vocab_size):
        text = engine.id_to_token(token_id)
        tokens.append(f"[PAD{token_id}]" if text is None else text)
        types.append(_type(text, added.get(token_id), has_bytes, unknown))
    return tokens, types


def _type(text: str | None, added: dict[str, Any] | None, has_bytes: bool, unknown: str | None) -> int:
    if text is None:
        return UNUSED
    if has_bytes and text == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    return BYTE if has_bytes and len(text) == 6 and text[:3] == "<0x" and text[-1] == ">" else NORMAL


def _refusal(reason: str) -> PunaError:
    return PunaError(
        f"llama.cpp would not give this tokenizer's ids: {reason}",
        "write the file without a tokenizer (--no-tokenizer: token ids in and out), or export another format",
    )
