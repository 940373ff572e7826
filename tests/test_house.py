"""The rules of the house: who may import whom, checked on what Python really imports."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]

IMPORT_MODEL_ALONE = """
import importlib, pkgutil, sys
for name in ("polars", "pyarrow", "flwr", "grpc", "sqlalchemy"):
    sys.modules[name] = None  # importing it raises
import model
names = sorted(module.name for module in pkgutil.iter_modules(model.__path__))
for name in names:
    importlib.import_module(f"model.{name}")
print(*names)
"""


def test_the_model_room_needs_no_polars_flower_grpc_or_sql() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_MODEL_ALONE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) >= {"decoder", "train", "rollout", "checkpoint"}


WATCHING = """
import sys
import client.daemon, client.dashboard, client.status, server.daemon, server.dashboard, server.ledger_view
assert "torch" not in sys.modules
"""


def test_daemons_dashboards_and_status_commands_load_no_pytorch() -> None:
    run = subprocess.run([sys.executable, "-c", WATCHING], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_rooms_import_in_one_direction() -> None:
    program = Path(sysconfig.get_path("scripts"), "lint-imports")
    run = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_benchmarks_are_this_project_s_own_whatever_else_is_installed() -> None:
    for path in sorted((ROOT / "benchmarks").glob("[!_]*.py")):
        found = importlib.util.find_spec(f"benchmarks.{path.stem}")
        assert found is not None, path
        assert found.origin == str(path)
