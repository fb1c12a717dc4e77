"""Checks of the deployment files by reading them; they are not built, because there is no Docker engine."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: (name, rest of the line)."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def dashboard() -> dict:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "tomoe.json").read_text())


def dashboard_metrics() -> set[str]:
    """Names of the metrics in the dashboard's queries."""
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    queries += [variable["definition"] for variable in dashboard()["templating"]["list"]]
    return set(re.findall(r"\b(?:vllm:|tomoe_)\w+", " ".join(queries)))


def test_image_is_vllms_of_the_tested_release():
    tested = re.search(r"^vllm==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    found = instructions()
    assert ("ARG", f"VLLM_VERSION={tested}") in found
    images = [rest for name, rest in found if name == "FROM"]
    assert images == ["vllm/vllm-openai:v${VLLM_VERSION} AS build", "vllm/vllm-openai:v${VLLM_VERSION}"]


def test_container_runs_as_its_own_user_and_has_a_health_check():
    found = dict(instructions())
    assert found["USER"] == "tomoe"
    assert "--uid 10001" in next(rest for name, rest in instructions() if name == "RUN" and "useradd" in rest)
    assert json.loads(found["ENTRYPOINT"]) == ["tomoe", "serve"]
    assert "/health" in found["HEALTHCHECK"]
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))


def test_all_cache_folders_are_in_the_volume():
    variables = dict(word.split("=", 1) for word in shlex.split(dict(instructions())["ENV"]))
    folders = {name: value for name, value in variables.items() if name.endswith(("HOME", "_DIR", "_ROOT"))}
    assert len(folders) >= 7
    assert all(value.startswith("/cache") for value in folders.values()), folders


def test_all_packages_of_the_wheel_are_copied_into_the_build():
    copied = {rest.split()[0] for name, rest in instructions() if name == "COPY"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    folders = {package.partition("/")[0] for package in packages}
    assert folders == {"tomoe_vllm", "training", "serving"}
    assert folders <= copied
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{folder}" for folder in folders} <= set(ignored)


def test_every_service_is_read_only_without_capabilities_and_pinned():
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        for port in service.get("ports", []):
            assert port.startswith(("127.0.0.1:", "${TOMOE_BIND:-127.0.0.1}:")), port


def test_model_is_mounted_read_only_where_the_image_serves_it():
    (model,) = [v for v in COMPOSE["services"]["server"]["volumes"] if isinstance(v, dict)]
    assert model["read_only"] is True
    assert [model["target"]] == json.loads(dict(instructions())["CMD"])


def test_files_mounted_by_compose_exist():
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            if isinstance(volume, str) and volume.startswith("./"):
                assert (DEPLOY / volume.split(":")[0]).exists(), volume


def test_prometheus_scrapes_the_server_and_grafana_reads_prometheus():
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert scraped["targets"] == ["server:8000"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in dashboard()["panels"] if panel["type"] != "row"} == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "tomoe.yaml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts


def test_panels_of_the_dashboard_do_not_overlap():
    taken = set()
    for panel in dashboard()["panels"]:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])
    assert len(dashboard_metrics()) >= 10
