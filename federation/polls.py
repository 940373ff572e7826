"""How long to wait until the next look at something that doesn't call by itself."""

from dataclasses import dataclass

_SHARE = 0.1


@dataclass(frozen=True)
class Polls:
    """Waits that grow with what has been waited already: a look comes at most a tenth of that too late.

    So rounds of seconds lose no time to polling, and those of hours ask for nothing often.

    Attributes:
        least_s, most_s: bounds of a wait.
    """

    least_s: float
    most_s: float

    def after(self, waited_s: float) -> float:
        """Give the seconds until the next look, after so many seconds of waiting.

        >>> [Polls(0.05, 1.0).after(waited_s) for waited_s in (0.0, 2.0, 60.0)]
        [0.05, 0.2, 1.0]
        """
        return min(self.most_s, max(self.least_s, _SHARE * waited_s))
