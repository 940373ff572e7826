"""Claims about the list of what left: it is written before anything leaves, and no change to it goes unseen."""

import dataclasses
import itertools
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from client.approval import site_key
from client.audit import Audit, audit, terminal
from client.outbound import (
    Head,
    Leaving,
    Outbound,
    content_of,
    lines,
    read_entry,
    read_head,
    runs_without_privacy,
)
from federation import canonical
from federation.identity import Identity
from federation.messages import Refusal
from tokenizer.errors import ConfigError, DataError

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


def message(number: int, size: int = 10) -> Leaving:
    refusal = Refusal("icu", f"because {number}")
    return Leaving(refusal.kind, size, f"{number:064x}", "train", content=content_of(refusal), policy="1" * 64)


def outbound(state: Path, full_bytes: int = 1500) -> Outbound:
    return Outbound(state / "outbound", Identity.at(site_key(state)), full_bytes)


def filled(state: Path, entries: int = 7) -> Outbound:
    listed = outbound(state)
    for number in range(entries):
        listed.note(message(number), NOW + timedelta(hours=number))
    return listed


def shown(found: Audit) -> str:
    console = Console(width=80, soft_wrap=True, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(terminal(found, {}))
    console.file.close()
    return console.export_text()


def files(state: Path) -> list[Path]:
    return sorted((state / "outbound").glob("*.jsonl"))


def test_what_was_written_down_is_told(tmp_path: Path) -> None:
    filled(tmp_path)
    found = audit(tmp_path)
    assert (found.broken, found.entries, found.without_policy) == (None, 7, 0)
    assert found.kinds["refusal"].bytes == 70
    assert (found.since, found.until) == ("2026-03-04T12:00:00.000+00:00", "2026-03-04T18:00:00.000+00:00")
    assert found.refusals == {f"because {number}": 1 for number in range(7)}
    assert len(files(tmp_path)) > 2, "the list goes on in new files"
    assert audit(tmp_path, expect=found.head).broken is None
    assert {f"signed by       {found.key}", f"head            {found.head}"} <= {*shown(found).splitlines()}


def test_a_list_of_nothing_is_whole_and_a_folder_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing has left this site"):
        audit(tmp_path)
    (tmp_path / "outbound").mkdir()
    with pytest.raises(ConfigError, match="is not a public key"):
        audit(tmp_path, key="me")
    with pytest.raises(ConfigError, match="not the head of a list"):
        audit(tmp_path, expect="123")


def cut_the_end(state: Path) -> None:
    path = files(state)[-1]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def cut_in_the_middle(state: Path) -> None:
    path = files(state)[1]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def remove_the_first_file(state: Path) -> None:
    files(state)[0].unlink()


def swap(state: Path) -> None:
    path = files(state)[0]
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))


def add_some(state: Path) -> None:
    path = files(state)[-1]
    path.write_bytes(path.read_bytes() * 3)


def change_a_size(state: Path) -> None:
    path = files(state)[0]
    path.write_bytes(path.read_bytes().replace(b'"bytes":10', b'"bytes":11', 1))


def change_and_sign_with_another_key(state: Path) -> None:
    other = Outbound(state.with_name("x"), Identity.at(state / "other.key"))
    entry = other.note(message(0, 11), NOW)
    path = files(state)[0]
    first, rest = path.read_bytes().split(b"\n", 1)
    assert json.loads(first)["sequence"] == 1
    path.write_bytes(entry.line() + b"\n" + rest)


def forget_the_end(state: Path) -> None:
    (state / "outbound" / "head.json").unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut_the_end, "entry 7"),
    (cut_in_the_middle, "entry [2345] .*entries before it are missing"),
    (remove_the_first_file, "entry 1 .*entries before it are missing"),
    (swap, "entry 1 "),
    (add_some, "entry 8"),
    (change_a_size, "entry 1 .*changed since it was signed"),
    (change_and_sign_with_another_key, "entry 1 .*not signed by"),
    (forget_the_end, r"head\.json can't be read"),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_is_named_by_the_first_entry_that_does_not_fit(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    filled(tmp_path / "site")
    damage(tmp_path / "site")
    found = audit(tmp_path / "site")
    assert found.broken is not None
    assert re.search(told, found.broken)


@given(st.data())
def test_no_changed_bit_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    state = tmp_path_factory.getbasetemp() / "every-bit"
    if not state.exists():
        filled(state, 3)
    path = data.draw(st.sampled_from(files(state)))
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(changed)
        assert audit(state).broken is not None
    finally:
        path.write_bytes(whole)
    assert audit(state).broken is None


def test_a_list_written_anew_with_the_right_key_is_seen_by_who_noted_its_end(tmp_path: Path) -> None:
    filled(tmp_path)
    noted, key = audit(tmp_path).head, audit(tmp_path).key
    for path in (tmp_path / "outbound").iterdir():
        path.unlink()
    listed = outbound(tmp_path)
    listed.note(message(3), NOW)
    assert audit(tmp_path).broken is None, "the chain alone can't tell"
    assert "written anew" in str(audit(tmp_path, expect=noted).broken)
    site_key(tmp_path).unlink()
    assert "not signed by" in str(audit(tmp_path).broken)
    assert audit(tmp_path, key=key).broken is None


def test_nothing_leaves_while_the_list_is_damaged(tmp_path: Path) -> None:
    for damage in (cut_the_end, forget_the_end, add_some):
        state = tmp_path / damage.__name__
        listed = filled(state, 3)
        damage(state)
        with pytest.raises(DataError, match="nothing may leave"):
            listed.note(message(9), NOW)


def test_a_list_that_can_not_be_written_lets_nothing_leave(tmp_path: Path) -> None:
    listed = filled(tmp_path, 1)
    (tmp_path / "outbound" / "lock").unlink()
    (tmp_path / "outbound" / "lock").mkdir()
    with pytest.raises(DataError, match="can't be written"):
        listed.note(message(2), NOW)


@pytest.mark.parametrize("left", [b'{"cut', b"\n", "a whole entry", "a new file"])
def test_what_a_crash_left_is_dropped_and_counted(tmp_path: Path, left: bytes | str) -> None:
    listed = filled(tmp_path, 2)
    head = read_head(tmp_path / "outbound")
    if isinstance(left, bytes):
        with files(tmp_path)[-1].open("ab") as file:
            file.write(left)
    else:
        listed = outbound(tmp_path, 1 if left == "a new file" else 1 << 20)
        listed.note(message(5), NOW)
        (tmp_path / "outbound" / "head.json").write_bytes(canonical.encode(head))
    found = audit(tmp_path)
    assert (found.broken, found.entries) == (None, 2)
    assert found.unfinished_bytes > 0
    entry = listed.note(message(6), NOW)
    assert (entry.sequence, entry.previous) == (3, head.sha256)
    assert entry.dropped_bytes == found.unfinished_bytes
    found = audit(tmp_path)
    assert (found.broken, found.entries, found.dropped_bytes) == (None, 3, entry.dropped_bytes)


def send_four_messages_and_die(state: Path, moment: int) -> tuple[list[str], bool]:
    """Note and send four messages in a process that kills itself before its `moment`-th step on the disk.

    Gives the sha256 of every message that left, and whether the process came to its end.
    """
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)

        def fatal(step: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                if next(steps) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*args, **kwargs)

            return counted

        os.fsync, os.truncate, Path.replace, Path.unlink = map(  # type: ignore[misc, method-assign, assignment]
            fatal, (os.fsync, os.truncate, Path.replace, Path.unlink)
        )
        listed = outbound(state)
        for number in range(4):
            listed.note(message(number), NOW)
            os.write(into, f"{number:064x}\n".encode())  # the message leaves
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        left = pipe.read().split()
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return left, status == 0


def test_killed_at_any_moment_all_that_left_is_on_the_list(ram_path: Path) -> None:
    kills = 0
    for moment in itertools.count(1):
        state = ram_path / str(moment)
        Identity.at(site_key(state))
        left: list[str] = []
        for _ in range(2):  # from the second time on, it begins with what the kill before has left
            told, ended = send_four_messages_and_die(state, moment)
            left += told
            kills += not ended
            if not (state / "outbound" / "head.json").exists():
                assert not left
                continue
            assert audit(state).broken is None
            head = read_head(state / "outbound")
            listed = [read_entry(line, place).message.sha256 for place, line in lines(state / "outbound", head)]
            assert not Counter(left) - Counter(listed)
        outbound(state).note(message(99), NOW)
        assert audit(state).broken is None
        if ended:
            break
    assert kills > 20


def test_processes_write_one_after_the_other(tmp_path: Path) -> None:
    listed = outbound(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda number: listed.note(message(number), NOW), range(20)))
    assert sorted(entry.sequence for entry in entries) == list(range(1, 21))
    assert audit(tmp_path).entries == 20
    assert audit(tmp_path).broken is None


def test_the_bytes_of_the_last_day_are_counted(tmp_path: Path) -> None:
    assert outbound(tmp_path).bytes_since(NOW) == 0
    listed = filled(tmp_path)
    assert listed.bytes_since(NOW + timedelta(hours=4)) == 30
    assert listed.bytes_since(NOW) == 70
    assert listed.bytes_since(NOW + timedelta(hours=7)) == 0


def test_enrolling_comes_before_any_policy_and_is_no_alarm(tmp_path: Path) -> None:
    listed = outbound(tmp_path)
    listed.note(Leaving("EnrolRequest", 9, "a" * 64, "control"), NOW)
    assert audit(tmp_path).without_policy == 0
    listed.note(dataclasses.replace(message(1), policy=None), NOW)
    found = audit(tmp_path)
    assert found.without_policy == 1
    assert "1 message left while none was in force" in shown(found)


def test_runs_whose_updates_left_without_privacy_are_named(tmp_path: Path) -> None:
    listed = outbound(tmp_path)
    assert runs_without_privacy(tmp_path / "outbound") == []
    of = {run: Leaving("train.reply", 9, run * 64, "train", run=run * 64, policy="1" * 64) for run in "abcd"}
    masked = dataclasses.replace(of["c"], kind="query.masked.reply")
    statistics = dataclasses.replace(of["d"], kind="query.masked.reply")
    private = dataclasses.replace(of["d"], kind="query.masked.reply", epsilon=1.0, delta=1e-6)
    prepared = dataclasses.replace(of["b"], kind="query.prepare.reply")
    for each in (of["a"], of["a"], masked, statistics, private, prepared):
        listed.note(each, NOW)
    assert runs_without_privacy(tmp_path / "outbound") == ["a" * 64, "c" * 64]
    assert audit(tmp_path).without_privacy == ("a" * 64, "c" * 64)


def test_costs_are_counted_once_per_release(tmp_path: Path) -> None:
    listed = outbound(tmp_path)
    private = dataclasses.replace(message(1), epsilon=1.0, delta=1e-6, policy=None)
    for _ in range(3):
        listed.note(private, NOW)
    listed.note(dataclasses.replace(private, sha256="2" * 64), NOW)
    found = audit(tmp_path)
    assert found.epsilons == {"ε = 1, δ = 1e-06": 2}
    assert found.without_policy == 4
    told = shown(found)
    for part in ("whole", "ε = 1, δ = 1e-06", "because 1", "4 messages left while none", found.head):
        assert part in told
    assert "broken" in str(dataclasses.replace(found, broken="entry 3").to_plain())
    assert Audit(**{**found.to_plain(), "kinds": {}, "runs": {}}).entries == 4


def test_the_end_of_a_new_list_is_the_beginning() -> None:
    assert Head() == Head(0, "0" * 64, "", 0)
