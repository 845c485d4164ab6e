"""The unit for systemd in docs/deploy.md against the code."""

import configparser
import re
from pathlib import Path

from streamhouse_ingest.settings import IngestSettings

from deploy.tests.test_deploy_compose import parsed

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text()


def unit() -> configparser.SectionProxy:
    (text,) = re.findall(r"```\n(\[Service\]\n.*?)```", PAGE, re.DOTALL)
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser["Service"]


def test_systemd_is_told_and_waits_for_as_long_as_it_takes() -> None:
    service = unit()
    assert service["Type"] == "notify"
    assert service["TimeoutStartSec"] == "infinity", "a start waits for peers, and replays a log"
    drain_s = IngestSettings.model_fields["shutdown_timeout_ms"].default / 1000
    assert int(service["TimeoutStopSec"]) > drain_s
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert int(service["WatchdogSec"]) > 0


def test_the_command_of_the_unit_takes_its_options() -> None:
    program, *arguments = unit()["ExecStart"].split()
    assert program.endswith("/bin/streamhouse")
    parsed(arguments)
