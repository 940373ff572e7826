"""Where real records lie, for the tests that compare with them: $FEDCOMET_DATA, or shared/data beside the checkout."""

import os
from pathlib import Path

DATA = Path(os.environ.get("FEDCOMET_DATA") or Path(__file__).parents[2] / "shared" / "data")
