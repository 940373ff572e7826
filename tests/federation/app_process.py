"""What a nursery imports in tests: in the place of Flower's app, a child that does what its token says."""

import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.supernode.runtime import run_clientapp


def app(token: str, **told: Any) -> None:
    path, deed = token.split("|")
    torch = sys.modules.get("torch")
    found = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "threads": threading.active_count(),
        "drawn": [random.random(), float(np.random.default_rng().random())],
        "cuda": torch is not None and torch.cuda.is_initialized(),
        "product": "client.app" in sys.modules,
        "told": sorted(told),
    }
    aside = Path(path).with_suffix(".partial")
    aside.write_text(json.dumps(found))
    aside.replace(path)
    print("my last words", flush=True)
    if deed == "wait":
        time.sleep(600)
    raise SystemExit(int(deed))


vars(run_clientapp)["run_clientapp"] = app
