import jinja2
import pytest

from federation.page import environment, show_bytes, show_count, show_duration, show_share


def test_numbers_are_written_for_people():
    assert [show_bytes(n) for n in (0, 999, 1000, 2_345_678, 10**13, 10**16)] == [
        *("0 B", "999 B", "1.0 kB", "2.3 MB"),
        *("10.0 TB", "10000.0 TB"),
    ]
    assert show_count(1234567) == "1\u202f234\u202f567"
    assert [show_share(share) for share in (None, 0.0, 0.1234, 1.0)] == ["–", "0.0 %", "12.3 %", "100.0 %"]
    assert [show_duration(s) for s in (0, 0.24, 60, 100, 5400, 200_000)] == [
        *("0.0 s", "0.2 s", "60 s", "1.7 min", "1.5 h", "2.3 days"),
    ]


def test_templates_escape_and_refuse_what_is_not_there(tmp_path):
    (tmp_path / "a.j2").write_text("{{ name }} {{ size | bytes }}")
    (tmp_path / "b.j2").write_text("{{ missing }}")
    made = environment(tmp_path)
    assert made.get_template("a.j2").render(name="<b>", size=5) == "&lt;b&gt; 5 B"
    with pytest.raises(jinja2.UndefinedError):
        made.get_template("b.j2").render()
    assert "--accent" in made.get_template("page.css").render()
