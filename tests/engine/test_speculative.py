"""The target is a toy here: a token is a function of those before it and of a random number that belongs to its place."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from puna.engine.request import SamplingParams
from puna.engine.sequence import Request, Sequence, Slice, Status
from puna.engine.speculate.pace import Pace
from puna.engine.speculate.speculative import NGram, Proposal, Speculation
from puna.engine.speculate.suffix import Suffix, SuffixAutomaton

Target = Callable[[list[int]], int]
FIXED, ROW = 1.0, 0.1  # seconds of a step


def sequence(prompt: list[int], max_tokens: int = 100, key: int = 0, salt: str = "") -> Sequence:
    """In the middle of things: the prompt is computed, nothing is drawn."""
    request = Request(key, prompt, SamplingParams(max_tokens=max_tokens), cache_salt=salt)
    return Sequence(key, request, 0, list(prompt), len(prompt), len(prompt), status=Status.RUNNING)


def run(target: Target, speculation: Speculation | None, seq: Sequence) -> tuple[int, float]:
    """Generate max_tokens as an engine would; (steps, seconds on the made-up clock)."""
    seq.token_ids.append(target(seq.token_ids))
    steps, seconds = 0, 0.0
    while seq.num_generated < seq.request.params.max_tokens:
        if speculation:
            speculation.propose([seq])
        drafts, start = list(seq.drafts), seq.num_computed_tokens
        drawn = [target(seq.token_ids + drafts[:known]) for known in range(len(drafts) + 1)]
        got = speculation.verify(seq, drafts, drawn) if speculation else drawn
        took = FIXED + ROW * len(drawn)
        if speculation:
            speculation.timed([Slice(seq, start, len(drawn), len(drafts), True)], took)
        seq.token_ids += got
        seq.num_computed_tokens = len(seq.token_ids) - 1
        seq.drafts = []
        steps, seconds = steps + 1, seconds + took
    if speculation:
        speculation.forget(seq)
    return steps, seconds


def noisy_loop(period: int, vocab: int = 50, share: float = 0.1, seed: int = 0) -> Target:
    """Mostly the token `period` places back; else one that its place's random number picks among all."""

    def draw(ids: list[int]) -> int:
        luck = random.Random((seed * 7919 + len(ids)) * 7919 + ids[-1])
        return luck.randrange(vocab) if luck.random() < share else ids[-period]

    return draw


def noise(vocab: int, seed: int = 0) -> Target:
    return noisy_loop(1, vocab, 1.0, seed)


class Guesses:
    """Proposes whatever it likes."""

    name, num_grades = "guesses", 1

    def __init__(self, guess: Callable[[Sequence, int], list[int]]):
        self.guess, self.wanted = guess, list[int]()

    def propose(self, wanted) -> list[Proposal]:
        self.wanted += [limit for _, limit in wanted]
        return [Proposal(self.guess(seq, limit)) for seq, limit in wanted]

    def forget(self, sequence: Sequence) -> None: ...


class Always(Pace):
    """As many as there may be."""

    def length(self, sequence: Sequence, num_sequences: int, grade: int) -> int:
        return self.max_drafts


def at_random(seq: Sequence, limit: int) -> list[int]:
    return [random.Random(len(seq.token_ids)).randrange(5) for _ in range(limit)]


@pytest.mark.parametrize("pace", [Pace, Always])
@pytest.mark.parametrize("proposer", [NGram, Suffix, lambda: Guesses(at_random), lambda: NGram(3, 3)])
@pytest.mark.parametrize("target", [noisy_loop(7), noisy_loop(3, vocab=5, share=0.5), noise(4), noisy_loop(1, share=0)])
def test_tokens_are_those_without_speculation(target, proposer, pace) -> None:
    prompt = [random.Random(1).randrange(50) for _ in range(20)]
    plain, fast = sequence(prompt, 300), sequence(prompt, 300)
    run(target, None, plain)
    steps, _ = run(target, Speculation(proposer(), 10**6, pace(8)), fast)
    assert fast.token_ids == plain.token_ids  # not one beyond max_tokens either
    assert steps <= 299


def test_steps_are_saved_where_text_repeats_itself() -> None:
    for proposer in (NGram(), Suffix()):
        seq = sequence(list(range(20)), 600)
        steps, seconds = run(noisy_loop(20), Speculation(proposer, 10**6), seq)
        assert steps < 300
        assert seconds < 0.6 * 600 * (FIXED + ROW)


def test_hopeless_text_costs_next_to_nothing() -> None:
    """A small vocabulary: something always stood before, and it never helps."""
    for proposer in (NGram(), Suffix(), Guesses(at_random)):
        speculation = Speculation(proposer, 10**6)
        seconds = 0.0
        for key in range(3):
            seconds += run(noise(200, key), speculation, sequence([1, 2, 3], 400, key))[1]
        assert seconds < 1.02 * 3 * 400 * (FIXED + ROW)
        assert 0 < speculation.report()["proposed"] < 100


def test_verify_keeps_what_came_true_and_one_more() -> None:
    speculation, seq = Speculation(NGram(), 100), sequence([1])
    assert speculation.verify(seq, [], [7]) == [7]
    assert speculation.verify(seq, [5, 6], [5, 6, 7]) == [5, 6, 7]
    assert speculation.verify(seq, [5, 6], [5, 9, 6]) == [5, 9]  # 6 was drawn behind a draft that is no token
    assert speculation.verify(seq, [5, 6], [4, 6, 7]) == [4]
    report = speculation.report()
    assert (report["proposed"], report["accepted"]) == (6, 3)
    assert report["acceptance_by_place"] == [2 / 3, 1 / 3]


def test_proposals_only_where_a_token_was_just_drawn_and_never_too_many() -> None:
    def ready(max_tokens: int = 100) -> Sequence:
        seq = sequence([1, 2, 3], max_tokens)
        seq.token_ids.append(4)
        return seq

    def proposed(seq: Sequence, max_model_len: int = 100) -> list[int]:
        seq.drafts = [9]  # from an earlier step
        Speculation(Guesses(lambda seq, limit: [1] * 20), max_model_len, Always(8)).propose([seq])
        return seq.drafts

    assert proposed(ready()) == [1] * 8
    assert proposed(ready(5)) == [1] * 3  # 1 of 5 is there, and one more is drawn behind the drafts
    assert proposed(ready(2)) == []
    assert proposed(ready(), 7) == [1] * 2
    unfinished, halfway, ended, waiting = sequence([1, 2, 3]), ready(), ready(), ready()
    unfinished.num_computed_tokens, halfway.num_computed_tokens = 2, 1
    ended.status, waiting.status = Status.FINISHED, Status.WAITING
    for seq in (unfinished, halfway, ended, waiting):
        assert proposed(seq) == []


def test_nothing_is_left_of_ended_sequences() -> None:
    for proposer in (NGram(), Suffix()):
        speculation = Speculation(proposer, 10**6)
        run(noisy_loop(5), speculation, sequence(list(range(9))))
        kept = proposer._places if isinstance(proposer, NGram) else proposer._readers
        assert not kept
        assert not speculation._grades
        assert not speculation.pace._strides


# --- prompt lookup


def proposal(proposer: NGram | Suffix, ids: list[int], limit: int = 4, key: int = 0, salt: str = "") -> list[int]:
    return proposer.propose([(sequence(ids, key=key, salt=salt), limit)])[0].tokens


def test_ngram_follows_the_longest_then_the_latest() -> None:
    assert proposal(NGram(), [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2) == [4, 9]  # 1 2 3, not the later 2 3
    assert proposal(NGram(2), [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2) == [5, 1]
    assert proposal(NGram(), [7, 1, 7, 2, 7], 2) == [2, 7]
    assert proposal(NGram(4, 2), [7, 1, 7, 2, 7]) == proposal(NGram(), [1, 2, 3]) == proposal(NGram(), [5]) == []
    assert proposal(NGram(), [1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]  # a loop goes on beyond what is there


def test_ngram_equals_a_search_however_the_tokens_came() -> None:
    for seed in range(60):
        luck = random.Random(seed)
        ids = [luck.randrange(3) for _ in range(60)]
        proposer, seq, longest = NGram(luck.randrange(1, 6), tries=100), sequence([], key=seed), 0
        while len(seq.token_ids) < len(ids):
            seq.token_ids += ids[len(seq.token_ids) :][: luck.randrange(1, 6)]
            known = seq.token_ids
            found = proposer.propose([(seq, 1)])[0]
            expected = searched(known, proposer.longest)
            assert (found.tokens[0], found.grade) == expected if expected else not found.tokens
            longest = max(longest, found.grade)
        assert longest == proposer.longest


def searched(ids: list[int], longest: int) -> tuple[int, int] | None:
    for length in range(min(longest, len(ids) - 1), 0, -1):
        for place in range(len(ids) - 1, length - 1, -1):
            if ids[place - length : place] == ids[-length:]:
                return ids[place], length
    return None


# --- suffixes


@pytest.mark.parametrize("seed", range(40))
def test_automaton_counts_every_substring(seed: int) -> None:
    luck = random.Random(seed)
    text = [luck.randrange(2 + seed % 3) for _ in range(10 + seed)] * (1 + seed % 2)
    automaton = SuffixAutomaton(10**6)
    for token in text:
        automaton.extend(token)
    for length in range(1, 7):
        for start in range(len(text) - length + 1):
            part, state = text[start : start + length], 0
            for token in part:
                state = automaton.next[state][token]
            ends = [end for end in range(length, len(text) + 1) if text[end - length : end] == part]
            assert automaton.count[state] == len(ends)
            after = [text[end] for end in ends if end < len(text)]
            likeliest = automaton.likeliest[state]
            assert after.count(likeliest) == max((after.count(token) for token in after), default=0)
            assert (likeliest < 0) == (not after)
    assert len(automaton.link) <= 2 * len(text) + 1


@pytest.mark.parametrize("seed", range(20))
def test_a_place_in_an_automaton_stays_right_while_the_automaton_grows(seed: int) -> None:
    luck = random.Random(seed)
    automaton, read, state, length = SuffixAutomaton(16), list[int](), 0, 0
    for _ in range(100):
        for _ in range(luck.randrange(6)):
            automaton.extend(luck.randrange(2))
        read.append(luck.randrange(2))
        state, length = automaton.move(state, length, read[-1])
        expected = 0
        for token in read[len(read) - length :]:
            expected = automaton.next[expected][token]
        assert state == expected
        assert length or read[-1] not in automaton.next[0]


def test_suffix_follows_what_came_most_often() -> None:
    assert proposal(Suffix(), [1, 2, 3, 1, 2, 4, 1, 2, 3, 8, 1, 2], 2) == [3]  # 3 twice, 4 once; behind it 1 or 8
    assert proposal(Suffix(threshold=0.9), [1, 2, 3, 1, 2, 4, 1, 2, 3, 8, 1, 2], 2) == []
    assert proposal(Suffix(), [5, 6, 7, 8, 5, 6], 2) == [7, 8]
    assert proposal(Suffix(threshold=0.6), [5, 6, 7, 8, 5, 6], 2) == [7, 8]  # 7 was behind every 5 6 but the last
    assert proposal(Suffix(), [1]) == []


def answered(proposer: Suffix, answer: list[int], key: int = 0, salt: str = "") -> None:
    seq = sequence([], key=key, salt=salt)
    seq.token_ids += answer
    proposer.forget(seq)


def test_suffix_knows_earlier_answers_of_the_same_salt() -> None:
    proposer = Suffix()
    answered(proposer, list(range(100, 120)), salt="a")
    assert proposal(proposer, [1, 105, 106], 3, key=1, salt="a") == [107, 108, 109]
    assert proposal(proposer, [1, 105, 106], 3, key=2, salt="b") == []
    assert proposal(proposer, [1, 118, 119], 3, key=3, salt="a") == []  # there the answer ended
    answered(proposer, list(range(200, 220)), salt="b")
    assert proposal(proposer, [1, 205, 206], 3, key=4, salt="a") == []


def test_suffix_reads_along_with_an_earlier_answer() -> None:
    """The grade says how long they have been the same: longer than what is looked at when it begins."""
    proposer, seq = Suffix(depth=16), sequence([])
    answered(proposer, list(range(100)), key=1)
    grades = []
    for token in range(60):
        seq.token_ids.append(token)
        grades.append(proposer.propose([(seq, 2)])[0].grade)
    assert grades == sorted(grades)
    assert (grades[0], grades[14], grades[-1]) == (1, 4, 6)


def test_suffix_forgets_what_was_of_no_use() -> None:
    """Memory for 4 answers; one of them keeps being useful while 20 others pass."""
    proposer = Suffix(memory=4 * 32, parts=4)
    answered(proposer, list(range(30)))
    for other in range(1, 21):
        assert proposal(proposer, [7, 8], 2, key=1000 + other) == [9, 10]
        start = 100 * other
        answered(proposer, list(range(start, start + 30)), other)
    assert len(proposer._parts) == 4
    assert sum(part.automaton.length[part.automaton.last] for part in proposer._parts) <= 4 * 32
    assert proposal(proposer, [107, 108], key=1) == []
    assert proposal(proposer, [2007, 2008], 1, key=2) == [2009]


# --- pace


def paced(row: float, share: float, num_sequences: int = 1, proposing: float = 0.0) -> int:
    """The length for steps of 1 + row * rows seconds, where every place holds with `share`."""
    pace, seq = Pace(16), sequence([1])
    for rows in [1, 9] * 50:
        pace.step_time.add(rows, 1 + row * rows)
    for drafts, seconds in [(1, 50 * proposing), (4, 4 * proposing), (1, 50 * proposing)]:  # prompts on top of two
        pace.proposing_took(drafts, seconds)
    for trial in range(400):
        accepted = next((i for i in range(8) if random.Random(trial * 8 + i).random() > share), 8)
        pace.judged(seq, 0, 8, accepted)
    seq.token_ids.append(1)
    return pace.length(seq, num_sequences, 0)


def test_pace_weighs_what_comes_true_against_what_rows_cost() -> None:
    assert paced(row=0.01, share=0.95) == 16
    lengths = [paced(row, 0.7) for row in (0.01, 0.1, 0.5, 5)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 4 > lengths[-1]
    assert paced(0.1, 0.7, num_sequences=64) < paced(0.1, 0.7)  # many sequences share the fixed part already
    assert 1 < paced(0.1, 0.7, proposing=0.3) < paced(0.1, 0.7)


def test_a_sequence_that_turns_repetitive_is_noticed() -> None:
    def turning(ids: list[int]) -> int:
        return noise(200)(ids) if len(ids) < 1000 else noisy_loop(20, share=0)(ids)

    speculation = Speculation(NGram(), 10**6)
    steps, _ = run(turning, speculation, sequence(list(range(20)), 2000))
    assert steps < 1200  # about 980 without a pattern, then 8 tokens a step


def test_guesses_that_turn_right_are_noticed_soon() -> None:
    """Wrong ones for 200 tokens: by then one is tried every 128 tokens. After one that is right, the next at once."""
    seq, speculation = sequence([1], 1000), Speculation(Guesses(lambda seq, limit: [7] * limit), 10**6)
    steps, _ = run(lambda ids: 7 if len(ids) > 200 else 8, speculation, seq)
    assert steps < 200 + 128 + 672 / 3


def test_where_it_does_not_pay_the_next_try_is_far_unless_the_last_was_right() -> None:
    pace, seq = Pace(), sequence([1])
    for rows in [1, 3] * 20:
        pace.step_time.add(rows, 1 + 0.5 * rows)  # pays where a third of the guesses is right
    for accepted, tokens, tries in [(0, 8, True)] + [(0, 8, False)] * 5 + [(1, 1, True)]:
        pace.judged(seq, 0, 1, accepted)
        seq.token_ids += [1] * tokens
        assert pace.length(seq, 1, 0) == int(tries)


def test_later_sequences_begin_with_what_earlier_ones_showed() -> None:
    speculation, proposed = Speculation(Guesses(lambda seq, limit: [7] * limit), 10**6), []
    for key in range(9):
        run(lambda ids: 8, speculation, sequence([1], 10, key))
        proposed.append(speculation.report()["proposed"])
    assert proposed[0] > 4
    assert proposed[8] - proposed[7] <= 2  # the first try, and perhaps one more 8 tokens later


def test_steps_with_pieces_of_prompts_are_not_timed() -> None:
    speculation, seq = Speculation(NGram(), 100), sequence([1])
    before = speculation.pace.step_time.fit()
    speculation.timed([Slice(seq, 0, 64), Slice(seq, 5, 1, 0, True)], 10.0)
    assert speculation.pace.step_time.fit() == before
    speculation.timed([Slice(seq, 5, 3, 2, True), Slice(seq, 5, 1, 0, True)], 10.0)
    assert speculation.pace.step_time.of(4) == pytest.approx(10)
    speculation.verify(seq, [7, 8], [7, 8, 9])
    assert speculation.report()["tokens_per_step"] == pytest.approx((3 + 1 + 1) / 3)  # the first step drew a token too
