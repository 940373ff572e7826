"""Where a site's things are, and how it computes: what its daemon, its commands and a simulation know of it.

What a site does is in `client.site`, which needs PyTorch; here nothing does.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from federation.messages import is_site_name
from model.settings import Machine
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.events import MedsDataset
from tokenizer.prepare import Prepared, records_of
from tokenizer.settings import AS_THEY_ARE, agreed


@dataclass(frozen=True)
class SiteFiles:
    """A site's name, its records (a MEDS dataset's folder) and the folder for what it must not forget.

    Attributes:
        name: up to 64 letters, digits, '.', '_' and '-'.
        data, state: the folders.
        settings: what is done to the records before they are surveyed or encoded: a TOML file, "standard", or "none".
        machine: how it computes.
        snapshot_minutes: how much of a round's work may be lost when it is stopped in the middle; 0 loses nothing.
        policy: the site's rules (a TOML file, see `client.policy`); without them it answers whoever reaches it.
        budget: SQLAlchemy URL of the privacy budget's database; a file in `state` if empty.
    """

    name: str
    data: Path
    state: Path
    settings: str = AS_THEY_ARE
    machine: Machine = field(default_factory=Machine)
    snapshot_minutes: float = 10.0
    policy: Path | None = None
    budget: str = ""

    def __post_init__(self) -> None:
        if not is_site_name(self.name):
            raise ConfigError(
                f"{self.name!r} can't be the name of a site: use up to 64 letters, digits, '.', '_' and '-'."
            )

    def node_config(self) -> dict[str, bool | float | int | str]:
        """What a Flower node is told to be this site; `client.app` reads it back."""
        folders = {"name": self.name, "data": str(self.data), "state": str(self.state)}
        policy = {} if self.policy is None else {"policy": str(self.policy)}
        budget = {"budget": self.budget} if self.budget else {}
        rest = {"settings": self.settings, "snapshot_minutes": self.snapshot_minutes, **vars(self.machine)}
        return {**folders, **policy, **budget, **rest}

    def records(self, codebook: Codebook | None = None) -> MedsDataset | Prepared:
        """Open the records as they are to be read, and by this codebook.

        Raises:
            ConfigError: The codebook was made of records to which something else was done.
        """
        return records_of(MedsDataset.open(self.data), agreed(self.settings, codebook).preparation)

    def note_trouble(self, asked: str, why: str) -> None:
        """Note, for `fedcomet site run`, why a request of some kind got no answer; where it did (""), that is over."""
        with contextlib.suppress(OSError):
            if why:
                self._trouble.write_text(f"{asked}\n{why}")
            elif self._trouble.exists() and asked == self._trouble.read_text().partition("\n")[0]:
                self._trouble.unlink()

    def trouble(self) -> str:
        """Say what stood in the way of the last answers, and what to do; empty if nothing."""
        try:
            asked, _, why = self._trouble.read_text().partition("\n")
        except OSError:
            return ""
        return why and (
            f"an answer to {asked} {why}; this is told until such an answer is given, or the daemon is started anew"
        )

    def forget_trouble(self) -> None:
        """Drop what was noted."""
        self._trouble.unlink(missing_ok=True)

    @property
    def _trouble(self) -> Path:
        return self.state / "trouble"
