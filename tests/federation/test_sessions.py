from hypothesis import given
from hypothesis import strategies as st

from federation.sessions import IDLE_S, LONGEST_S, Person, Sessions, Throttle

ANNA = Person("anna", "coordinator", "s1")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_session_ends_when_idle_and_when_it_is_old() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    mark = sessions.begin(ANNA)
    assert sessions.find(mark) == ANNA
    assert sessions.find(mark + "x") is None
    clock.now += IDLE_S - 1
    assert sessions.find(mark, by_hand=False) == ANNA, "a page that keeps itself up to date does not prolong it"
    clock.now += 2
    assert sessions.find(mark) is None
    mark = sessions.begin(ANNA)
    for _ in range(int(LONGEST_S / IDLE_S * 2)):
        clock.now += IDLE_S / 2
        found = sessions.find(mark)
    assert found is None, "used all the time, it still ends"


def test_a_session_can_be_ended_and_marks_are_never_the_same() -> None:
    sessions = Sessions()
    first, second = sessions.begin(ANNA), sessions.begin(ANNA)
    assert first != second
    sessions.end(first)
    sessions.end("nobody's")
    assert (sessions.find(first), sessions.find(second)) == (None, ANNA)


@given(st.text(), st.text())
def test_a_form_token_fits_one_mark_of_one_page(mark: str, other: str) -> None:
    sessions = Sessions()
    token = sessions.form_token(mark)
    assert sessions.is_form_token(mark, token)
    assert sessions.is_form_token(other, token) == (mark == other)
    assert not Sessions().is_form_token(mark, token)


def test_five_wrong_secrets_from_one_address_are_enough_for_ten_minutes() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    lasts = []
    for _ in range(5):
        assert throttle.wait_s("a") == 0.0
        lasts.append(throttle.count("a"))
        clock.now += 1
    assert lasts == [False] * 4 + [True]
    assert throttle.wait_s("a") == 595.0
    assert throttle.wait_s("b") == 0.0
    clock.now += 596
    assert throttle.wait_s("a") == 0.0
    throttle.forget("a")
    assert not throttle.count("a")


def test_many_addresses_take_little_memory() -> None:
    throttle = Throttle()
    for number in range(5000):
        throttle.count(str(number))
    assert len(throttle._wrong) == 4096
