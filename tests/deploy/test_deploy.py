"""The files of examples/deploy: what they name exists; and the tools for which they are take them, where installed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from fastload.cli import app
from fastload.config import parse_bytes
from fastload.daemon.config import read_config

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
UNIT = DEPLOY / "fastload@.service"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
RULES = DEPLOY / "prometheus-rules.yaml"
DASHBOARD = DEPLOY / "grafana-dashboard.json"


def manifests() -> list[dict[str, Any]]:
    return [each for path in MANIFESTS for each in yaml.safe_load_all(path.read_text())]


def manifest(kind: str) -> dict[str, Any]:
    return next(each for each in manifests() if each["kind"] == kind)


def containers(kind: str) -> Iterator[dict[str, Any]]:
    spec = manifest(kind)["spec"]["template"]["spec"]
    yield from (*spec.get("initContainers", []), *spec["containers"])


def test_every_file_is_in_the_readme() -> None:
    named = set(re.findall(r"\]\(([\w@./-]+)\)", (DEPLOY / "README.md").read_text()))
    files = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    assert files == {name for name in named if not name.startswith("..")} | {"README.md"}


# Configurations


def test_the_daemon_takes_the_configuration() -> None:
    config = read_config(DEPLOY / "fastload.toml", {})
    assert [table.name for table in config.data] == ["imagenet"]


def test_the_daemon_takes_the_configuration_in_the_config_map(tmp_path: Path) -> None:
    path = tmp_path / "fastload.toml"
    path.write_text(manifest("ConfigMap")["data"]["fastload.toml"])
    assert [table.pin for table in read_config(path, {}).data] == [True]


# Command lines

COMMANDS = typer.main.get_command(app)


def check_command(words: list[str]) -> None:
    """Whether `fastload` with these words names a verb and its options."""
    assert isinstance(COMMANDS, TyperGroup)
    verb, *rest = words
    parameters = COMMANDS.commands[verb].params
    options = {name for each in parameters for name in (*each.opts, *each.secondary_opts)}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options, words


def test_commands_and_their_options_exist() -> None:
    start = next(line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart="))
    found = [shlex.split(start)[1:]]
    for kind in ("DaemonSet", "Job"):
        for container in containers(kind):
            if "command" not in container:
                found.append(container["args"])
            elif container["command"][:2] == ["sh", "-c"]:
                script = container["args"][0].replace("\\\n", " ")
                found += [shlex.split(words)[1:] for words in re.findall(r"fastload [^|&;>\n]+", script)]
            for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                if name in container:
                    program, *words = container[name]["exec"]["command"]  # not httpGet: nothing listens there
                    assert program == "fastload"
                    found.append(words)
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if match := re.search(r"(?:^RUN fastload |CMD )(.+)", line):
            words = json.loads(match[1]) if match[1].startswith("[") else shlex.split(match[1])
            found.append([word for word in words if word != "fastload"])
    for words in found:
        check_command(words)
    assert {words[0] for words in found} == {"daemon", "status", "warm", "compile"}


# Kubernetes


def test_the_daemons_memory_is_above_the_arena() -> None:
    config = tomllib.loads(manifest("ConfigMap")["data"]["fastload.toml"])
    daemon = next(each for each in containers("DaemonSet") if each["name"] == "daemon")
    for kind in ("requests", "limits"):
        memory = parse_bytes(daemon["resources"][kind]["memory"] + "B", "memory")
        assert memory >= parse_bytes(config["ram_bytes"], "ram_bytes") + (4 << 30)


def test_jobs_are_the_daemons_user_and_mount_its_folder() -> None:
    daemon, job = (manifest(kind)["spec"]["template"]["spec"] for kind in ("DaemonSet", "Job"))
    for name in ("runAsUser", "runAsGroup", "runAsNonRoot"):
        assert daemon["securityContext"][name] == job["securityContext"][name]
    folders = {each["hostPath"]["path"] for spec in (daemon, job) for each in spec["volumes"] if "hostPath" in each}
    assert len(folders) == 1
    for kind in ("DaemonSet", "Job"):
        for container in containers(kind):
            assert "/cache" in [mount["mountPath"] for mount in container["volumeMounts"]]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize(
    ("codes", "ends"),
    [
        # Of `status` and `warm --check`, in the order in which they are asked: no daemon, less than all, all.
        ([3, 0, 3, 0, 0], 0),
        ([0, 1], 1),
        ([1], 1),
    ],
    ids=["waits", "fails", "refused"],
)
def test_the_job_waits_for_the_daemon_and_its_data(tmp_path: Path, codes: list[int], ends: int) -> None:
    container = next(each for each in containers("Job") if each["name"] == "wait-for-data")
    left = tmp_path / "codes"
    left.write_text("".join(f"{code}\n" for code in codes))
    next_code = f'code=$(head -n 1 "{left}"); sed -i 1d "{left}"; exit "$code"'
    for name, script in (("fastload", next_code), ("sleep", "exit 0")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
    done = subprocess.run(
        [*container["command"], *container["args"]], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout=60
    )
    assert done.returncode == ends
    assert left.read_text() == ""


# Metrics


def promql() -> Iterator[str]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


def test_metrics_of_rules_and_dashboard_exist() -> None:
    documented = dict(
        re.findall(r"^\| `(fastload_\w+)` \| (\w+) ", (DEPLOY / "../../docs/operations.md").read_text(), re.M)
    )
    shown = {f"{name}_bucket" if kind == "histogram" else name for name, kind in documented.items()}
    groups = yaml.safe_load(RULES.read_text())["groups"]
    recorded = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    used = set()
    for expression in promql():
        for name in recorded:
            expression = expression.replace(name, "")
        assert not re.search(r"\w:\w", expression), expression
        used |= set(re.findall(r"\bfastload_\w+", expression))
    assert len(used) > 30
    assert used <= shown, used - shown


def test_labels_of_rules_and_dashboard_exist() -> None:
    labels = {"instance", "le", "data_set", "tier", "cause", "rank", "endpoint"}
    for expression in promql():
        for names in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", expression):
            assert {name.strip() for name in names.split(",")} <= labels, expression
        for names in re.findall(r"\{([^}]*)\}", expression):
            assert {re.split("[=!]", name)[0] for name in names.split(",")} <= labels, expression


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["annotations"]["description"].endswith("."), rule["alert"]
                assert rule["labels"]["severity"] in ("critical", "warning", "info")


# systemd

# As systemd.service(5), systemd.exec(5), systemd.kill(5) and systemd.resource-control(5) have them.
OPTIONS = """
Type User ExecStart CacheDirectory CacheDirectoryMode EnvironmentFile WatchdogSec Restart RestartSec TimeoutStopSec
KillMode
LimitNOFILE NoNewPrivileges CapabilityBoundingSet AmbientCapabilities UMask ProtectSystem ProtectHome PrivateTmp
PrivateDevices ProtectClock ProtectHostname ProtectControlGroups ProtectKernelLogs ProtectKernelModules ProtectProc
ProtectKernelTunables LockPersonality RemoveIPC RestrictAddressFamilies RestrictNamespaces RestrictRealtime
RestrictSUIDSGID SystemCallArchitectures SystemCallFilter SystemCallErrorNumber
"""


def test_options_of_the_unit_exist() -> None:
    section, found = "", {}
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            section = line
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[section, name] = value
    assert {name for section, name in found if section == "[Service]"} == set(OPTIONS.split())
    assert {name for section, name in found if section == "[Unit]"} == {"Description", "After", "Wants"}
    assert found["[Service]", "Type"] == "notify-reload"
    assert found["[Service]", "User"] == "%i"
    # Longer than the daemon takes to end.
    assert int(found["[Service]", "TimeoutStopSec"]) > 10
    words = shlex.split(found["[Service]", "ExecStart"])
    assert f"/var/cache/{found['[Service]', 'CacheDirectory']}" in words


# Tools


def tool(name: str) -> str:
    """Its path; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def installed_unit(folder: Path) -> Path:
    """The unit as on a machine that has the program, of a user who is there."""
    unit = folder / UNIT.name
    text = UNIT.read_text().replace("/opt/fastload/bin/fastload", "/bin/true")
    unit.write_text(text.replace("User=%i", "User=daemon"))
    return unit


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    unit = installed_unit(tmp_path)
    said = run(analyze, "verify", "--man=no", unit.with_name("fastload@alice.service"))
    assert str(unit) not in said, said


def test_the_unit_is_hardened(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    run(analyze, "security", "--offline=true", "--no-pager", "--threshold=20", installed_unit(tmp_path))  # of 100


def test_prometheus_takes_the_rules() -> None:
    assert "SUCCESS" in run(tool("promtool"), "check", "rules", RULES)


def test_alerts_fire_where_something_is_wrong() -> None:
    assert "SUCCESS" in run(tool("promtool"), "test", "rules", Path(__file__).with_name("alerts.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_takes_the_manifests(path: Path) -> None:
    run(tool("kubernetes-validate"), path)


def test_hadolint_takes_the_dockerfile() -> None:
    run(tool("hadolint"), DEPLOY / "Dockerfile")
