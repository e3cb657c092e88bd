"""Do the files of `deploy/` parse, agree with each other, and name only what exists?

No container engine runs here, so each is read as its reader would: instructions, paths, options, ports,
probes, and every metric's name.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
import yaml

from slipstream.cli.main import app
from slipstream.engine.health import Health
from slipstream.engine.request_counts import RequestCounts
from slipstream.serve.auth import OPEN_PATHS
from slipstream.serve.metrics import ServeMetrics
from slipstream.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
USER = 10001
INSTRUCTIONS = {
    *(
        "ARG",
        "FROM",
        "RUN",
        "COPY",
        "WORKDIR",
        "ENV",
        "VOLUME",
        "USER",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
    ),
    *("ENTRYPOINT", "CMD"),
}
METRIC = re.compile(r"slipstream:\w+")


def read_yaml(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def instructions() -> list[tuple[str, str]]:
    """Return the Containerfile's instructions with continued lines joined."""
    lines = [
        line
        for line in (DEPLOY / "Containerfile").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]  # type: ignore[misc]


def serve_options() -> set[str]:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {option for param in command.params for option in param.opts}


def check_arguments(arguments: list[str]) -> None:
    unknown = {one.split("=")[0] for one in arguments if one.startswith("--")} - serve_options()
    assert not unknown, f"slipstream serve has no {unknown}"


# --- Containerfile ---


def test_containerfile_holds_known_instructions_in_order() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= INSTRUCTIONS
    assert names[:2] == ["ARG", "FROM"] and names.count("FROM") == 2
    assert names[-2:] == ["ENTRYPOINT", "CMD"]


def test_containerfile_copies_what_exists_and_is_let_through() -> None:
    ignore = (DEPLOY / "Containerfile.dockerignore").read_text(encoding="utf-8").split("\n")
    passed = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore and all((ROOT / path).exists() for path in passed)
    stages = [rest.split()[-1] for name, rest in instructions() if name == "FROM"]
    sources: list[str] = []
    for name, rest in instructions():
        if name != "COPY":
            continue
        *paths, _ = shlex.split(rest)
        if paths[0].startswith("--from="):
            assert paths[0].removeprefix("--from=") in stages
            continue
        sources += [path.rstrip("/") for path in paths]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == path or source.startswith(f"{path}/") for path in passed), source
    assert set(passed) <= set(sources), "nothing is let through that is not copied"


def test_containerfile_builds_the_wheel_as_the_tool_takes_it() -> None:
    from tools.build_wheels import PLATFORMS

    build = next(rest for name, rest in instructions() if name == "RUN" and "build_wheels.py" in rest)
    assert '"linux-$(uname -m)"' in build and {"linux-x86_64", "linux-aarch64"} <= set(PLATFORMS)
    install = next(rest for name, rest in instructions() if name == "RUN" and "[serve" in rest)
    extras = re.findall(r"\[([\w,]+)\]", install)[0].split(",")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


def test_containerfile_runs_as_nobody_in_particular() -> None:
    found = dict(instructions())
    assert found["USER"] == f"{USER}:{USER}"
    assert found["STOPSIGNAL"] == "SIGTERM" and found["EXPOSE"] == "8000"
    assert "/health" in found["HEALTHCHECK"] and "/health" in OPEN_PATHS
    program, command, *arguments = json.loads(found["ENTRYPOINT"])
    assert (program, command) == ("slipstream", "serve")
    check_arguments(arguments)
    # Python inside the check is Python.
    check = json.loads(found["HEALTHCHECK"].split("CMD", 1)[1])
    compile(check[-1], "healthcheck", "exec")


# --- compose, Prometheus, Grafana ---


def test_compose_starts_the_server_with_what_it_takes() -> None:
    (compose,) = read_yaml("compose.yaml")
    server = compose["services"]["server"]
    assert (DEPLOY / server["build"]["context"]).resolve() == ROOT
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    arguments = {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}
    assert set(server["build"]["args"]) <= arguments
    check_arguments(server["command"])
    assert server["read_only"] is True and server["cap_drop"] == ["ALL"]
    assert all(
        port.startswith("127.0.0.1:") for one in compose["services"].values() for port in one.get("ports", [])
    )
    grace_s = int(server["stop_grace_period"].removesuffix("s"))
    assert grace_s > ServeSettings().drain_timeout_s


def test_compose_names_what_it_declares() -> None:
    (compose,) = read_yaml("compose.yaml")
    for service in compose["services"].values():
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        assert set(service.get("depends_on", [])) <= set(compose["services"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
            elif not source.startswith("$"):
                assert source in compose["volumes"], source
        if "image" in service and "$" not in service["image"]:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "a version, never latest"


def test_prometheus_reads_the_server_that_compose_starts() -> None:
    (prometheus,) = read_yaml("prometheus.yml")
    (compose,) = read_yaml("compose.yaml")
    (job,) = prometheus["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and job["metrics_path"] not in OPEN_PATHS
    ((host, port),) = (target.split(":") for one in job["static_configs"] for target in one["targets"])
    assert host in compose["services"] and f"127.0.0.1:{port}:{port}" in compose["services"][host]["ports"]
    secret = job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert secret in compose["services"]["prometheus"]["secrets"]
    assert f"--api-key-file=/run/secrets/{secret}" in compose["services"]["server"]["command"]


def test_grafana_finds_its_source_and_dashboards() -> None:
    (sources,) = read_yaml("grafana/provisioning/datasources/prometheus.yaml")
    (providers,) = read_yaml("grafana/provisioning/dashboards/slipstream.yaml")
    (compose,) = read_yaml("compose.yaml")
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == providers["providers"][0]["options"]["path"]
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana" / "dashboards" / Path(home).name).is_file()


def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "slipstream.json").read_text(encoding="utf-8"))


def served_names() -> set[str]:
    """Return the name of every series that `/metrics` shows, histograms' parts included."""
    info = SimpleNamespace(device="cpu", dtype="float32", quantization="none")
    service = SimpleNamespace(
        counts=RequestCounts(),
        info=info,
        health=lambda: Health("ready"),
        client=SimpleNamespace(last_stats=dict),
    )
    context: Any = SimpleNamespace(model_names=("m",), admission=None, has_service=True, service=service)
    metrics = ServeMetrics(context)
    metrics.count_http({"method": "GET"}, 404)
    text = metrics.render()[0].decode()
    return {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def expressions() -> list[str]:
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    return found + [one.get("definition", "") for one in dashboard()["templating"]["list"]]


def test_every_metric_of_the_dashboard_is_served() -> None:
    named = {name for text in expressions() for name in METRIC.findall(text)}
    served = served_names()
    assert len(named) > 20
    assert named <= served, named - served


def test_the_dashboard_shows_every_metric() -> None:
    """Whatever is exported has a place, but for what says the same."""
    shown = {name for text in expressions() for name in METRIC.findall(text)}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    hidden = {re.sub(r"_(bucket|sum|count)$", "", name) for name in served_names()} - bases
    assert hidden == {"slipstream:engine_asleep"}


def test_the_dashboard_is_well_formed() -> None:
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and board["uid"] == "slipstream"
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    variables = {one["name"] for one in board["templating"]["list"]}
    used = {name for text in expressions() for name in re.findall(r"\$(\w+)", text)}
    assert used <= variables | {"__rate_interval"}
    for text in expressions():
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}"), text


# --- Kubernetes ---


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (one for one in read_yaml("kubernetes.yaml") if one["kind"] == kind)
    return found


@pytest.fixture
def pod() -> dict[str, Any]:
    return of_kind("Deployment")["spec"]["template"]["spec"]


def test_kubernetes_asks_the_routes_that_answer_probes(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert paths == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert set(paths.values()) <= OPEN_PATHS, "probes bring no key"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": int(dict(instructions())["EXPOSE"])}
    assert all(container[name]["httpGet"]["port"] in ports for name in paths)
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600, "loading takes its time"


def test_kubernetes_runs_it_with_no_more_rights_than_it_needs(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == USER
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]} and "privileged" not in rights
    assert pod["automountServiceAccountToken"] is False
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert "memory" in container["resources"]["limits"]


def test_kubernetes_gives_it_what_it_writes_and_reads(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    check_arguments(container["args"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert mounts["cache"] == "/cache" and mounts["tmp"] == "/tmp"
    claim = volumes["cache"]["persistentVolumeClaim"]["claimName"]
    assert claim == of_kind("PersistentVolumeClaim")["metadata"]["name"]
    assert f"--api-key-file={mounts['keys']}/keys" in container["args"]
    drain_s = ServeSettings().drain_timeout_s
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > drain_s + pause_s


def test_kubernetes_labels_lead_to_the_pods() -> None:
    deployment, service = of_kind("Deployment"), of_kind("Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]


def test_nothing_secret_is_in_the_files() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DEPLOY.rglob("*")) if path.is_file())
    assert "kind: Secret" not in text and not re.search(r"\bsk-\w|[0-9a-f]{32}", text)
