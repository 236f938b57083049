"""A file of prompts to a file of answers: the engine kept full, every finished answer on disk, a killed run goes on.

A line of the prompts is a JSON object with `prompt` (text), `prompt_ids` or `messages` (a chat), and, if it likes,
fields of `SamplingParams` of its own (max_tokens, seed, ...), `adapter`, and `id`, which comes back. Finished lines go
to OUT.part as they come; when all are there, OUT is written in the order of the prompts and OUT.part goes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from puna.base.console import PunaError, count, duration, progress, say
from puna.base.storage import disk_error, sha256_file, sync_folder
from puna.engine.llm import LLM, in_order
from puna.engine.request import Output, SamplingParams
from puna.text.chat import Chat

_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)} - {"token_mask"}
_OWN = {"id", "prompt", "prompt_ids", "messages", "adapter"}
_SYNC_SECONDS = 5.0  # between syncs: at most this much work is done again after a power cut


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked: a file of prompts, where the answers go, parameters for lines without their own."""

    prompts: Path
    out: Path
    params: SamplingParams
    model: str

    def header(self) -> dict[str, Any]:
        """What must not have changed when a run goes on."""
        params = {name: getattr(self.params, name) for name in sorted(_FIELDS)}
        told = json.loads(json.dumps({"params": params}, default=list))
        return {"puna": "answers", "prompts_sha256": sha256_file(self.prompts), "model": self.model, **told}


def answer_file(llm: LLM, chat: Chat | None, job: Job) -> dict[str, Any]:
    """Answer all lines that have no answer yet; returns the figures. Errors of single lines are in their answers.

    Errors: PunaError for a prompt file that cannot be read, an OUT that exists, an OUT.part of another job, a full
    disk.
    """
    if job.out.exists():
        raise PunaError(f"{job.out} exists", "choose another --out, or remove it")
    lines = _read_lines(job.prompts)
    part = job.out.with_name(job.out.name + ".part")
    done = _read_part(part, job.header()) if part.exists() else {}
    if done:
        say(f"{part}: {len(done):,} of {len(lines):,} lines are answered already")
    started, run = time.perf_counter(), _Run(llm, chat, job, lines)
    with _journal(part, job.header()) as journal:
        tokens = run.answer([number for number in range(len(lines)) if number not in done], len(done), journal)
    results = _read_part(part, job.header())
    _finish(job.out, part, results)
    seconds = time.perf_counter() - started
    failed = sum("error" in result for result in results.values())
    say(
        f"{job.out}: {len(results):,} lines" + (f", {failed:,} of them with an error" if failed else "") + f"; "
        f"{count(tokens)} tokens in {duration(seconds)} ({count(tokens / seconds)} tok/s)"
    )
    return {
        "out": str(job.out), "lines": len(results), "failed": failed, "resumed": len(done),
        "completion_tokens": tokens, "seconds": seconds,
    }  # fmt: skip


class _Run:
    """Requests in the engine and the lines they are for."""

    def __init__(self, llm: LLM, chat: Chat | None, job: Job, lines: list[dict[str, Any]]):
        self._llm, self._chat, self._job, self._lines = llm, chat, job, lines
        self._asked: dict[int, tuple[int, SamplingParams]] = {}  # request -> line and parameters
        self._found: dict[int, list[Output]] = {}

    def answer(self, numbers: list[int], done: int, journal: _Journal) -> int:
        """All these lines; returns the number of generated tokens."""
        engine, tokens, pending = self._llm.engine, 0, iter(numbers)
        ahead = 2 * engine.options.max_num_seqs  # enough that the engine never runs dry
        with progress(len(self._lines), "answering", done, unit="lines") as advance:
            exhausted = False
            while True:
                while not exhausted and len(self._asked) < ahead:
                    number = next(pending, None)
                    if number is None:
                        exhausted = True
                    elif error := self._ask(number):
                        journal.write(self._result(number, {"error": error}))
                        advance(1, "")
                if not self._asked:
                    return tokens
                for news in engine.step():
                    if news.is_last:
                        self._found.setdefault(news.request_id, []).append(news.output)
                        if self._is_complete(news.request_id):
                            result, made = self._collect(news.request_id)
                            tokens += made
                            journal.write(result)
                            advance(1, f"{count(tokens)} tokens")

    def _ask(self, number: int) -> str | None:
        """Queue a line; the reason if it cannot be answered."""
        line = self._lines[number]
        try:
            params = dataclasses.replace(self._job.params, **{key: line[key] for key in _FIELDS & set(line)})
            request = self._llm.engine.add(self._ids(line), params, adapter=line.get("adapter"))
        except PunaError as error:
            return error.message
        except (TypeError, ValueError) as error:
            return f"its parameters are of no use: {error}"
        self._asked[request] = (number, params)
        return None

    def _ids(self, line: dict[str, Any]) -> list[int]:
        if "messages" in line:
            if self._chat is None:
                raise PunaError("this model has no chat template", "give prompts instead of messages")
            return self._chat.render_prompt(line["messages"])
        return self._llm.encode(line["prompt"] if "prompt" in line else line["prompt_ids"])

    def _is_complete(self, request: int) -> bool:
        return len(self._found[request]) == self._asked[request][1].num_answers

    def _collect(self, request: int) -> tuple[dict[str, Any], int]:
        number, params = self._asked.pop(request)
        outputs = self._found.pop(request)
        made = sum(len(output.token_ids) for output in outputs)
        return self._result(number, {"outputs": [_json(output) for output in in_order(outputs, params)]}), made

    def _result(self, number: int, answer: dict[str, Any]) -> dict[str, Any]:
        line = self._lines[number]
        return {"line": number + 1, **({"id": line["id"]} if "id" in line else {}), **answer}


def _json(output: Output) -> dict[str, Any]:
    told = {"text": output.text, "token_ids": output.token_ids, "finish_reason": output.finish_reason}
    more = {name: getattr(output, name) for name in ("logprobs", "top_logprobs", "prompt_logprobs", "error")}
    return told | {name: value for name, value in more.items() if value is not None}


# --- files ----------------------------------------------------------------------------------------------------------


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The prompts, each checked for its form: a typing error on line 9,000 is told before anything runs."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PunaError(f"{path} cannot be read: {error.strerror}", "give a JSON-lines file") from error
    except UnicodeDecodeError as error:
        raise PunaError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start})", "convert it") from error
    lines = [_read_line(f"{path}:{number}", text) for number, text in enumerate(texts, 1) if text.strip()]
    if not lines:
        raise PunaError(f"{path} has no prompts", 'a line is {"prompt": "..."}')
    return lines


def _read_line(place: str, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise PunaError(f"{place} is no JSON: {error}", 'a line is {"prompt": "..."}') from error
    kinds = {"prompt": str, "prompt_ids": list, "messages": list}
    given = [kind for kind in kinds if isinstance(line, dict) and kind in line]
    if len(given) != 1 or not isinstance(line[given[0]], kinds[given[0]]):
        raise PunaError(
            f"{place} has {' and '.join(given) or 'no prompt'}", "give one of prompt (text), prompt_ids or messages"
        )
    if unknown := sorted(set(line) - _FIELDS - _OWN):
        raise PunaError(f"{place} has an unknown field {unknown[0]!r}", f"fields: {', '.join(sorted(_FIELDS | _OWN))}")
    return line


def _read_part(part: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Answers so far by line number from 0. A last line that was cut off counts as not answered."""
    results: dict[int, dict[str, Any]] = {}
    texts = part.read_bytes().split(b"\n")
    if _parse(texts[0]) != header:
        raise PunaError(
            f"{part} is of another job (other prompts, model or parameters)", "remove it, or choose another --out"
        )
    for text in texts[1:-1]:  # behind the last line break is nothing, or what a kill left
        result = _parse(text)
        if result is not None:
            results[result["line"] - 1] = result
    return results


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(text)
        return found
    except ValueError:
        return None


class _Journal:
    def __init__(self, file: TextIO):
        self._file, self._synced = file, time.monotonic()

    def write(self, result: dict[str, Any]) -> None:
        """Append a line; it survives the process at once, a power cut after a few seconds."""
        self._file.write(json.dumps(result, ensure_ascii=False) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


@contextmanager
def _journal(part: Path, header: dict[str, Any]) -> Iterator[_Journal]:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists():
            _cut_torn_line(part)
        with open(part, "a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps(header, ensure_ascii=False) + "\n")
                file.flush()
            yield _Journal(file)
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, part) from error
    except KeyboardInterrupt:
        say(f"\ninterrupted; what is answered is in {part}: the same command goes on from there")
        raise


def _cut_torn_line(part: Path) -> None:
    """Go back to the last whole line, so that the next one does not continue a torn one."""
    data = part.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(part, whole)


def _finish(out: Path, part: Path, results: dict[int, dict[str, Any]]) -> None:
    """OUT in the order of the prompts, whole or absent."""
    beside = out.with_name(f".{out.name}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            for number in sorted(results):
                file.write(json.dumps(results[number], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, out)
        part.unlink()
        sync_folder(out.parent)
    except OSError as error:
        raise disk_error(error, out) from error
