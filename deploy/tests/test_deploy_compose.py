"""What can be checked of deploy/ without a Docker engine: its commands, variables, references and metric names are
those of the code."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from shruntime.settings import CommonSettings
from streamhouse_cli.app import cli
from streamhouse_coordinator.settings import CoordinatorSettings
from streamhouse_ingest.settings import IngestSettings
from streamhouse_query.settings import QuerySettings
from streamhouse_segmenter.settings import SegmenterSettings

DEPLOY = Path(__file__).resolve().parents[1]
ROOT = DEPLOY.parent
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# The container whose network all of ours share.
NET = SERVICES["net"]
OURS = {
    name: service
    for name, service in SERVICES.items()
    if "build" in service and "profiles" not in service and service is not NET
}
SETTINGS: dict[str, type[CommonSettings]] = {
    "coordinator": CoordinatorSettings,
    "ingest": IngestSettings,
    "segmenter": SegmenterSettings,
    "query": QuerySettings,
}
# host:port that the containers we did not write listen on
FOREIGN_PORTS = {
    "postgres": {5432},
    "versitygw": {9000},
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
    """From a container that is not one of ours: by the names that its network knows."""
    host, _, port = address.rpartition(":")
    assert host in FOREIGN_PORTS or host in NET["networks"]["default"]["aliases"], f"{address}: no container {host!r}"
    assert int(port) in ports_of(host), f"{address}: {host} listens on {ports_of(host)}"


def listener_of(address: str) -> str:
    """The one service that listens at an address inside the network that ours share."""
    host, _, port = address.rpartition(":")
    assert host == "127.0.0.1", f"{address}: is not the same service for others"
    (found,) = [name for name in OURS if load(OURS[name]).listen == f"0.0.0.0:{port}"]
    return found


def published() -> dict[str, str]:
    """Ports of the host, and what they lead to."""
    found: dict[str, str] = {}
    for name, service in SERVICES.items():
        for entry in service.get("ports", []):
            address, _, port = entry.rpartition(":")
            assert address not in found, f"{address} twice"
            found[address] = f"{name}:{port}"
    return found


def test_no_key_is_there_twice() -> None:
    """Docker refuses such a file; the library takes the last."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"line {node.start_mark.line + 1}: a key twice in {keys}"
            return super().construct_mapping(node, deep)

    text = (DEPLOY / "compose.yaml").read_text()
    assert yaml.load(text, Strict).keys() >= {"services", "volumes"}


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


def test_all_share_one_network_and_no_port() -> None:
    used = [port for name in OURS for port in ports_of(name)]
    assert len(used) == len(set(used)) == 2 * len(OURS)
    for name, service in SERVICES.items():
        inside = service.get("network_mode", "")
        assert inside == ("service:net" if name in OURS or name == "cli" else ""), name
        if inside:
            assert not {"ports", "networks", "hostname"} & service.keys(), f"{name}: has no network of its own"
            assert "net" in service["depends_on"], name
    assert set(NET["networks"]["default"]["aliases"]) == OURS.keys()


@pytest.mark.parametrize("name", OURS)
def test_every_service_is_reached_where_it_says(name: str) -> None:
    """By the others in the same network, and from the host."""
    settings = load(OURS[name])
    assert listener_of(settings.advertise) == name
    assert published()[settings.advertise] == f"net:{settings.listen.rpartition(':')[2]}"
    for address in settings.bootstrap.split(","):
        assert kind_of(OURS[listener_of(address)]) == "coordinator"
    assert OURS[name]["healthcheck"]["test"][-1] == settings.advertise


def test_the_command_line_needs_no_options_on_the_host() -> None:
    default = CommonSettings.model_fields["bootstrap"].default
    assert kind_of(OURS[listener_of(default)]) == "coordinator" and default in published()
    inside = environ_of(SERVICES["cli"])["STREAMHOUSE_BOOTSTRAP"].split(",")
    assert sorted(map(listener_of, inside)) == ["coordinator-1", "coordinator-2"]


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
    postgres, rabbitmq = environ_of(SERVICES["postgres"]), environ_of(SERVICES["rabbitmq"])
    store, coordinator = environ_of(SERVICES["versitygw"]), environ_of(SERVICES["coordinator-1"])
    query = environ_of(SERVICES["query-1"])
    key, secret = query["STREAMHOUSE_S3_ACCESS_KEY"], query["STREAMHOUSE_S3_SECRET_KEY"]
    assert (store["ROOT_ACCESS_KEY"], store["ROOT_SECRET_KEY"]) == (key, secret)
    assert option_of(SERVICES["versitygw"]["command"], "--region") == query["STREAMHOUSE_S3_REGION"]
    assert coordinator["STREAMHOUSE_PG_DSN"] == (
        f"postgresql://{postgres['POSTGRES_USER']}:{postgres['POSTGRES_PASSWORD']}@postgres:5432/"
        f"{postgres['POSTGRES_DB']}"
    )
    amqp = f"amqp://{rabbitmq['RABBITMQ_DEFAULT_USER']}:{rabbitmq['RABBITMQ_DEFAULT_PASS']}@rabbitmq:5672/"
    for name in ("coordinator-1", "segmenter-1"):
        assert environ_of(SERVICES[name])["STREAMHOUSE_AMQP_URL"] == amqp


def option_of(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_every_command_exists_and_takes_its_options() -> None:
    assert isinstance(cli, click.Group)
    for name, service in SERVICES.items():
        if "build" in service and service is not NET:
            parsed(service["command"])
            if test := service["healthcheck"].get("test"):
                assert test[:3] == ["CMD", "streamhouse", "health"], name
                parsed(test[2:])
    assert '["streamhouse"]' in (DEPLOY / "Dockerfile").read_text()


def parsed(arguments: list[str]) -> None:
    """Has the command line parse and check the arguments; runs nothing. Raises click's errors."""
    assert isinstance(cli, click.Group)
    command = cli.commands[arguments[0]]
    with command.make_context(arguments[0], list(arguments[1:]), resilient_parsing=False):
        pass


def test_the_container_that_holds_the_network_does_nothing_else() -> None:
    assert (NET["entrypoint"], NET["command"]) == (["sleep"], ["infinity"])
    assert NET["init"], "sleep as process 1 would not end on SIGTERM"


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
        tag = image.rpartition(":")[2]
        wanted = r"v?\d+\.\d+(-.+)?" if image.startswith("postgres:") else r"v?\d+\.\d+\.\d+(-.+)?"
        assert re.fullmatch(wanted, tag), f"{image} is not pinned to a full version"
        assert not image.startswith(("minio/", "quay.io/minio/")), f"{image}: these images are published no more"
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", dockerfile, re.MULTILINE)
    assert "user" not in {key for service in OURS.values() for key in service}


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "cli"])
def test_everything_starts_again(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.integration
@pytest.mark.timeout(900)  # hundreds of packages are looked at, over whatever network there is
def test_the_image_has_the_versions_that_were_tested(tmp_path: Path) -> None:
    """Runs the pip of the Dockerfile over what it copies, in a fresh environment, without installing anything."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    build = dockerfile.rpartition("\nFROM ")[0]
    source = tmp_path / "src"
    source.mkdir()
    for line in re.findall(r"^COPY (?!--from)(.+)$", build, re.MULTILINE):
        *names, target = line.split()
        for name in names:
            where = source if target == "./" else source / target
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, where, ignore=shutil.ignore_patterns("__pycache__", "tests"))
            else:
                shutil.copy(ROOT / name, where)
    (line,) = re.findall(r"^RUN (python -m venv .+)$", build, re.MULTILINE)
    make, install = line.split(" && ")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, *make.split()[1:-1], str(venv)], check=True, timeout=300)
    program, *arguments = shlex.split(install.replace("/opt/streamhouse", str(venv)))
    report = tmp_path / "report.json"
    done = subprocess.run(
        [program, *arguments, "--dry-run", "--quiet", "--report", str(report)],
        cwd=source,
        env={name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    installed = {
        item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]
    }
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE))
    canonical = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned.items()}
    assert installed.pop("streamhouse") and {"aioboto3", "asyncpg", "nameko"} <= installed.keys()
    for name, version in installed.items():
        assert canonical.get(re.sub(r"[-_.]+", "-", name).lower()) == version, f"{name} {version} was not tested"


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
            inside = {port for ours in OURS for port in ports_of(ours)} if name == "net" else ports_of(name)
            assert int(target) in inside


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
    assert_reachable(config["exporters"]["otlp_grpc/jaeger"]["endpoint"])
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
