"""The agent's configuration: one JSON or TOML file. docs/agent.md describes every field.

A mistake is a ConfigError that names the file and the line (syntax) or the field (meaning).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.miners.adapters import ADAPTERS, missing


class ConfigError(Exception):
    """The configuration cannot be used; the text says where and why."""


HOST_DRIVERS = ("sandbox", "local")
METER_DRIVERS = ("sandbox", "none")
MINER_DRIVERS = (*ADAPTERS, "none")
RUNTIMES = ("process", "virtual")

MINER_KEYS = {"name": str, "model": str, "power_node": str, "address": str, "modes": list}
LOCAL_HOST_KEYS = {"name": str, "power_node": str}


@dataclass(frozen=True)
class Config:
    """Seconds, watts and bytes; see docs/agent.md."""

    name: str
    host_driver: str
    host_url: str
    local_host: dict[str, Any]
    host_addresses: dict[str, str]
    miner_driver: str
    miners: list[dict[str, Any]] | None  # None: the inventory of the host driver lists them
    meter_driver: str
    runtime: str
    wait_s: float = 25.0
    report_s: float = 5.0
    poll_s: float = 1.0
    beat_s: float = 5.0
    miner_poll_s: float = 20.0
    miner_timeout_s: float = 4.0
    miner_retry_s: float = 10.0
    backoff_s: float = 20.0
    miner_concurrency: int = 100
    meter_stale_s: float = 15.0
    settle_s: float = 8.0
    log_limit_bytes: int = 5 * 1024 * 1024
    path: str = field(default="", compare=False)


NUMBERS = (
    "wait_s",
    "report_s",
    "poll_s",
    "beat_s",
    "backoff_s",
    "miner_poll_s",
    "miner_timeout_s",
    "miner_retry_s",
    "meter_stale_s",
    "settle_s",
)
INTEGERS = ("miner_concurrency", "log_limit_bytes")


def load(path: Path) -> Config:
    """Reads and checks a configuration file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        raw = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: the top level must be an object")
    return parse(raw, str(path))


def parse(raw: dict[str, Any], path: str = "configuration") -> Config:
    """Checks a configuration that was read. Raises ConfigError naming the field."""
    known = {"name", "hosts", "miners", "meters", "runtime", *NUMBERS, *INTEGERS}
    for key in raw:
        if key not in known:
            raise ConfigError(f"{path}: field {key!r} is not known; known: {', '.join(sorted(known))}")

    def section(name: str, drivers: tuple[str, ...], default: str) -> dict[str, Any]:
        value = raw.get(name, {"driver": default})
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: field '{name}' must be an object with a 'driver'")
        if value.get("driver") not in drivers:
            raise ConfigError(f"{path}: field '{name}.driver' is {value.get('driver')!r}; known: {', '.join(drivers)}")
        return value

    if not isinstance(raw.get("name"), str) or not raw["name"]:
        raise ConfigError(f"{path}: field 'name' must be a text, the agent's name at its site")
    hosts = section("hosts", HOST_DRIVERS, "local")
    meters = section("meters", METER_DRIVERS, "none")
    miners = section("miners", MINER_DRIVERS, "none")
    runtime = raw.get("runtime", "process")
    if runtime not in RUNTIMES:
        raise ConfigError(f"{path}: field 'runtime' is {runtime!r}; known: {', '.join(RUNTIMES)}")
    if hosts["driver"] == "sandbox":
        _url(hosts.get("url"), f"{path}: field 'hosts.url'")
    else:
        _keys(hosts.get("host"), LOCAL_HOST_KEYS, f"{path}: field 'hosts.host")
    for name, used in (("meters", meters["driver"] == "sandbox"), ("runtime", runtime == "virtual")):
        if used and hosts["driver"] != "sandbox":
            raise ConfigError(f"{path}: field '{name}': sandbox needs hosts.driver 'sandbox'")
    rows = miners.get("list", "inventory")
    if rows == "inventory":
        if miners["driver"] != "none" and hosts["driver"] != "sandbox":
            raise ConfigError(f"{path}: field 'miners.list' must list the miners when hosts.driver is 'local'")
        rows = None
    else:
        if not isinstance(rows, list):
            raise ConfigError(f"{path}: field 'miners.list' must be a list, or \"inventory\"")
        for i, row in enumerate(rows):
            _keys(row, MINER_KEYS, f"{path}: field 'miners.list[{i}]")
            if row.get("driver", ADAPTERS[0]) not in ADAPTERS:
                where = f"{path}: field 'miners.list[{i}].driver'"
                raise ConfigError(f"{where} is {row['driver']!r}; known: {', '.join(ADAPTERS)}")
    for driver in {miners["driver"], *(str(row.get("driver", "")) for row in rows or [])}:
        if package := missing(driver):
            raise ConfigError(f"{path}: miner driver {driver!r} needs a package: pip install '{package}'")
    numbers: dict[str, Any] = {}
    for key in (*NUMBERS, *INTEGERS):
        if key in raw:
            value = raw[key]
            if isinstance(value, bool) or not isinstance(value, int if key in INTEGERS else (int, float)) or value <= 0:
                raise ConfigError(f"{path}: field '{key}' must be a number above 0, not {value!r}")
            numbers[key] = value
    return Config(
        name=raw["name"],
        host_driver=hosts["driver"],
        host_url=str(hosts.get("url", "")).rstrip("/"),
        local_host=dict(hosts.get("host", {})),
        host_addresses={str(k): str(v) for k, v in hosts.get("addresses", {}).items()},
        miner_driver=miners["driver"],
        miners=rows if miners["driver"] != "none" else [],
        meter_driver=meters["driver"],
        runtime=runtime,
        path=path,
        **numbers,
    )


def _url(value: Any, where: str) -> None:
    if not isinstance(value, str) or not value.startswith(("http://", "https://")):
        raise ConfigError(f"{where} must be an http:// or https:// address, not {value!r}")


def _keys(row: Any, keys: Mapping[str, type], where: str) -> None:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}' must be an object")
    for key, kind in keys.items():
        if not isinstance(row.get(key), kind):
            raise ConfigError(f"{where}.{key}' must be a {kind.__name__}, not {row.get(key)!r}")
