"""Training a byte-level BPE vocabulary, ready for chat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer as Engine
from tokenizers import models, trainers

from puna.base.console import PunaError, say
from puna.text.sentencepiece import start_with
from puna.text.tiktoken import byte_alphabet, byte_level_engine
from puna.text.tokenizer import Settings, Tokenizer

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>")

# ChatML. Without {% generation %} marks: plain Jinja, which other servers use, does not know that tag.
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int = 2, specials: Sequence[str] = ()) -> Tokenizer:
    """Learn a byte-level BPE of `vocab_size` tokens (all special ones and the 256 bytes included) with Llama 3's words.

    The same texts give the same ids whatever the number of threads. When the texts run out of pairs seen
    `min_frequency` times the vocabulary is smaller than asked, and a notice says so. `specials`: tokens to add to the
    usual 5, such as fill-in-the-middle markers; text that spells one never becomes it.
    Raises PunaError for an empty corpus, a special token that is an ordinary word, or a `vocab_size` below the 256
    bytes and the special tokens.
    """
    engine = byte_level_engine(models.BPE(ignore_merges=False))
    _check_specials(specials, engine)
    special_tokens = list(dict.fromkeys([*SPECIALS, *specials]))
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise PunaError(
            f"vocab_size {vocab_size} is below {least}: 256 bytes and {len(special_tokens)} special tokens",
            f"use --vocab-size {least} or more",
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special_tokens,
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    counted = _Counted(texts)
    engine.train_from_iterator(counted, trainer=trainer)
    if not counted.characters:
        raise PunaError(
            f"the corpus is empty: {counted.texts} texts, 0 characters",
            "check the paths and the name of the text field",
        )
    start_with(engine, SPECIALS[0])
    names = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[1], "pad_token": SPECIALS[2]}
    stops = [SPECIALS.index("<|im_end|>")]  # special tokens come first
    tokenizer = Tokenizer(engine, Settings(names, stops, CHATML))
    if tokenizer.vocab_size < vocab_size:
        say(f"the corpus ({counted.characters} characters) gave {tokenizer.vocab_size} tokens, not {vocab_size}")
    return tokenizer


def _check_specials(specials: Sequence[str], engine: Engine) -> None:
    """Refuse a special token that the merges of plain text could spell: its id would then stand for that text, too.

    Tokens of text never reach over the border of a word, so a special token of two words or more is safe.
    """
    byte_of = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    for token in specials:
        if not token:
            raise PunaError("a special token is empty", "use a spelling such as <|fim_prefix|>")
        if not all(letter in byte_of for letter in token):
            continue  # no token of text is written with such letters
        spelled = bytes(byte_of[letter] for letter in token).decode("utf-8", "replace")
        if len(engine.pre_tokenizer.pre_tokenize_str(spelled)) == 1:
            raise PunaError(f"the special token {token!r} is an ordinary word", f"use a spelling such as <|{token}|>")


class _Counted:
    """Passes texts on and counts them."""

    def __init__(self, source: Iterable[str]):
        self._source = source
        self.texts = self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._source:
            self.texts += 1
            self.characters += len(text)
            yield text
