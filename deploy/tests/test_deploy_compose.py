"""What can be checked of deploy/ without a Docker engine: its commands, variables, references and metric names are
those of the code."""

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from shruntime.settings import CommonSettings
from streamhouse.cli.app import cli
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_ingest.settings import IngestSettings
from streamhouse_query.settings import QuerySettings
from streamhouse_segmenter.settings import SegmenterSettings

DEPLOY = Path(__file__).resolve().parents[1]
ROOT = DEPLOY.parent
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service and "profiles" not in service}
SETTINGS: dict[str, type[CommonSettings]] = {
    "coordinator": CoordinatorSettings,
    "ingest": IngestSettings,
    "segmenter": SegmenterSettings,
    "query": QuerySettings,
}
# host:port that the containers we did not write listen on
FOREIGN_PORTS = {
    "postgres": {5432},
    "minio": {9000, 9001},
    "rabbitmq": {5672, 15672, 15692},
    "redis": {6379},
    "otel-collector": {4317, 8888},
    "jaeger": {4317, 16686},
    "prometheus": {9090},
    "grafana": {3000},
}


def environ_of(service: dict[str, Any]) -> dict[str, str]:
    """The variables a container gets: env files in order, then its own."""
    values: dict[str, str] = {}
    for name in service.get("env_file", []):
        for line in (DEPLOY / name).read_text().splitlines():
            if line and not line.startswith("#"):
                key, separator, value = line.partition("=")
                assert separator, f"{name}: {line!r} is not KEY=VALUE"
                values[key] = value
    values.update({key: str(value) for key, value in service.get("environment", {}).items()})
    return values


def kind_of(service: dict[str, Any]) -> str:
    return str(service["command"][0])


def ports_of(name: str) -> set[int]:
    """Where a container listens inside the network."""
    if name in FOREIGN_PORTS:
        return FOREIGN_PORTS[name]
    settings = load(OURS[name])
    return {int(address.rpartition(":")[2]) for address in (settings.listen, settings.prometheus_listen) if address}


def load(service: dict[str, Any]) -> CommonSettings:
    return SETTINGS[kind_of(service)].load(environ_of(service))


def assert_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    assert host in SERVICES, f"{address}: no container {host!r}"
    assert int(port) in ports_of(host), f"{address}: {host} listens on {ports_of(host)}"


def test_two_of_each_service() -> None:
    kinds = sorted(kind_of(service) for service in OURS.values())
    assert kinds == sorted([*SETTINGS, *SETTINGS])


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_of_that_service_and_in_range(name: str) -> None:
    settings_class = SETTINGS[kind_of(OURS[name])]
    known = {f"STREAMHOUSE_{field.upper()}" for field in settings_class.model_fields}
    given = environ_of(OURS[name])
    assert set(given) <= known, f"not settings of {settings_class.__name__}: {set(given) - known}"
    load(OURS[name])  # raises SettingsError for a value out of its range


@pytest.mark.parametrize("name", OURS)
def test_every_service_is_reached_where_it_says(name: str) -> None:
    settings = load(OURS[name])
    assert settings.listen.startswith("0.0.0.0:"), "a container's loopback is its own"
    assert settings.advertise.rpartition(":")[0] == name
    assert_reachable(settings.advertise)
    for address in settings.bootstrap.split(","):
        assert_reachable(address)
        assert kind_of(OURS[address.rpartition(":")[0]]) == "coordinator"


@pytest.mark.parametrize("name", OURS)
def test_urls_in_settings_point_at_containers(name: str) -> None:
    urls = [value for value in environ_of(OURS[name]).values() if "://" in value]
    assert urls
    for url in urls:
        match = re.fullmatch(r"\w+://(?:[^@/]*@)?([^/@]+:\d+)(?:/.*)?", url)
        assert match, url
        assert_reachable(match[1])


def test_names_and_volumes_are_not_shared() -> None:
    """An agent's id and log belong to one process, a cache directory too."""
    settings = [load(service) for service in OURS.values()]
    for field in ("agent_id", "worker_id", "coordinator_id"):
        values = [value for item in settings if (value := getattr(item, field, ""))]
        assert len(values) == len(set(values)), f"{field} used twice"
    mounts = [mount.partition(":")[0] for service in OURS.values() for mount in service.get("volumes", [])]
    assert len(mounts) == len(set(mounts)) == 4
    assert set(mounts) <= COMPOSE["volumes"].keys()


@pytest.mark.parametrize(("kind", "field"), [("ingest", "wal_dir"), ("query", "cache_dir")])
def test_data_directories_are_on_volumes(kind: str, field: str) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    for service in OURS.values():
        if kind_of(service) == kind:
            directory = str(getattr(load(service), field))
            assert [mount.partition(":")[2] for mount in service["volumes"]] == [directory]
            assert directory in dockerfile, "made in the image, so that the volume belongs to its user"


def test_credentials_agree() -> None:
    minio, postgres = environ_of(SERVICES["minio"]), environ_of(SERVICES["postgres"])
    rabbitmq, setup = environ_of(SERVICES["rabbitmq"]), environ_of(SERVICES["minio-setup"])
    query, coordinator = environ_of(SERVICES["query-1"]), environ_of(SERVICES["coordinator-1"])
    key, secret = query["STREAMHOUSE_S3_ACCESS_KEY"], query["STREAMHOUSE_S3_SECRET_KEY"]
    assert (minio["MINIO_ROOT_USER"], minio["MINIO_ROOT_PASSWORD"]) == (key, secret)
    assert setup["MC_HOST_minio"] == f"http://{key}:{secret}@minio:9000"
    assert SERVICES["minio-setup"]["command"][-1] == f"minio/{query['STREAMHOUSE_S3_BUCKET']}"
    assert coordinator["STREAMHOUSE_PG_DSN"] == (
        f"postgresql://{postgres['POSTGRES_USER']}:{postgres['POSTGRES_PASSWORD']}@postgres:5432/"
        f"{postgres['POSTGRES_DB']}"
    )
    amqp = f"amqp://{rabbitmq['RABBITMQ_DEFAULT_USER']}:{rabbitmq['RABBITMQ_DEFAULT_PASS']}@rabbitmq:5672/"
    for name in ("coordinator-1", "segmenter-1"):
        assert environ_of(SERVICES[name])["STREAMHOUSE_AMQP_URL"] == amqp


def test_every_command_exists() -> None:
    assert isinstance(cli, click.Group)
    for name, service in SERVICES.items():
        if "build" in service:
            assert service["command"][0] in cli.commands, name
            test = service["healthcheck"].get("test")
            if test:
                assert test[:3] == ["CMD", "streamhouse", "health"], name
                assert test[2] in cli.commands
                assert int(test[3].rpartition(":")[2]) in ports_of(name)
    assert '["streamhouse"]' in (DEPLOY / "Dockerfile").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_dependencies_are_real(name: str) -> None:
    needed = SERVICES[name].get("depends_on", {})
    for other in needed:
        assert other in SERVICES, f"{name} depends on {other}"
        condition = needed[other]["condition"] if isinstance(needed, dict) else "service_started"
        if condition == "service_healthy":
            assert "test" in SERVICES[other]["healthcheck"], f"{other} has no health check"
        if condition == "service_completed_successfully":
            assert SERVICES[other].get("restart") != "unless-stopped", f"{other} never completes"


def test_nothing_waits_for_what_only_makes_things_faster() -> None:
    for name, service in SERVICES.items():
        assert not {"rabbitmq", "redis"} & set(service.get("depends_on", {})), name


def test_images_are_pinned_and_services_run_without_root() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    images += re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    for image in images:
        tag = image.partition(":")[2]
        assert re.search(r"\d+\.\d+\.\d+|\d+\.\d+-|\d{4}-\d\d-\d\d", tag), f"{image} is not pinned to a version"
    assert re.search(r"^USER \d+:\d+$", dockerfile, re.MULTILINE)


def test_what_the_image_copies_exists() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            # README.md is named by pyproject.toml, which would not build without it.
            assert (ROOT / source).exists(), f"COPY {source}"
    packages = re.findall(r'^\s+"([\w/]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    tops = {package.partition("/")[0] for package in packages if "/" in package}
    copied = {word for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for word in line.split()}
    assert tops <= copied, f"packages of the distribution that are not copied: {tops - copied}"


def test_mounted_files_exist() -> None:
    for name, service in SERVICES.items():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith("./") else source in COMPOSE["volumes"], name


def test_ports_are_published_on_loopback_only() -> None:
    for name, service in SERVICES.items():
        for published in service.get("ports", []):
            host, _, target = published.split(":")
            assert host == "127.0.0.1", f"{name}: {published}"
            assert int(target) in ports_of(name)


def test_prometheus_targets_exist() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    targets = {
        target for job in config["scrape_configs"] for group in job["static_configs"] for target in group["targets"]
    }
    for target in targets:
        assert_reachable(target)
    scraped = {target.partition(":")[0] for target in targets}
    assert OURS.keys() <= scraped, "a service that is not scraped"


def test_the_collector_takes_what_is_sent_and_sends_it_to_somebody() -> None:
    config = yaml.safe_load((DEPLOY / "otel-collector.yaml").read_text())
    port = config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    for service in OURS.values():
        assert load(service).otlp_endpoint == f"http://otel-collector:{port}"
    assert_reachable(config["exporters"]["otlp/jaeger"]["endpoint"])
    for name, pipeline in config["service"]["pipelines"].items():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline.get(part, [])) <= config.get(part, {}).keys(), f"{name}.{part}"
    assert {"traces", "metrics"} <= config["service"]["pipelines"].keys(), "services send both"


def test_grafana_sources_and_dashboards_exist() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "streamhouse.yaml").read_text())["datasources"]
    for source in sources:
        assert_reachable(source["url"].removeprefix("http://"))
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "streamhouse.json").read_text())
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert used <= {source["uid"] for source in sources}
    [provider] = yaml.safe_load((provisioning / "dashboards" / "streamhouse.yaml").read_text())["providers"]
    mounts = [mount.split(":") for mount in SERVICES["grafana"]["volumes"]]
    assert [provider["options"]["path"]] == [to for source, to, *_ in mounts if source == "./grafana/dashboards"]
    home = environ_of(SERVICES["grafana"])["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/streamhouse.json"


def queries() -> dict[str, set[str]]:
    """Metric names by panel."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "streamhouse.json").read_text())
    return {
        panel["title"]: set(re.findall(r"\bstreamhouse_\w+", " ".join(t["expr"] for t in panel["targets"])))
        for panel in dashboard["panels"]
    }


def documented_metrics() -> set[str]:
    """Names on docs/metrics.md, which a test holds against a running platform."""
    return set(re.findall(r"^\| `(streamhouse_\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.M))


@pytest.mark.parametrize("title", queries())
def test_metrics_of_the_dashboard_are_measured(title: str) -> None:
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in queries()[title]}
    assert names <= documented_metrics()
