"""deploy/: units and manifests are sound, agree with one another, and name only what kvarn has."""

import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvarn.cli import serve
from kvarn.server import create_app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
OF_KUBERNETES = [path for path in MANIFESTS if path.stem not in ("kustomization", "servicemonitor")]
VERSIONS = ("1.31", "1.35")
"""Of Kubernetes, whose schemas the manifests are checked against."""
CLOSING_SECONDS = 10
"""What is left to close, after preStop and draining."""


def manifest(name):
    return yaml.safe_load((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())


def pod():
    return manifest("deployment")["spec"]["template"]["spec"]


def container():
    (only,) = pod()["containers"]
    return only


def unit():
    """The lines of the systemd unit by their names."""
    found = {}
    for line in (DEPLOY / "systemd" / "kvarn.service").read_text().splitlines():
        name, sign, value = line.partition("=")
        if sign and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def command_lines():
    """Each way to start the server, as arguments after `kvarn`."""
    (start,) = unit()["ExecStart"]
    environment = (DEPLOY / "systemd" / "kvarn.env.example").read_text()
    options = re.search(r"KVARN_OPTIONS=(.*)", environment)[1]
    yield shlex.split(start.replace("$KVARN_OPTIONS", options))[1:]
    yield container()["args"]
    yield yaml.safe_load(re.findall(r"^CMD (\[.*\])$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)[-1])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", OF_KUBERNETES, ids=lambda path: path.stem)
def test_a_manifest_fits_the_schema_of_kubernetes(path, version):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(yaml.safe_load(path.read_text()), version, strict=True)


def test_the_schema_finds_a_misspelt_field():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    wrong = manifest("pdb")
    wrong["spec"]["maxUnavailabe"] = wrong["spec"].pop("maxUnavailable")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_manifests_go_together():
    built = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True, check=True
    ).stdout
    kinds = {document["kind"] for document in yaml.safe_load_all(built)}
    assert kinds == {"ServiceAccount", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}


def test_every_manifest_is_named_in_the_kustomization():
    text = (DEPLOY / "kubernetes" / "kustomization.yaml").read_text()
    assert set(re.findall(r"- ([a-z]+\.yaml)", text)) == {p.name for p in MANIFESTS} - {"kustomization.yaml"}


def test_selectors_find_the_pods():
    labels = manifest("deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = (
        manifest("deployment")["spec"]["selector"]["matchLabels"],
        manifest("service")["spec"]["selector"],
        manifest("pdb")["spec"]["selector"]["matchLabels"],
        manifest("networkpolicy")["spec"]["podSelector"]["matchLabels"],
    )
    assert all(selector.items() <= labels.items() for selector in selectors)
    monitored = manifest("servicemonitor")["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= manifest("service")["metadata"]["labels"].items()


def test_a_pod_may_do_nothing_it_need_not():
    security = container()["securityContext"]
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert pod()["automountServiceAccountToken"] is False
    resources = container()["resources"]
    assert resources["requests"] == resources["limits"]


def test_what_a_pod_writes_to_is_a_volume():
    image = (DEPLOY / "Containerfile").read_text()
    home = re.search(r"KVARN_HOME=(\S+)", image)[1]
    mounted = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    assert {home, "/tmp"} <= set(mounted)
    assert set(mounted.values()) == {volume["name"] for volume in pod()["volumes"]}
    assert f"USER {pod()['securityContext']['runAsUser']}:" in image


def test_there_is_time_to_drain():
    args = container()["args"]
    drain = int(args[args.index("--drain-seconds") + 1])
    before = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod()["terminationGracePeriodSeconds"] >= before + drain + CLOSING_SECONDS
    start = next(command_lines())
    drain = int(start[start.index("--drain-seconds") + 1])
    assert int(unit()["TimeoutStopSec"][0]) >= drain + CLOSING_SECONDS


def test_probes_ask_for_routes_that_there_are():
    routes = create_app(None).openapi()["paths"]
    probes = {kind: container()[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    asked = re.search(r"http://127.0.0.1:8000([a-z/]+)", (DEPLOY / "Containerfile").read_text())[1]
    assert {*probes.values(), asked, manifest("servicemonitor")["spec"]["endpoints"][0]["path"]} <= set(routes)


def test_options_are_those_of_kvarn_serve():
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve.command).parameters}
    for arguments in command_lines():
        assert arguments[0] == "serve"
        assert {a for a in arguments if a.startswith("--")} <= known


def test_what_the_container_is_made_from_is_there():
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    sources = [source for copied in copies for source in copied]
    assert {"src", "native", "pyproject.toml"} <= set(sources)
    kept = {line[1:] for line in (DEPLOY / "Containerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert set(sources) <= kept
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_sound_and_hardened(tmp_path):
    text = (DEPLOY / "systemd" / "kvarn.service").read_text()
    installed = tmp_path / "kvarn.service"
    installed.write_text(text.replace("/opt/kvarn/bin/kvarn", sys.executable))
    for arguments in (["verify"], ["security", "--offline=true", "--threshold=20"]):  # exposure of 2.0 of 10
        ended = subprocess.run(["systemd-analyze", *arguments, str(installed)], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr
        assert "Unknown" not in ended.stderr
