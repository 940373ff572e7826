"""Windows: every target once an epoch, no patient beside another, any step at once."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenizer.codebook import Codebook, Survey, Token, TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.store import TokenSplit
from tokenizer.windows import NO_TARGET, Windows

# So many codes that every event of a test can have its own: a target then names its place.
BOOK = Codebook.build(
    Survey(
        TokenizerOptions(min_patients=1),
        codes={f"C//{n:04}": 1 for n in range(4000)},
        statics={f"S//{n}": 1 for n in range(9)},
    )
)
KINDS = np.array([token.kind for token in BOOK.tokens])
CODES = np.flatnonzero(KINDS == "code")
STATICS = np.flatnonzero(KINDS == "static")
AGES = np.flatnonzero(KINDS == "age")


def timeline(first, statics, age, body):
    """A timeline of statics, ages (one more after every 7 tokens if the age is known) and codes of its own."""
    tokens = STATICS[:statics].tolist()
    for n in range(body):
        if age and n % 7 == 0:
            tokens.append(int(AGES[min(n // 7, len(AGES) - 1)]))
        tokens.append(int(CODES[first + n]))
    return [*tokens, BOOK.eot]


def split_of(timelines):
    lengths = [len(tokens) for tokens in timelines]
    tokens = np.array([token for tokens in timelines for token in tokens], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenSplit(tokens, np.zeros(len(tokens), np.int64), offsets, np.arange(len(lengths)) + 100)


shapes = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 120)), max_size=12)


def split_from(shape):
    firsts = np.cumsum([0, *(body for _, _, body in shape)])
    return split_of([timeline(int(first), *one) for first, one in zip(firsts, shape, strict=False)])


def windows_of(batch):
    ends = np.cumsum(batch.lengths)
    for patient, begin, end in zip(batch.patients, ends - batch.lengths, ends, strict=True):
        yield int(patient), batch.tokens[begin:end].tolist(), batch.targets[begin:end].tolist()


def header_length(tokens):
    statics = int(np.isin(tokens, STATICS).sum())
    return statics + bool(np.isin(tokens, AGES).any())


@given(shapes, st.integers(9, 60), st.integers(0, 100), st.integers(0, 2**32), st.integers(0, 5))
def test_every_token_after_the_header_is_a_target_once_but_the_first(shape, context, more, seed, epoch):
    split = split_from(shape)
    windows = Windows(split, BOOK, context=context, batch_tokens=context + more, seed=seed)
    found = Counter()
    for batch in windows.epoch(epoch):
        assert batch.tokens.dtype == batch.targets.dtype == batch.lengths.dtype == np.int64
        assert len(batch.tokens) == len(batch.targets) == batch.lengths.sum() <= context + more
        assert batch.lengths.max() <= context
        for patient, _, targets in windows_of(batch):
            found.update((patient, target) for target in targets if target != NO_TARGET)
    expected = Counter()
    for patient in range(len(split)):
        tokens = split.timeline(patient)[0].tolist()
        expected.update((patient, token) for token in tokens[header_length(tokens) + 1 :])
        first_age = header_length(tokens) - int(np.isin(tokens, STATICS).sum())
        # All later ages look alike at the oldest bucket, so they are compared by number.
        assert first_age in (0, 1)
    assert found == expected


@given(shapes, st.integers(9, 60), st.integers(0, 2**32), st.integers(0, 3))
def test_a_window_is_a_header_and_a_stretch_of_one_patient(shape, context, seed, epoch):
    split = split_from(shape)
    for batch in Windows(split, BOOK, context=context, batch_tokens=3 * context, seed=seed).epoch(epoch):
        for patient, tokens, targets in windows_of(batch):
            whole = split.timeline(patient)[0].tolist()
            head = header_length(whole)
            statics = int(np.isin(whole, STATICS).sum())
            body = tokens[head:]
            assert tokens[:statics] == whole[:statics]
            start = next(n for n in range(head, len(whole)) if whole[n : n + len(body)] == body)
            ages = [token for token in whole[statics:start] if token in AGES]
            assert tokens[statics:head] == ages[-1:], "the last age told before the piece"
            assert targets == [NO_TARGET] * head + body[1:] + [NO_TARGET]


@given(shapes, st.integers(9, 40), st.integers(0, 2**32), st.integers(0, 60))
def test_any_step_at_once_equals_the_sequence(shape, context, seed, step):
    split = split_from(shape)
    assume(any(body > 1 for _, _, body in shape))
    first = Windows(split, BOOK, context=context, batch_tokens=2 * context, seed=seed)
    epoch = 0
    sequence = []
    while len(sequence) <= step:
        assert first.steps(epoch) == len(first.epoch(epoch))
        sequence += list(first.epoch(epoch))
        epoch += 1
    again = Windows(split, BOOK, context=context, batch_tokens=2 * context, seed=seed).batch(step)
    for field in ("tokens", "targets", "lengths", "patients"):
        assert getattr(again, field).tolist() == getattr(sequence[step], field).tolist()


@given(shapes, st.integers(9, 60), st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 3))
def test_a_cap_holds_in_every_epoch_and_leaves_nothing_out_in_a_turn(shape, context, seed, cap, turn):
    split = split_from(shape)
    windows = Windows(split, BOOK, context=context, batch_tokens=2 * context, seed=seed, per_patient=cap)
    everything = Windows(split, BOOK, context=context, batch_tokens=2 * context, seed=seed)
    whole = targets_of(everything, 0)
    for patient in range(len(split)):
        header = header_length(split.timeline(patient)[0].tolist())
        targets, stride = whole[patient].total(), context - header - 1
        pieces = 1 if targets <= stride else 1 + -(-(targets - 1) // stride)
        needed = -(-pieces // cap)
        seen = Counter()
        for epoch in range(turn * needed, (turn + 1) * needed):
            found = targets_of(windows, epoch)[patient]
            assert not found - whole[patient], "no target twice in an epoch"
            seen |= found
        assert seen == whole[patient], "every target in a turn"
    for epoch in range(4):
        counts = Counter(int(patient) for batch in windows.epoch(epoch) for patient in batch.patients)
        assert max(counts.values(), default=0) <= cap


def targets_of(windows, epoch):
    """Targets of every patient in an epoch; equal ages are one key with a count."""
    found = defaultdict(Counter)
    for batch in windows.epoch(epoch):
        for patient, _, targets in windows_of(batch):
            found[patient].update(target for target in targets if target != NO_TARGET)
    return found


def test_a_cap_keeps_one_patient_from_dominating():
    split = split_of([timeline(0, 1, True, 3000), *(timeline(3000 + 20 * n, 1, True, 20) for n in range(40))])
    share = {}
    for cap in (None, 2):
        windows = Windows(split, BOOK, context=40, batch_tokens=400, seed=3, per_patient=cap)
        counts = Counter(int(p) for epoch in range(5) for batch in windows.epoch(epoch) for p in batch.patients)
        share[cap] = counts[0] / counts.total()
    assert share[None] > 0.6
    assert share[2] == pytest.approx(2 / 42)


def test_a_cap_that_nobody_reaches_changes_nothing():
    split = split_from([(2, True, 30)] * 9)
    free, capped = (
        Windows(split, BOOK, context=20, batch_tokens=80, seed=1, per_patient=cap).batch(7) for cap in (None, 9)
    )
    assert free.tokens.tolist() == capped.tokens.tolist()


@given(shapes, st.integers(9, 60), st.integers(0, 2**32))
def test_a_window_is_drawn_of_each_patient_and_every_target_can_be_drawn(shape, context, seed):
    split = split_from(shape)
    windows = Windows(split, BOOK, context=context, batch_tokens=context, seed=0)
    everybody, rng = np.arange(len(split)), np.random.default_rng(seed)
    seen = set()
    for _ in range(20):
        batch = windows.draw(everybody, rng.random((len(split), 2)))
        assert len(set(batch.patients.tolist())) == len(batch.patients)
        assert batch.lengths.max(initial=0) <= context
        for patient, tokens, targets in windows_of(batch):
            assert any(target >= 0 for target in targets)
            seen |= {(patient, target) for target in targets if target >= 0}
            if shape[patient][0]:
                assert tokens[0] == split.timeline(patient)[0][0]
    with_targets = {patient for patient, _, _ in windows_of(windows.draw(everybody, np.zeros((len(split), 2))))}
    short = {p for p in with_targets if len(split.timeline(p)[0]) <= context}
    for patient in short:
        tokens = split.timeline(patient)[0]
        assert {(patient, int(t)) for t in tokens[header_length(tokens) + 1 :]} <= seen


def test_windows_of_a_batch_can_be_taken_out():
    batch = Windows(split_from([(2, True, 30)] * 9), BOOK, context=40, batch_tokens=200, seed=1).batch(0)
    part = batch.windows(1, 3)
    assert [list(one) for one in windows_of(part)] == [list(one) for one in windows_of(batch)][1:3]


def test_epochs_and_seeds_cut_and_mix_anew():
    split = split_from([(2, True, 110)] * 30)
    batches = {
        (seed, epoch): [
            b.tokens.tolist() for b in Windows(split, BOOK, context=40, batch_tokens=80, seed=seed).epoch(epoch)
        ]
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len({str(order) for order in batches.values()}) == 4
    cuts = {tokens[-1] for order in batches.values() for batch in order for tokens in [batch]}
    assert len(cuts) > 20, "pieces end at many places"


def test_windows_of_a_batch_are_of_similar_length():
    rng = np.random.default_rng(0)
    split = split_of([timeline(0, 0, False, int(n)) for n in rng.integers(2, 120, 3000)])
    windows = Windows(split, BOOK, context=128, batch_tokens=1024, seed=0)
    batches = list(windows.epoch(0))
    spread = np.mean([batch.lengths.max() - batch.lengths.min() for batch in batches])
    filled = sum(len(batch.tokens) for batch in batches) / (1024 * len(batches))
    assert spread < 15
    assert filled > 0.9
    means = [batch.lengths.mean() for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5, "batches are not sorted by length"


def test_nobody_gives_no_batch():
    for split in (split_of([]), split_of([[BOOK.eot], [int(STATICS[0]), BOOK.eot]])):
        windows = Windows(split, BOOK, context=16, batch_tokens=16, seed=0)
        assert list(windows.epoch(0)) == []
        assert windows.steps(0) == 0
        with pytest.raises(IndexError):
            windows.batch(0)


def test_epochs_behave_like_sequences():
    epoch = Windows(split_from([(1, True, 90)] * 9), BOOK, context=40, batch_tokens=80, seed=0).epoch(3)
    assert epoch[-1].tokens.tolist() == list(epoch)[-1].tokens.tolist()
    assert len(epoch[1:3]) == 2
    with pytest.raises(IndexError):
        epoch[len(epoch)]


def test_settings_without_room_are_refused():
    split = split_from([(5, True, 90)])
    with pytest.raises(ConfigError, match="batch of 10 tokens"):
        Windows(split, BOOK, context=16, batch_tokens=10, seed=0)
    with pytest.raises(ConfigError, match="no room beside a header of 6"):
        Windows(split, BOOK, context=7, batch_tokens=10, seed=0)


def test_ages_of_the_book_are_five_years_wide():
    assert BOOK.tokens[AGES[0]] == Token("age", "0-5")
