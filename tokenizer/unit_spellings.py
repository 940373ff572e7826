"""How hospitals write units beside UCUM: whole texts, parts of compounds, fillers, and what ends a code.

Every line is a reading that `tokenizer.units` takes for certain; what is ambiguous (`units`, `gr`) is left out.
"""

FILLERS = frozenset(
    (
        "",
        "1",
        "unk",
        "unknown",
        "n/a",
        "na",
        "none",
        "null",
        "no unit",
        "unitless",
        "ratio",
        "{ratio}",
        "score",
        "index",
    )
)

# Whole texts, case-sensitive first, then in lower case without spaces; these win over UCUM's own reading (`K/uL` is no
# kelvin, `F` no farad in a clinical record).
SPELLED = {
    **dict.fromkeys(("F", "°f", "degf", "deg.f", "fahrenheit", "degreesf", "degreesfahrenheit", "deg f"), "[degF]"),
    **dict.fromkeys(("C", "°c", "degc", "deg.c", "celsius", "degreesc", "degreescelsius"), "Cel"),
    **dict.fromkeys(("mmhg", "mm(hg)", "mmofhg", "torr"), "mm[Hg]"),
    **dict.fromkeys(("cmh2o", "cmh20", "cm(h2o)"), "cm[H2O]"),
    **dict.fromkeys(("bpm", "beats/min", "beats/minute", "breaths/min", "breaths/minute", "insp/min"), "/min"),
    **dict.fromkeys(("resp/min", "br/min", "breath/min", "beat/min", "{beats}/min", "permin", "perminute"), "/min"),
    **dict.fromkeys(("k/ul", "k/cumm", "k/mm3", "k/mcl", "thou/ul", "thou/mcl", "thousand/ul", "th/ul"), "10*3/uL"),
    **dict.fromkeys(("x10e3/ul", "x10^3/ul", "10e3/ul", "10x3/ul", "10*3/mm3", "x10(3)/ul", "x1000/ul"), "10*3/uL"),
    **dict.fromkeys(("giga/l", "10e9/l", "x10e9/l", "x10^9/l", "10x9/l", "10**9/l", "bil/l"), "10*9/L"),
    **dict.fromkeys(("m/ul", "m/cumm", "m/mm3", "m/mcl", "mil/ul", "mill/mcl", "million/ul", "mill/ul"), "10*6/uL"),
    **dict.fromkeys(("x10e6/ul", "x10^6/ul", "10e6/ul", "10x6/ul", "10*6/mm3", "x10(6)/ul", "mill/mm3"), "10*6/uL"),
    **dict.fromkeys(("tera/l", "10e12/l", "x10e12/l", "x10^12/l", "10x12/l", "10**12/l"), "10*12/L"),
    **dict.fromkeys(("/cumm", "cells/ul", "#/ul", "cells/mcl", "cells/cumm", "cells/mm3", "#/cumm", "cell/ul"), "/uL"),
    **dict.fromkeys(("#/ml", "cells/ml", "copies/ml"), "/mL"),
    **dict.fromkeys(("#/hpf", "/hpf", "cells/hpf", "perhpf"), "/[HPF]"),
    **dict.fromkeys(("#/lpf", "/lpf", "cells/lpf", "perlpf"), "/[LPF]"),
    **dict.fromkeys(("ph", "[ph]", "phunits", "{ph}"), "[pH]"),
    **dict.fromkeys(("percent", "pct", "%ofhgb", "%saturation"), "%"),
    **dict.fromkeys(("ml/min/{1.73_m2}", "ml/min/1.73m2", "ml/min/1.73m^2", "ml/min/1.73sqm"), "mL/min/{1.73_m2}"),
    **dict.fromkeys(("ml/min/1.73", "ml/min/1.73{m2}", "ml/min/1.73_m2", "ml/min/{1.73m2}"), "mL/min/{1.73_m2}"),
    **dict.fromkeys(("dynes.sec.cm-5", "dyn.s/cm5", "dynes*sec/cm5", "dyne.s/cm5"), "dyn.s.cm-5"),
    **dict.fromkeys(("dynes.sec.cm-5/m2", "dynes*sec/cm5/m2"), "dyn.s.cm-5/m2"),
    **dict.fromkeys(("mm/hr", "mm/hour", "mm/1hr"), "mm/h"),
    **dict.fromkeys(("ml/beat",), "mL"),
}

# Components of compounds, and texts by themselves, in lower case.
COMPONENTS = {
    **{
        (prefix + atom).casefold(): prefix + atom
        for atom in ("g", "L", "mol", "eq", "osm", "U", "[IU]", "m", "s")
        for prefix in ("", "k", "d", "c", "m", "u", "n", "p", "f")
    },
    **{(prefix + "iu"): prefix + "[IU]" for prefix in ("", "k", "m", "u")},
    **dict.fromkeys(("mcg", "mcgs"), "ug"),
    **dict.fromkeys(("gm", "gms", "gram", "grams"), "g"),
    **dict.fromkeys(("kgs", "kilogram", "kilograms"), "kg"),
    **dict.fromkeys(("mgs", "milligram", "milligrams"), "mg"),
    **dict.fromkeys(("cc", "mls", "milliliter", "milliliters", "cm3"), "mL"),
    **dict.fromkeys(("liter", "liters", "litre", "litres"), "L"),
    **dict.fromkeys(("mcl",), "uL"),
    **dict.fromkeys(("cumm", "mm3", "mm^3"), "mm3"),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), "min"),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), "h"),
    **dict.fromkeys(("sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("msec", "msecs"), "ms"),
    **dict.fromkeys(("d", "day", "days", "24hr", "24hrs", "24h", "24hours"), "d"),
    **dict.fromkeys(("week", "weeks", "wk", "wks"), "wk"),
    **dict.fromkeys(("month", "months", "mos"), "mo"),
    **dict.fromkeys(("year", "years", "yr", "yrs"), "a"),
    **dict.fromkeys(("m2", "m^2", "sqm", "m**2"), "m2"),
    **dict.fromkeys(("in", "inch", "inches"), "[in_i]"),
    **dict.fromkeys(("ft", "foot", "feet"), "[ft_i]"),
    **dict.fromkeys(("lb", "lbs", "pound", "pounds"), "[lb_av]"),
    **dict.fromkeys(("oz", "ounce", "ounces"), "[oz_av]"),
    "cal": "cal",
    "kcal": "kcal",
    "mmhg": "mm[Hg]",
    "cmh2o": "cm[H2O]",
    "kpa": "kPa",
    "mv": "mV",
    "ma": "mA",
    "bar": "bar",
    "mbar": "mbar",
    "cfu": "[CFU]",
    "percent": "%",
    "deg": "deg",
    "degrees": "deg",
}

# Single symbols that, as the last part of a code, can only be units. Upper and lower case count.
PLAIN_IN_CODES = frozenset(
    (
        *(
            "%",
            "mmHg",
            "mm Hg",
            "mm[Hg]",
            "cmH2O",
            "cm[H2O]",
            "bpm",
            "kPa",
            "°F",
            "°C",
            "degF",
            "degC",
            "[degF]",
            "Cel",
        ),
        *(
            "kg",
            "KG",
            "mg",
            "ug",
            "mcg",
            "ng",
            "pg",
            "g",
            "mL",
            "ml",
            "dL",
            "uL",
            "fL",
            "cm",
            "mm",
            "m2",
            "sec",
            "hours",
        ),
        *(
            "mV",
            "mA",
            "kcal",
            "mmol",
            "umol",
            "nmol",
            "mEq",
            "meq",
            "mOsm",
            "mosm",
            "Inch",
            "inches",
            "lbs",
            "min",
            "UNK",
        ),
        *("[pH]", "{score}", "{ratio}", "[IU]", "[lb_av]", "[in_i]", "msec", "cm2"),
    )
)
# `A/G`, `U/A` and `L/S` are names of ratios, `D/C` is an order: one letter above the bar only where it is a common
# unit, and below it what results are told per.
SHORT_ABOVE = ("", "#", "g", "G", "U", "L", "l", "1", "K", "m")
BELOW = frozenset(
    (
        *("l", "dl", "ml", "ul", "fl", "mcl", "cumm", "mm3", "min", "minute", "hr", "h", "hour", "day", "24hr", "24h"),
        *("kg", "g", "mg", "mmol", "mol", "m2", "1.73m2", "{1.73_m2}", "hpf", "lpf", "[hpf]", "[lpf]", "sec", "beat"),
        *("cm5", "cm[h2o]", "cmh2o", "24 hrs", "24hrs", "24_hr"),
    )
)
