"""Why sites are missing is told in a few characters: who gives one reason stands together, and no word is cut."""

from server.reasons import gathered


def test_sites_with_one_reason_stand_together() -> None:
    reasons = {
        "heart": f"heart has not approved the manifest {'e4' * 32}; fedcomet site approve {'e4' * 8}.",
        "icu": "the disk of icu-2 is full",
        "general": f"general has not approved the manifest {'e4' * 32}; fedcomet site approve {'e4' * 8}.",
    }
    assert gathered(reasons, 500) == (
        "heart, general: the site has not approved the manifest e4e4e4e4; fedcomet site approve e4e4e4e4e4e4e4e4; "
        "icu: the disk of icu-2 is full"
    )
    assert gathered({"heart": "heart is full."}, 500) == "heart: is full"
    assert gathered({"heart": "heart: no room"}, 500) == "heart: no room"
    assert gathered({"heart": "heart-2's disk is full"}, 500) == "heart: heart-2's disk is full"
    assert gathered({}, 500) == ""


def test_reasons_are_shortened_before_sites_are_left_out() -> None:
    reasons = {f"site-{number}": f"{number} {'long words ' * 30}".strip() for number in range(4)}
    told = gathered(reasons, 450)
    assert len(told) <= 450
    assert all(f"{site}: {site[-1]} long words" in told for site in reasons)
    assert told.count(" …") == 4
    assert "word " not in told


def test_the_last_sites_are_counted_where_there_is_no_room() -> None:
    reasons = {f"site-{number}": f"{number} {'long words ' * 30}".strip() for number in range(40)}
    told = gathered(reasons, 350)
    assert len(told) <= 350
    assert told.endswith(f" …; … and {40 - told.count('site-')} more")
    alike = gathered(dict.fromkeys(reasons, "no answer"), 100)
    assert alike == "site-0, site-1, site-2 and 37 more: no answer"
    assert len(gathered({"a" * 64: "b" * 500, "c" * 64: "d" * 500}, 100)) <= 100
