from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from puna.base.console import PunaError
from puna.text.tokenizer import Settings, Tokenizer
from puna.text.train_tokenizer import SPECIALS, train_bpe

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SAMPLES = [
    "",
    " ",
    "  two  spaces ",
    "line\n\n\nline\t\t",
    "I'm 12345 😀",
    "<|im_end|> x <s>",
    "日本語 e\u0301",
    "a" * 50,
]


def pieces_of(tokenizer, ids, skip=False):
    stream = tokenizer.stream(skip_specials=skip)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.fixture(scope="session")
def kinds(bpe, sentencepiece_models, tiktoken_file):
    """One tokenizer per rule for turning tokens into text."""
    metaspace = Engine(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5}, [("▁", "a"), ("▁", "b")]))
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    metaspace.add_special_tokens([AddedToken("<s>", special=True)])
    strips = Engine.from_str(metaspace.to_str())
    strips.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)])
    return {
        "strips": Tokenizer(strips),
        "bpe": bpe,
        "tiktoken": Tokenizer.load(tiktoken_file),
        "metaspace": Tokenizer(metaspace),
        **{name: Tokenizer.load(path) for name, path in sentencepiece_models.items()},
    }


KINDS = ["bpe", "tiktoken", "metaspace", "strips", "llama", "llama_symbols", "gemma", "t5", "unigram_bytes"]


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_streamed_pieces_join_to_decode(kinds, kind, data):
    tokenizer = kinds[kind]
    low = st.integers(0, min(tokenizer.vocab_size, 270) - 1)  # bytes and special tokens live here
    ids = data.draw(st.lists(low | st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    for skip in (False, True):
        assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_specials=skip)


@pytest.mark.parametrize("kind", ["bpe", "tiktoken", "llama", "gemma"])
@quick
@given(text=plain_text)
def test_stream_never_shows_half_a_character(kinds, kind, text):
    tokenizer = kinds[kind]
    text = text.replace("\ufffd", "").replace("▁", "")
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


def test_stream_shows_a_character_as_soon_as_it_is_whole(kinds):
    for kind in ("bpe", "llama"):
        ids = kinds[kind].encode("🦙🦙")
        pieces = pieces_of(kinds[kind], ids)
        assert [piece for piece in pieces if piece] == ["🦙", "🦙"]
        assert pieces[-1] == ""


def test_invalid_bytes_come_out_without_waiting_for_the_end(kinds):
    tokenizer = kinds["tiktoken"]  # ids 0..255 are the bytes
    assert pieces_of(tokenizer, [0xFF, 0x41, 0xE2, 0x41, 0xE2]) == ["\ufffd", "A", "", "\ufffdA", "", "\ufffd"]


def test_stream_work_does_not_grow_with_the_text(kinds):
    tokenizer = kinds["llama"]
    stream = tokenizer.stream()
    for token_id in tokenizer.encode("the llama walks " * 500):
        stream.push(token_id)
        assert len(stream._window) <= 2


def test_leading_space_survives_a_skipped_special_token(kinds):
    tokenizer = kinds["llama"]
    ids = [*tokenizer.encode("Hello"), tokenizer.eos_ids[0], *tokenizer.encode("the llama")]
    assert tokenizer.decode(ids, skip_specials=True) == "Hello the llama"
    assert "".join(pieces_of(tokenizer, ids, skip=True)) == "Hello the llama"


def test_no_double_bos(bpe):
    assert bpe.encode("hi", bos=True).count(bpe.bos_id) == 1
    assert bpe.encode("<|bos|>hi", specials=True, bos=True) == bpe.encode("hi", bos=True)
    assert bpe.encode("<|bos|>", specials=True, bos=True) == [bpe.bos_id]
    assert bpe.encode("", bos=True) == [bpe.bos_id]
    assert bpe.bos_id not in bpe.encode("hi")


def test_bos_adds_nothing_without_a_bos_token(bpe):
    tokenizer = Tokenizer(Engine.from_str(bpe.to_json()))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("hi", bos=True) == tokenizer.encode("hi")


@pytest.mark.parametrize("kind", KINDS)
def test_special_strings_in_user_text_stay_text(kinds, kind):
    tokenizer = kinds[kind]
    for text, special_id in tokenizer.specials.items():
        assert special_id in tokenizer.encode(f"a{text}b", specials=True)
        if not text.startswith("<unk"):  # in a vocabulary without bytes unknown characters are <unk>
            plain = tokenizer.encode(f"{text} a{text}{text}b") + tokenizer.encode(text)
            assert special_id not in plain


def test_the_two_readings_do_not_disturb_each_other_on_threads(bpe):
    text = "a<|im_end|>b" * 20
    expected = {flag: bpe.encode(text, specials=flag) for flag in (False, True)}
    with ThreadPoolExecutor(8) as pool:
        flags = [i % 2 == 0 for i in range(400)]
        results = list(pool.map(lambda flag: bpe.encode(text, specials=flag), flags))
    assert all(ids == expected[flag] for ids, flag in zip(results, flags, strict=True))


def test_batch_equals_one_by_one(kinds, texts):
    for tokenizer in kinds.values():
        for flag in (False, True):
            batch = [*texts[:20], *SAMPLES]
            assert tokenizer.encode_batch(batch, specials=flag) == [tokenizer.encode(t, specials=flag) for t in batch]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_gives_the_same_ids_here_and_in_transformers(kinds, kind, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = kinds[kind]
    tokenizer.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in (tmp_path / "b").iterdir())
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    for name in ("vocab_size", "vocab_hash", "bos_id", "eos_ids", "pad_id", "specials", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (other.bos_token_id, other.pad_token_id) == (tokenizer.bos_id, tokenizer.pad_id)
    for text in [*texts[:30], *SAMPLES]:
        ids = tokenizer.encode(text, specials=True)
        assert other(text, add_special_tokens=False).input_ids == ids
        assert again.encode(text, specials=True) == ids


def test_a_loaded_tokenizer_json_is_saved_byte_for_byte(bpe, tmp_path):
    content = json.loads(bpe.to_json())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=3))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert len(tokenizer.encode("the llama walks over the grass " * 9)) > 4  # an old training limit does not cut text
    tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_saving_without_a_template_removes_the_one_that_was_there(bpe, tmp_path):
    bpe.save(tmp_path)
    Tokenizer(Engine.from_str(bpe.to_json())).save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template is None


def test_companions_name_the_special_tokens(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = {"bos_token": None, "eos_token": {"content": "<|eos|>", "special": True}}
    config["chat_template"] = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 1]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (None, [1, 4], "D")
    (tmp_path / "chat_template.jinja").write_text("FILE")
    assert Tokenizer.load(tmp_path).chat_template == "FILE"


def test_model_config_names_the_tokens_when_nothing_else_does(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.to_json())
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [4]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, [4])


def test_ids_outside_the_vocabulary_are_refused_with_numbers(kinds):
    for tokenizer in kinds.values():
        for bad in (tokenizer.vocab_size, -1):
            with pytest.raises(PunaError, match=rf"{bad} .*{tokenizer.vocab_size}"):
                tokenizer.decode([3, bad])
            with pytest.raises(PunaError, match=str(bad)):
                tokenizer.stream().push(bad)


def test_text_that_is_not_unicode_is_refused(bpe):
    with pytest.raises(PunaError, match="character 2 of 3"):
        bpe.encode("ab\ud800")
    with pytest.raises(PunaError, match="character 1 of 2"):
        bpe.encode_batch(["ok", "a\udfff"])
    with pytest.raises(PunaError, match="bytes"):
        bpe.encode(b"ab")


def test_broken_files_are_refused(bpe, sentencepiece_models, tiktoken_file, tmp_path):
    spm = sentencepiece_models["llama"].read_bytes()
    ranks = tiktoken_file.read_bytes()
    broken = {
        "truncated json": bpe.to_json()[:2000].encode(),
        "other json": b'{"hidden_size": 64}',
        "truncated sentencepiece": spm[:3000],
        "sentencepiece without its end": spm[: spm.rindex(b"corpus.txt")],
        "truncated tiktoken": ranks[:-6],
        "tiktoken gap": ranks.replace(b" 300\n", b" 99999\n"),
        "empty": b"",
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "text": b"hello world, this is no tokenizer",
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PunaError) as caught:
            Tokenizer.load(tmp_path / name)
        assert any(character.isdigit() for character in caught.value.message), name
        assert caught.value.hint, name


def test_missing_paths_are_refused(tmp_path):
    with pytest.raises(PunaError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(PunaError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_vocab_hash_tells_vocabularies_apart(texts, bpe):
    assert train_bpe(texts, 500).vocab_hash == bpe.vocab_hash
    assert train_bpe(texts, 501).vocab_hash != bpe.vocab_hash
    content = json.loads(bpe.to_json())
    content["model"]["merges"][5], content["model"]["merges"][6] = content["model"]["merges"][6:4:-1]
    assert Tokenizer(Engine.from_str(json.dumps(content))).vocab_hash != bpe.vocab_hash


def test_vocab_size_counts_holes(bpe):
    engine = Engine(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    assert Tokenizer(engine, Settings()).vocab_size == 8
    assert bpe.vocab_size == 500


@quick
@given(text=plain_text)
def test_trained_bpe_gives_back_any_text(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_trained_bpe_has_what_chat_needs(bpe):
    assert list(bpe.specials) == list(SPECIALS)
    assert bpe.eos_ids == [1, 4]
    assert "im_start" in bpe.chat_template
    assert len(bpe.encode("the llama walks")) < 8


def test_training_refuses_what_cannot_work(texts):
    with pytest.raises(PunaError, match="2 texts, 0 characters"):
        train_bpe(["", ""], 300)
    with pytest.raises(PunaError, match=r"260 .*261"):
        train_bpe(texts, 260)


MARKERS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<｜hole｜>")


def test_extra_special_tokens_get_ids_and_plain_text_never_becomes_them(texts, tmp_path):
    talk = [f"{text} {marker}" for text, marker in zip(texts, MARKERS * len(texts), strict=False)]
    train_bpe(talk, 500, specials=[*MARKERS, SPECIALS[0]]).save(tmp_path)  # one that is there already changes nothing
    tokenizer = Tokenizer.load(tmp_path)
    assert list(tokenizer.specials) == [*SPECIALS, *MARKERS]
    assert tokenizer.eos_ids == [1, 4]
    ids = {tokenizer.specials[marker] for marker in MARKERS}
    for text in [*MARKERS, "".join(MARKERS), *talk[:50]]:
        assert not ids & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("".join(MARKERS), specials=True) == [5, 6, 7, 8]


def test_special_tokens_that_text_could_spell_are_refused(texts):
    for token in ("llama", "a", " llama", "Ġllama", "--", "<|"):
        if token == " llama":
            assert train_bpe(texts, 400, specials=[token]).specials[token] == 5  # no letter of the alphabet: safe
            continue
        with pytest.raises(PunaError, match="is an ordinary word"):
            train_bpe(texts, 400, specials=[token])
    with pytest.raises(PunaError, match="a special token is empty"):
        train_bpe(texts, 400, specials=[""])
    with pytest.raises(PunaError, match=r"264 .*265: 256 bytes and 9 special"):
        train_bpe(texts, 264, specials=MARKERS)


def test_added_tokens_hold_those_that_are_not_special(bpe):
    engine = Engine.from_str(bpe.to_json())
    engine.add_tokens([AddedToken("<|fim_prefix|>", special=False)])
    tokenizer = Tokenizer(engine)
    assert tokenizer.specials == bpe.specials == bpe.added
    assert tokenizer.added == {**bpe.specials, "<|fim_prefix|>": 500}


def test_byte_lengths_add_up_to_the_text(kinds, texts):
    samples = [*SAMPLES, *texts[:50]]
    for kind in KINDS:
        tokenizer = kinds[kind]
        lengths = tokenizer.byte_lengths
        if kind in ("metaspace", "strips", "t5"):
            assert lengths is None
            continue
        assert len(lengths) == tokenizer.vocab_size
        assert all(lengths[i] == 0 for i in tokenizer.specials.values())
        for text in samples:
            ids = tokenizer.encode(text)
            decoded = tokenizer.decode(ids, skip_specials=True)
            in_front = tokenizer.decode(ids[:1], skip_specials=True)
            dropped = lengths[ids[0]] - len(in_front.encode()) if ids and not in_front.startswith("\ufffd") else 0
            assert sum(lengths[i] for i in ids) - max(0, dropped) == len(decoded.encode()), (kind, text)


def test_small_corpus_gives_a_smaller_vocabulary_and_says_so(capsys):
    tokenizer = train_bpe(["ab ab"], 1000)
    assert tokenizer.vocab_size < 300
    assert f"gave {tokenizer.vocab_size} tokens, not 1000" in capsys.readouterr().err


def test_training_does_not_depend_on_threads(bpe):
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\nfrom conftest import corpus\n"
        "from puna.text.train_tokenizer import train_bpe\nprint(train_bpe(corpus(), 500).vocab_hash)\n"
        "assert 'torch' not in sys.modules"
    )
    folder = __file__.rsplit("/", 1)[0]
    source = __import__("puna").__file__.rsplit("/", 2)[0]
    for threads in ("1", "5"):
        done = subprocess.run(
            [sys.executable, "-c", code, folder, source],
            env={"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == bpe.vocab_hash, done.stderr
