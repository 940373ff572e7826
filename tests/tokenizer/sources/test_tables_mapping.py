"""A mapping file is read whole, and every fault is named with its place."""

import pytest

from tests.tokenizer.sources.site import TABLE, write
from tokenizer.errors import ConfigError
from tokenizer.sources.mapping import Template, read_mapping


def faults(tmp_path, text):
    with pytest.raises(ConfigError) as refused:
        read_mapping(write(tmp_path / "m.toml", text))
    return str(refused.value).replace(f"{tmp_path}/m.toml: ", "").splitlines()


def test_all_faults_are_told_at_once(tmp_path):
    text = """
    [[lookup]]
    name = "d"
    files = "d.csv"
    keys = "itemid"
    [[table]]
    name = "lab"
    files = "/a/*.csv"
    subject = "sid"
    nul = "x"
    time = { offset = "o", unit = "minute", orign = 2010-01-01 }
    [[table.event]]
    code = "LAB//{itemid:uper}"
    value = 3
    where = { b = { noot = "x", matches = "(a" } }
    [[table.event]]
    code = "V//{eac"
    """
    lines = faults(tmp_path, text)
    assert sorted(line for line in lines if "matches" not in line) == [
        "lookup[1].key (d) is missing",
        "lookup[1].keys (d) is not a known key; did you mean key?",
        "table[1].event[1].code (lab): 'LAB//{itemid:uper}': uper is not a format; did you mean upper?",
        "table[1].event[1].value (lab) = 3: Input should be a valid string",
        "table[1].event[1].where.b.noot (lab) is not a known key; did you mean not?",
        "table[1].event[2].code (lab): 'V//{eac': a brace is open or closed alone; write {{ for a brace itself",
        "table[1].nul (lab) is not a known key; did you mean null?",
        "table[1].time.orign (lab) is not a known key; did you mean origin?",
        "table[1].time.unit (lab) = 'minute': Input should be 'years', 'months', 'days', 'hours', 'minutes',"
        " 'seconds' or 'HH:MM'",
    ]
    assert any(line.startswith("table[1].event[1].where.b.matches (lab): not a regular expression") for line in lines)


TIME = 'time = "time"'


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (TIME, "", "event 1 (LAB//{test}) needs a time, or static = true"),
        (TIME, 'time = { column = "a", year = "b" }', "give exactly one of column, date, year, offset and age"),
        (TIME, 'time = { column = "a", unit = "days" }', "unit doesn't go with column"),
        (TIME, 'time = { offset = "a", unit = "days" }', "offset needs an origin"),
        (TIME, 'time = { offset = "a", origin = 2010-01-01 }', "offset needs unit = one of"),
        (TIME, 'time = { age = "a", unit = "hours", origin = 2010-01-01 }', "age has a unit of years"),
        (TIME, "time = 2010-01-01T00:00:00+02:00", "date is local time; leave the zone out"),
        (
            TIME,
            'time = { moment = "admision" }\n[moment.x]\ncolumn="y"',
            "there is no [moment.admision]; known here: x",
        ),
        (TIME, 'time = { moment = "x" }\n[moment.x]\nmoment = "x"', "[moment.x] is told by itself"),
        ('files = "labs.csv"', 'files = "../labs.csv"', "'../labs.csv' must be a path inside the folder"),
        ('name = "labs"', 'name = "la.bs"', "String should match pattern"),
        (TIME, f'{TIME}\ndelimiter = "||"', "String should have at most 1 character"),
        (TIME, f'{TIME}\ndelimiter = "§"', "delimiter must be one ASCII character"),
        (TIME, f'{TIME}\nencoding = "utf8000"', "encoding 'utf8000' is not known; try utf-8, cp1252 or latin-1"),
        (TIME, f"{TIME}\nheader = false", "header = false needs columns"),
        (TIME, f'{TIME}\ncolumns = ["a"]', "it needs header = false"),
        (TIME, f'{TIME}\njoin = [{{ lookup = "d", on = "a" }}]', "no [[lookup]] 'd'"),
        (TIME, f"{TIME}\nfrom_file.x = 'a'", "must have one group in parentheses"),
        (TIME, f'{TIME}\ndrop = [{{ name = "a", where = {{}} }}]', "Dictionary should have at least 1 item"),
        ('value = "value"', "static = true\ntime = 2010-01-01", "a static fact has no time"),
        ('value = "value"', 'unit = "mg"', "unit needs value"),
        ('value = "value"', 'each = ["a"]', "each = [columns] and {each} in the code go together"),
        ('value = "value"', 'once = "encounter"', 'once = "encounter" needs encounter'),
        ('value = "value"', "where.a = {}", "give a test: is, not, matches, missing, above or below"),
        ("{test}", "{}", "name a column between the braces"),
        ("LAB//{test}", "", "must not be empty"),
        ("[[table]]", "[[tabel]]", "tabel is not a known key; did you mean table?"),
    ],
)
def test_a_fault_is_named(tmp_path, old, new, fault):
    assert old in TABLE
    assert any(fault in line for line in faults(tmp_path, TABLE.replace(old, new)))


def test_what_is_no_mapping_at_all(tmp_path):
    assert "is not valid TOML" in faults(tmp_path, "a = ")[0]
    assert faults(tmp_path, "") == ["table is missing"]
    with pytest.raises(ConfigError, match="can't be read"):
        read_mapping(tmp_path / "nothing.toml")


def test_names_may_stand_once(tmp_path):
    assert faults(tmp_path, TABLE + TABLE) == ["the file: two tables or lookups are named 'labs'"]


def test_short_forms_mean_the_same_as_long_ones(tmp_path):
    short = TABLE.replace(TIME, f"{TIME}\nunique = 'id'") + "where.test = 1\n"
    long = TABLE.replace('"labs.csv"', '["labs.csv"]').replace(TIME, 'time = {column = "time"}\nunique = ["id"]')
    long += 'where.test.is = ["1"]\n'
    one, other = (read_mapping(write(tmp_path / "m.toml", text)) for text in (short, long))
    assert one == other


def test_defaults_hold_for_tables_that_say_nothing(tmp_path):
    text = '[defaults]\ndelimiter = ";"\nnull = "x"\n' + TABLE.replace(TIME, f'{TIME}\nnull = ["y"]')
    mapping = read_mapping(write(tmp_path / "m.toml", text))
    layout = mapping.layout(mapping.table[0])
    assert (layout.delimiter, layout.null) == (";", ("y",))


def test_templates():
    assert Template.parse("A{{b}}//{x y:upper}").parts == ("A{", "b}", "//", ("x y", "upper"))
    assert Template.parse("{each}//{b}").fill("each", "hr").parts == ("hr", "//", ("b", ""))
    assert Template.parse(3) == 3
