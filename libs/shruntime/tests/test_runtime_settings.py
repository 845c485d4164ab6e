"""Settings: sources, ranges, and errors that name the setting."""

from pathlib import Path
from typing import ClassVar, Self

import pytest
from pydantic import Field, model_validator
from shruntime.settings import CommonSettings, SettingsError, one_line
from shstore.settings import StoreSettings

pytestmark = pytest.mark.quick


class ProbeSettings(CommonSettings):
    service: ClassVar[str] = "probe"

    probe_bytes_max: int = Field(100, ge=1, le=1000, description="bytes; for this test")
    probe_password: str = Field("", max_length=20, repr=False, description="a secret")


def test_defaults_then_file_then_variables_then_code(tmp_path: Path) -> None:
    config = tmp_path / "streamhouse.toml"
    config.write_text('log_level = "DEBUG"\nrpc_timeout_ms = 200\n[probe]\nprobe_bytes_max = 5\n')
    environ = {"STREAMHOUSE_CONFIG": str(config), "STREAMHOUSE_RPC_TIMEOUT_MS": "300"}
    settings = ProbeSettings.load(environ, probe_bytes_max=7)
    assert (settings.log_level, settings.rpc_timeout_ms, settings.probe_bytes_max) == ("DEBUG", 300, 7)
    assert ProbeSettings.load(environ).probe_bytes_max == 5
    assert ProbeSettings.load({}).probe_bytes_max == 100


class StoredSettings(StoreSettings):
    service: ClassVar[str] = "stored"


def test_tables_of_what_a_service_inherits_are_for_it_and_its_own_wins(tmp_path: Path) -> None:
    config = tmp_path / "streamhouse.toml"
    config.write_text(
        'log_level = "ERROR"\nrpc_timeout_ms = 150\n[common]\nlog_level = "DEBUG"\nlisten = "127.0.0.1:1"\n'
        '[store]\ns3_bucket = "theirs"\nlisten = "127.0.0.1:2"\n[stored]\ns3_prefix = "p/"\n'
        '[probe]\nlisten = "127.0.0.1:3"'
    )
    environ = {"STREAMHOUSE_CONFIG": str(config)}
    probe, stored = ProbeSettings.load(environ), StoredSettings.load(environ)
    assert (probe.rpc_timeout_ms, probe.log_level, probe.listen) == (150, "DEBUG", "127.0.0.1:3")
    assert (stored.log_level, stored.listen) == ("DEBUG", "127.0.0.1:2")
    assert (stored.s3_bucket, stored.s3_prefix) == ("theirs", "p/")


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"STREAMHOUSE_PROBE_BYTES_MAXX": "1"}, "did you mean probe_bytes_max"),
        ({"STREAMHOUSE_PROBE_BYTES_MAX": "0"}, "STREAMHOUSE_PROBE_BYTES_MAX) = '0'"),
        ({"STREAMHOUSE_PROBE_BYTES_MAX": "many"}, "STREAMHOUSE_PROBE_BYTES_MAX) = 'many'"),
        ({"STREAMHOUSE_LOG_LEVEL": "LOUD"}, "STREAMHOUSE_LOG_LEVEL"),
        ({"STREAMHOUSE_CONFIG": "/nowhere/streamhouse.toml"}, "/nowhere/streamhouse.toml: No such file"),
        ({"STREAMHOUSE_LISTEN": ""}, "STREAMHOUSE_LISTEN) = ''"),
        ({"STREAMHOUSE_BOOTSTRAP": "one:1,two"}, "'two' must be host:port"),
        ({"STREAMHOUSE_MEMORY_LIMIT_BYTES": "512"}, "STREAMHOUSE_MEMORY_LIMIT_BYTES) = '512': must be 0, or at least"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said.replace("(", r"\(").replace(")", r"\)")):
        ProbeSettings.load(environ)


def test_a_wrong_setting_is_named_without_the_defaults_that_are_parts_of_it() -> None:
    with pytest.raises(SettingsError) as caught:
        ProbeSettings.load({"STREAMHOUSE_MEMORY_LIMIT_BYTES": "256MiB"})
    assert str(caught.value).count("STREAMHOUSE_") == 1


def test_names_are_printable_text_on_one_line() -> None:
    assert one_line("Ühlingen 1") == "Ühlingen 1"
    for text in ("a\nb", "\x1b[2J", "a\x00", "a\u2028"):
        with pytest.raises(ValueError, match="printable text on one line"):
            one_line(text)


def test_a_secret_is_named_and_not_shown() -> None:
    with pytest.raises(SettingsError, match="STREAMHOUSE_PROBE_PASSWORD") as caught:
        ProbeSettings.load({"STREAMHOUSE_PROBE_PASSWORD": "x" * 21})
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[prob]\nx = 1\n", r"unknown table \[prob\]"),
        ("bytes_max = 1\n", "unknown setting"),
        ("[probe]\nprobe_bites = 1\n", r"\[probe\] has no setting probe_bites"),
        ("[common]\nprobe_bytes_max = 1\n", r"\[common\] has no setting probe_bytes_max"),
        ("[probe\n", "streamhouse.toml"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    config = tmp_path / "streamhouse.toml"
    config.write_text(content)
    with pytest.raises(SettingsError, match=said):
        ProbeSettings.load({"STREAMHOUSE_CONFIG": str(config)})


def test_settings_of_other_services_are_passed_over() -> None:
    assert ProbeSettings.load({"STREAMHOUSE_S3_BUCKET": "elsewhere"}).probe_bytes_max == 100


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    config = tmp_path / "streamhouse.toml"
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"streamhouse.toml: .*utf-8"):
        ProbeSettings.load({"STREAMHOUSE_CONFIG": str(config)})


class FittingSettings(ProbeSettings):
    service: ClassVar[str] = "fitting"

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.probe_bytes_max == 7:
            raise ValueError("probe_bytes_max (7) does not fit")
        return self


def test_settings_that_do_not_fit_together_are_named_without_all_the_others() -> None:
    with pytest.raises(SettingsError) as caught:
        FittingSettings.load({}, probe_bytes_max=7, probe_password="secret")
    said = "settings of fitting: probe_bytes_max (7) does not fit (STREAMHOUSE_PROBE_BYTES_MAX)"
    assert str(caught.value) == said
