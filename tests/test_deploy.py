"""What deploy/ says exists in the product: commands, options, ports, paths and the policy of the trial."""

import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from client.home import Daemon
from client.policy import Policy
from federation import vitals
from server.home import Ports
from tests.typed import commands

DEPLOY = Path(__file__).parents[1] / "deploy"
GUIDES = [DEPLOY.parent / "README.md", *(DEPLOY.parent / "docs").glob("*.md")]
TEXTS = sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.service"), DEPLOY / "Dockerfile", *GUIDES])
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
API = {
    "StatefulSet": "apps/v1",
    "Service": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}


def calls(text: str) -> Iterator[list[str]]:
    """Every call of fedcomet in a text, as words; comments, prompts and lines that go on are understood."""
    joined = re.sub(r"\\\n[#\s]*", " ", text)
    first = "|".join(words[0] for words in commands() if len(words) == 1)
    for line in joined.splitlines():
        for found in re.findall(rf"(?:^|[\s/`|])fedcomet ((?:{first})(?: [^`|<>;()]*)?)(?=$|[`|<>;()])", line):
            words = re.sub(r"\s#\s.*|&&.*", "", found)
            yield shlex.split(words.replace("'", "").replace("]", "").replace('"', ""))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_and_options_exist(path: Path) -> None:
    known = commands()
    for words in calls(path.read_text(encoding="utf-8")):
        command = known.get(tuple(words[:2])) or known[tuple(words[:1])]
        in_a_group = isinstance(command, click.Group) and len(words) > 1 and not words[1].startswith("--")
        assert not in_a_group, f"{path}: fedcomet {' '.join(words)}"
        options = {name for each in command.params for name in each.opts}
        for word in words:
            assert not word.startswith("--") or word.split("=")[0] in options, f"{path}: {word} of {words}"


def test_calls_are_found_and_a_wrong_one_would_be() -> None:
    found = list(
        calls("# ExecStart=/opt/bin/fedcomet site run /x\n#  docker x fedcomet site join a - \\\n#   --yes < t")
    )
    assert found == [["site", "run", "/x"], ["site", "join", "a", "-", "--yes"]]
    assert ("site", "walk") not in commands()


def test_ports_are_the_products_own() -> None:
    dockerfile, ports, daemon = (DEPLOY / "Dockerfile").read_text(), Ports(), Daemon()
    assert f"EXPOSE {ports.fleet} {ports.control} {ports.enrol} {ports.ui}" in dockerfile
    for text in (dockerfile, *(path.read_text() for path in MANIFESTS)):
        probed = {int(port) for port in re.findall(r'federation\.vitals"?, "(\d+)"', text)}
        assert probed <= {ports.health, daemon.health_port}
        assert probed
    for path in MANIFESTS:
        numbers = set(map(int, re.findall(r"\b(?:port|containerPort): (\d+)", path.read_text())))
        assert numbers - {53, 5432} == {ports.fleet, ports.control, ports.enrol}


def documents() -> list[dict[str, Any]]:
    return [each for path in MANIFESTS for each in yaml.safe_load_all(path.read_text()) if each]


def test_kubernetes_pods_are_locked_in_and_use_what_is_there() -> None:
    kinds = {(each["kind"], each["apiVersion"]) for each in documents()}
    assert kinds == set(API.items())
    for each in documents():
        assert each["metadata"]["namespace"] == "fedcomet"
        if each["kind"] != "StatefulSet":
            continue
        spec = each["spec"]
        pod = spec["template"]["spec"]
        assert spec["replicas"] == 1
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}
        for container in (*pod["initContainers"], *pod["containers"]):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        (container,) = pod["containers"]
        assert tuple(container["args"][:2]) in commands()


def test_the_trial_has_three_sites_with_the_policy_that_lies_there() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = found["services"]
    sites = {name for name, service in services.items() if service["image"] == "fedcomet-site"}
    assert sites == {"heart", "surgical", "general"}
    for name, service in services.items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in found["volumes"] or (DEPLOY / source).exists(), (name, source)
        if name.endswith("-records"):
            assert tuple(service["command"][:1]) in commands()
        else:
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]
    rules = Policy.read(DEPLOY / "trial-policy.toml")
    assert (rules.runs.manifests, rules.privacy.training, rules.secure_aggregation.required) == (
        "any",
        "optional",
        False,
    )


def test_the_image_of_a_site_holds_no_code_of_the_coordinators() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "rm -r server simulation" in text.partition("AS build-site")[2].partition("FROM")[0]
    assert "COPY --from=build-site" in text.partition("AS site")[2]
    ignored = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*", "nothing goes into an image unless it is named: no records, no homes"
    for name in re.findall(r"(?m)^!([\w.]+)$", "\n".join(ignored)):
        assert (DEPLOY.parent / name).exists() or name == "wheelhouse", name


def test_a_site_s_commands_work_without_the_coordinator_s_room(tmp_path: Path) -> None:
    for name in ("fedcomet.py", "client", "federation", "model", "tokenizer"):
        (tmp_path / name).symlink_to(DEPLOY.parent / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = "import sys; sys.path[:0] = ['.']; import client.supernode, client.daemon, client.app, client.status\n"
    program += "assert 'server' not in sys.modules and 'simulation' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze, which is there on Debian")
@pytest.mark.parametrize("path", sorted((DEPLOY / "systemd").glob("*.service")), ids=lambda path: path.name)
def test_systemd_takes_the_units(path: Path, tmp_path: Path) -> None:
    unit = tmp_path / path.name
    unit.write_text(path.read_text().replace("/opt/fedcomet/bin/fedcomet", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_probe_tells_by_its_exit_code() -> None:
    well = {"is": True}
    served = vitals.Vitals(0, lambda: (well["is"], {}), "x")
    try:
        assert vitals.ask(served.port)[0]
        well["is"] = False
        assert vitals.ask(served.port) == (False, '{"healthy": false}')
    finally:
        served.close()
    assert "nothing answers" in vitals.ask(served.port)[1]


def test_a_probe_that_does_not_wait_leaves_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    asked, gone = threading.Event(), threading.Event()

    def health() -> tuple[bool, dict[str, Any]]:
        asked.set()
        gone.wait(10)
        return True, {}

    served = vitals.Vitals(0, health, "x")
    try:
        with socket.create_connection(("127.0.0.1", served.port)) as probe:
            probe.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert asked.wait(10)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes by a reset
        gone.set()
        assert vitals.ask(served.port)[0]
    finally:
        served.close()
    assert capfd.readouterr().err == ""
