"""Sequences for calibration and evaluation: what is in them, and that no text is in both."""

from __future__ import annotations

import hashlib
import json
import random
import re

import pytest
import torch

from puna.base.console import PunaError
from puna.quant.calibration import Sequences, shared_tokens, split
from puna.quant.score import IGNORED
from puna.quant.wording import MARKS, check_wording
from puna.text.chat import Chat
from puna.text.train_tokenizer import train_bpe

WORDS = ["alpha", "beta", "gamma", "delta", "value", "index", "count", "total", "return", "def", "0", "1", "\n", "\n"]


def _text(seed: int, words: int = 400) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + str(draw.randrange(1000)) for _ in range(words)) + "\n"


DOCUMENTS = [(f"{number}.txt", _text(number)) for number in range(12)]


def _lines(ids_ST: torch.Tensor, tokenizer) -> set[str]:
    """Whole pieces of text between special tokens and line ends."""
    text = "\n".join(tokenizer.decode(row) for row in ids_ST.tolist())
    for special in tokenizer.specials:
        text = text.replace(special, "\n")
    return {line for line in text.split("\n") if len(line) > 40}


def test_shapes_bos_and_provenance(tokenizer) -> None:
    found = split(DOCUMENTS, tokenizer, samples=10, seq_len=64, eval_tokens=200, seed=3)
    assert found.calibration_ST.shape == (10, 64)
    assert found.evaluation_ST.shape == found.targets_ST.shape == (4, 64)  # 200 tokens need four
    assert found.calibration_ST.dtype == torch.int64
    assert (found.calibration_ST[:, 0] == tokenizer.bos_id).all()
    assert (found.evaluation_ST[:, 0] == tokenizer.bos_id).all()
    record = json.loads(json.dumps(found.provenance))
    assert record["documents"] == 12
    assert record["files"] == sorted(name for name, _ in DOCUMENTS)
    assert (record["samples"], record["seq_len"], record["seed"]) == (10, 64, 3)
    assert (record["calibration_tokens"], record["evaluation_tokens"]) == (640, 256)
    assert record["scored_tokens"] == int((found.targets_ST != IGNORED).sum())
    assert record["vocab_sha256"] == tokenizer.vocab_hash
    ids = found.calibration_ST.numpy().tobytes()
    assert record["calibration_sha256"] == hashlib.sha256(ids).hexdigest()


def test_targets_are_the_next_tokens_and_their_bytes(tokenizer) -> None:
    short = [(str(number), _text(number, 10)) for number in range(100)]
    found = split(short, tokenizer, samples=4, seq_len=128, eval_tokens=512)
    following = found.evaluation_ST[:, 1:]
    assert (following == tokenizer.bos_id).sum() > 4
    scored = found.targets_ST[:, :-1] != IGNORED
    assert (found.targets_ST[:, -1] == IGNORED).all()
    assert torch.equal(found.targets_ST[:, :-1][scored], following[scored])
    assert not scored[following == tokenizer.bos_id].any()
    assert scored.float().mean() > 0.9
    lengths = torch.tensor(tokenizer.byte_lengths)
    assert found.provenance["scored_bytes"] == int(lengths[following[scored]].sum())
    assert (found.bytes_ST[found.targets_ST == IGNORED] == 0).all()


def test_documents_meet_inside_a_sequence_as_in_training(tokenizer) -> None:
    short = [(f"{number}", f"line {number} of a short text\n") for number in range(200)]
    found = split(short, tokenizer, samples=3, seq_len=64, eval_tokens=128)
    row = found.calibration_ST[0].tolist()
    places = [i for i, token in enumerate(row) if token == tokenizer.bos_id]
    assert len(places) > 2
    assert places[0] == 0
    assert all(row[place - 1] == tokenizer.eos_ids[0] for place in places[1:])
    assert tokenizer.decode(row[1 : places[1] - 1]) in {text for _, text in short}


def test_a_sequence_that_begins_with_a_document_has_one_bos(tokenizer) -> None:
    cut = [tokenizer.decode(tokenizer.encode(_text(number))[:30]) for number in range(60)]
    texts = [(text, text) for text in cut if len(tokenizer.encode(text)) == 30]  # bos, 30 tokens, eos: 32
    assert len(texts) > 20
    found = split(texts, tokenizer, samples=8, seq_len=32, eval_tokens=64)
    assert ((found.calibration_ST == tokenizer.bos_id).sum(1) == 1).all()
    assert (found.calibration_ST[:, -1] == tokenizer.eos_ids[0]).all()


def test_no_line_is_on_both_sides(tokenizer) -> None:
    for seed in range(3):
        found = split(DOCUMENTS, tokenizer, samples=20, seq_len=128, eval_tokens=1024, seed=seed)
        common = _lines(found.calibration_ST, tokenizer) & _lines(found.evaluation_ST, tokenizer)
        assert not common
        assert found.provenance["shared_tokens"] == 0


def test_one_document_is_cut_in_two(tokenizer) -> None:
    text = "\n".join(_text(number, 30).replace("\n", " ") for number in range(100))
    found = split([("one.txt", text)], tokenizer, samples=20, seq_len=64, eval_tokens=640)
    assert not _lines(found.calibration_ST, tokenizer) & _lines(found.evaluation_ST, tokenizer)
    assert found.provenance["documents"] == 1
    unbroken = "".join(text.split("\n"))  # no line to cut at
    assert split([("one.txt", unbroken)], tokenizer, 20, 64, 640).evaluation_ST.shape == (10, 64)


def test_same_text_and_seed_same_sequences(tokenizer) -> None:
    def ids(documents, seed: int) -> Sequences:
        return split(documents, tokenizer, samples=8, seq_len=64, eval_tokens=200, seed=seed)

    one, other = ids(DOCUMENTS, 1), ids([(f"moved/{name}", text) for name, text in reversed(DOCUMENTS)], 1)
    assert torch.equal(one.calibration_ST, other.calibration_ST)
    assert torch.equal(one.evaluation_ST, other.evaluation_ST)
    assert not torch.equal(one.calibration_ST, ids(DOCUMENTS, 2).calibration_ST)


def test_repeated_and_empty_documents_count_once(tokenizer) -> None:
    doubled = [*DOCUMENTS, ("copy.txt", DOCUMENTS[0][1]), ("empty.txt", "")]
    found = split(doubled, tokenizer, samples=8, seq_len=64, eval_tokens=200)
    assert found.provenance["documents"] == 12
    assert found.provenance["repeated_documents"] == 1
    assert torch.equal(found.calibration_ST, split(DOCUMENTS, tokenizer, 8, 64, 200).calibration_ST)


def test_without_calibration_all_text_is_for_evaluation(tokenizer) -> None:
    found = split(DOCUMENTS[:1], tokenizer, samples=0, seq_len=64, eval_tokens=512)
    assert found.calibration_ST.shape == (0, 64)
    assert found.evaluation_ST.shape == (8, 64)
    assert found.provenance["shared_tokens"] == 0


def test_shared_windows_are_not_scored(tokenizer) -> None:
    passage = _text(99, 60).replace("\n", " ")  # a licence, say, at the head of every file
    texts = [(name, f"{passage}\n{text}") for name, text in DOCUMENTS]
    found = split(texts, tokenizer, samples=40, seq_len=128, eval_tokens=2048)
    shared = found.provenance["shared_tokens"]
    assert 0 < shared < found.evaluation_ST.numel() / 2
    unscored = found.targets_ST[:, :-1] == IGNORED
    following = tokenizer.decode(found.evaluation_ST[:, 1:][unscored].tolist())
    assert passage[100:200] in following
    kept = tokenizer.decode(found.targets_ST[found.targets_ST != IGNORED].tolist())
    assert passage[100:200] not in kept
    assert "are not scored" in " ".join(found.warnings)


def test_shared_tokens_against_a_plain_search() -> None:
    draw = torch.Generator().manual_seed(0)
    calibration_ST, evaluation_ST = torch.randint(3, (2, 4, 40), generator=draw)
    evaluation_ST[1, 5:30] = calibration_ST[2, 10:35]
    window = 6
    windows = {tuple(row[i : i + window]) for row in calibration_ST.tolist() for i in range(40 - window + 1)}
    expected = torch.zeros(4, 40, dtype=torch.bool)
    for s, row in enumerate(evaluation_ST.tolist()):
        for i in range(40 - window + 1):
            if tuple(row[i : i + window]) in windows:
                expected[s, i : i + window] = True
    assert expected[1, 5:30].all()
    assert 0 < expected.sum() < 160
    assert torch.equal(shared_tokens(evaluation_ST, calibration_ST, window), expected)
    assert not shared_tokens(evaluation_ST, calibration_ST[:0], window).any()


def test_window_is_64_bytes_where_tokens_are_short(tokenizer) -> None:
    found = split(DOCUMENTS, tokenizer, samples=8, seq_len=64, eval_tokens=200)
    average = sum(len(text) for _, text in DOCUMENTS) / sum(len(tokenizer.encode(text)) for _, text in DOCUMENTS)
    assert found.provenance["window_tokens"] == pytest.approx(64 / average, abs=3)
    long = train_bpe([text for _, text in DOCUMENTS] + ["common words are whole tokens here " * 50], 3000)
    plain = [(str(n), f"{n} " + "common words are whole tokens here " * 40) for n in range(30)]
    with pytest.raises(PunaError, match="repeats itself"):
        split(plain, long, samples=8, seq_len=32, eval_tokens=64)


def test_evaluation_text_of_its_own(tokenizer) -> None:
    held = [("held.txt", _text(77, 800))]
    found = split(DOCUMENTS, tokenizer, samples=8, seq_len=64, eval_tokens=640, evaluation=held)
    assert found.provenance["evaluation_files"] == ["held.txt"]
    text = tokenizer.decode(found.evaluation_ST[0, 1:40].tolist())
    assert text.split("\n")[0] in held[0][1]


def test_evaluation_text_that_is_calibration_text_is_refused(tokenizer) -> None:
    with pytest.raises(PunaError, match=r"1 of 2 evaluation documents are calibration documents too: again\.txt"):
        split(DOCUMENTS, tokenizer, 8, 64, 200, evaluation=[("new.txt", _text(50)), ("again.txt", DOCUMENTS[4][1])])
    edited = [("edited.txt", "x" + "".join(text for _, text in DOCUMENTS))]
    with pytest.raises(PunaError, match=r"\d+% of the evaluation text stands in the calibration text too \(10% is"):
        split(DOCUMENTS, tokenizer, 100, 64, 2000, evaluation=edited)


def test_too_little_text_says_how_much_is_missing(tokenizer) -> None:
    words = r"calibration needs 1000 and evaluation 4 sequences of 64 tokens, 64,256 together; the text has (\d+,\d+)"
    with pytest.raises(PunaError, match=words) as told:
        split(DOCUMENTS, tokenizer, samples=1000, seq_len=64, eval_tokens=200)
    have = int(re.search(words, told.value.message)[1].replace(",", ""))
    assert have == pytest.approx(sum(len(tokenizer.encode(text)) + 1 for _, text in DOCUMENTS), rel=0.01)
    assert f"give about {1.05 * 64256 / have:.1f} times as much text, or --samples " in told.value.hint
    fitting = int(told.value.hint.rpartition(" ")[2])
    assert fitting > 0.8 * have / 64
    assert len(split(DOCUMENTS, tokenizer, samples=fitting, seq_len=64, eval_tokens=200).calibration_ST) == fitting
    with pytest.raises(PunaError, match=r"calibration needs 2 and evaluation 2 sequences of 64 tokens.* has 0"):
        split([("empty", "")], tokenizer, samples=2, seq_len=64, eval_tokens=64)


def test_too_little_on_one_side(tokenizer) -> None:
    held = [("held.txt", _text(77, 20))]
    with pytest.raises(PunaError, match="evaluation needs 100 sequences of 64 tokens, 6,400 together; the text has 86"):
        split(DOCUMENTS, tokenizer, samples=2, seq_len=64, eval_tokens=6400, evaluation=held)
    with pytest.raises(PunaError, match="calibration needs 1000 sequences of 64") as told:
        split(DOCUMENTS, tokenizer, samples=1000, seq_len=64, eval_tokens=64, evaluation=[("held.txt", _text(77, 800))])
    assert "--samples" in told.value.hint


CHATS = [
    (
        f"{number}.jsonl",
        [{"role": "user", "content": _text(number, 20)}, {"role": "assistant", "content": f"yes {number}"}],
    )
    for number in range(60)
]


def test_chats_are_rendered_by_the_template(tokenizer) -> None:
    found = split(CHATS, tokenizer, samples=6, seq_len=256, eval_tokens=512)
    assert found.provenance["template"] == "the tokenizer's chat template"
    assert (found.calibration_ST == tokenizer.specials["<|im_start|>"]).sum() > 4
    rendered = {tuple(Chat(tokenizer).render_prompt(m, add_generation_prompt=False)) for _, m in CHATS}
    row = found.calibration_ST[0].tolist()
    second = next(i for i in range(1, 256) if row[i] == tokenizer.bos_id)
    assert tuple(row[:second]) in rendered  # one bos, no eos that the template does not write


def test_chats_need_a_template() -> None:
    plain = train_bpe([text for _, text in DOCUMENTS], 320)
    plain._settings.chat_template = None
    with pytest.raises(PunaError, match="no chat template"):
        split(CHATS, plain, samples=6, seq_len=64, eval_tokens=128)


def _llama3(text: str) -> str:
    return f"<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"


def test_text_in_another_models_template_is_refused(tokenizer) -> None:
    wrong = [(name, _llama3(text)) for name, text in DOCUMENTS]
    with pytest.raises(PunaError, match=r"Llama 3: '<\|start_header_id\|>' stands in 12 of 12 documents") as told:
        split(wrong, tokenizer, samples=8, seq_len=64, eval_tokens=200)
    assert '{"messages":' in told.value.hint
    alpaca = [(name, f"### Instruction:\n{text}\n### Response:\nyes") for name, text in DOCUMENTS]
    with pytest.raises(PunaError, match="Alpaca"):
        split(alpaca, tokenizer, samples=8, seq_len=64, eval_tokens=200)


def test_a_quoted_template_is_a_warning(tokenizer) -> None:
    some = [*DOCUMENTS[1:], ("quote.txt", _llama3(DOCUMENTS[0][1]))]
    found = split(some, tokenizer, samples=8, seq_len=64, eval_tokens=200)
    assert found.warnings == (
        "1 of 12 calibration documents hold '<|start_header_id|>' of Llama 3, which this tokenizer does not know; "
        "they are read as plain text",
    )
    assert found.provenance["template"] == "plain text"


def test_text_in_the_models_own_template_keeps_its_special_tokens(tokenizer) -> None:
    own = [(name, f"<|im_start|>user\n{text}<|im_end|>\n") for name, text in DOCUMENTS]
    found = split(own, tokenizer, samples=40, seq_len=256, eval_tokens=512)
    assert found.provenance["template"] == "as the text spells it (ChatML (Qwen, Yi))"
    assert not found.warnings
    start = tokenizer.specials["<|im_start|>"]
    assert (found.calibration_ST == start).any()
    quoted = split([*DOCUMENTS[1:], own[0]], tokenizer, samples=40, seq_len=256, eval_tokens=512)
    assert not (torch.cat([quoted.calibration_ST, quoted.evaluation_ST]) == start).any()


@pytest.mark.parametrize("name", MARKS)
def test_every_template_is_recognised(name, tokenizer) -> None:
    text = f"{MARKS[name][0]}hello{MARKS[name][1]}there"
    if name.startswith("ChatML"):
        assert check_wording([text], tokenizer).parse_specials
        return
    with pytest.raises(PunaError, match=name.replace("(", r"\(").replace(")", r"\)")):
        check_wording([text], tokenizer)
    assert not check_wording(["nothing of that sort", f"only {MARKS[name][0]} alone"], tokenizer).warnings
