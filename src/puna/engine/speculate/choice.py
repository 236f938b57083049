"""From an option to a proposer: none, ngram, suffix, or the folder of a draft model."""

from __future__ import annotations

from pathlib import Path

from puna.base.console import PunaError
from puna.base.hardware import dtype_name
from puna.engine.engine import Engine
from puna.engine.options import EngineOptions
from puna.engine.speculate.draft_model import DraftModel, check_vocabulary
from puna.engine.speculate.speculative import NGram, Proposer, Speculation
from puna.engine.speculate.suffix import Suffix
from puna.weights.fetch import local_folder
from puna.weights.folder import load_model
from puna.weights.model_files import find_tokenizer

_SHARE = 4  # the draft's cache has room for a quarter of the tokens that the target's has


def make_speculation(engine: Engine, options: EngineOptions) -> Speculation | None:
    """What `options.speculate` asks for. Errors: PunaError for a draft model that is not there or does not fit."""
    if options.speculate == "none":
        return None
    proposer: Proposer
    if options.speculate in ("ngram", "suffix"):
        proposer = NGram() if options.speculate == "ngram" else Suffix()
    else:
        proposer = _draft_model(engine, options)
    return Speculation(proposer, engine.max_model_len, max_drafts=options.max_drafts)


def _draft_model(engine: Engine, options: EngineOptions) -> DraftModel:
    place, model = options.speculate, engine.model
    if not place.startswith("preset:") and "://" not in place and not Path(place).exists():
        raise PunaError(f"speculate is {place!r}", "use none, ngram, suffix, or the folder of a smaller model")
    folder = local_folder(place, state=False)
    draft = load_model(str(folder), dtype_name(model.embed.dtype), model.embed.device)
    check_vocabulary(draft, model, find_tokenizer(folder), engine.tokenizer)
    sequence = -(-draft.spec.max_len // options.page_size) + 1
    num_pages = max(engine.pages.num_pages // _SHARE, sequence)
    return DraftModel(
        draft, engine.vocab_size, num_pages, options.max_num_seqs, engine.eos_ids, options.page_size,
        native=options.native,
    )  # fmt: skip
