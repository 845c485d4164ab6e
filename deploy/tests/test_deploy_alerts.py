"""The alert rules: each is explained, tested, and asks for metrics that there are."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from streamhouse_ingest.metrics import REFUSALS

from deploy.tests.test_deploy_compose import SERVICES, documented_metrics

DEPLOY = Path(__file__).resolve().parents[1]
GROUPS: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
RULES: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
TESTS: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "tests" / "alerts_test.yaml").read_text())["tests"]
PROMTOOL = shutil.which("promtool") or ""


def promtool(*arguments: str) -> str:
    """Returns what promtool says; fails with it if it finds fault."""
    ended = subprocess.run([PROMTOOL, *arguments], cwd=DEPLOY, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.skipif(not PROMTOOL, reason="promtool is not installed (apt install prometheus)")
def test_promtool_finds_no_fault_with_the_rules_and_their_tests() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "alerts.yaml")
    assert "SUCCESS" in promtool("test", "rules", "tests/alerts_test.yaml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_no_two_alerts_share_a_name() -> None:
    assert len(RULES) == sum(len(group["rules"]) for group in GROUPS)


@pytest.mark.parametrize("name", RULES)
def test_metrics_of_the_alert_are_measured(name: str) -> None:
    asked = set(re.findall(r"\bstreamhouse_\w+", RULES[name]["expr"]))
    names = {re.sub(r"_(bucket|sum|count)$", "", metric) for metric in asked}
    assert names <= documented_metrics()
    assert names or RULES[name]["expr"].startswith("up{")


@pytest.mark.parametrize("name", RULES)
def test_the_alert_is_explained(name: str) -> None:
    rule = RULES[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^### (\w+)$", (DEPLOY.parent / page).read_text(), re.MULTILINE)
    assert anchor == name.lower() and name in headings


@pytest.mark.parametrize("name", RULES)
def test_the_alert_is_seen_firing_and_quiet(name: str) -> None:
    looks = [look for test in TESTS for look in test["alert_rule_test"] if look["alertname"] == name]
    assert {bool(look["exp_alerts"]) for look in looks} == {True, False}


def test_the_page_explains_no_alert_that_is_gone() -> None:
    page = (DEPLOY.parent / "docs" / "alerting.md").read_text()
    assert set(re.findall(r"^### (StreamHouse\w+)$", page, re.MULTILINE)) == RULES.keys()


def test_reasons_that_alerts_ask_for_are_answered_by_agents() -> None:
    [reasons] = re.findall(r'reason=~"([^"]+)"', RULES["StreamHouseProducersRefused"]["expr"])
    assert set(reasons.split("|")) <= {refusal.reason for refusal in REFUSALS}


def test_prometheus_loads_the_rules() -> None:
    [path] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["rule_files"]
    mounts = [mount.split(":") for mount in SERVICES["prometheus"]["volumes"]]
    assert [source for source, target, *_ in mounts if target == path] == ["./alerts.yaml"]
