"""The columns of hosts, miners and power nodes as they come in: by CSV and by an agent's inventory. One check for both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from marketplace.models import PowerNode
from marketplace.models.sites import MAX_GPUS_PER_HOST

MAX_W = 2_000_000_000  # 2 GW: no site is larger, and an int4 column still holds it
REQUIRED: Final = object()


class ColumnError(ValueError):
    """What is wrong with one value, and what to do; shown to whoever sent it."""


@dataclass(frozen=True)
class Column:
    """`kind`: text | int | bool | ints (per GPU) | modes (ladder: [name, W, GH/s], index 0 is sleep)."""

    name: str
    kind: str = "text"
    default: Any = REQUIRED
    low: int = 0
    high: int = MAX_W
    length: int = 60
    choices: Sequence[str] = ()

    def clean(self, value: Any) -> Any:
        """The value in its own type; text is parsed. Raises ColumnError."""
        return _CLEANERS[self.kind](self, value)


def _text(column: Column, value: Any) -> str:
    if not isinstance(value, str):
        raise ColumnError("give text")
    text = value.strip()
    if not text and column.default is REQUIRED:
        raise ColumnError("is empty: give a value")
    if len(text) > column.length:
        raise ColumnError(f"is longer than {column.length} characters: shorten it")
    if column.choices and text not in column.choices:
        raise ColumnError(f"is unknown: use one of {', '.join(column.choices)}")
    return text


def _int(column: Column, value: Any) -> int:
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        if not text.lstrip("-").isascii() or not text.lstrip("-").isdigit():
            raise ColumnError("is not a whole number: write digits only, without a unit")
        value = int(text) if len(text) < 20 else column.high + 1
    if isinstance(value, bool) or not isinstance(value, int):
        raise ColumnError("is not a whole number")
    if not column.low <= value <= column.high:
        raise ColumnError(f"is out of range: use {column.low} to {column.high}")
    return value


def _bool(_column: Column, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if not isinstance(value, str) or value.strip().lower() not in known:
        raise ColumnError("is neither yes nor no: use true or false")
    return known[value.strip().lower()]


def _ints(column: Column, value: Any) -> list[int]:
    parts = value.split() if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise ColumnError("is not a list: write numbers with blanks between them, one for each GPU")
    if len(parts) > MAX_GPUS_PER_HOST:
        raise ColumnError(f"has more than {MAX_GPUS_PER_HOST} numbers")
    return [_int(column, part) for part in parts]


def _modes(_column: Column, value: Any) -> list[tuple[str, int, int]]:
    """`sleep:25:0 eco:2400:155000` or [["sleep", 25, 0], ...] -> [(name, W, GH/s)]."""
    parts = [part.split(":") for part in value.split()] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) < 2:
        raise ColumnError("needs two modes or more, sleep first: write sleep:25:0 normal:3500:200000 (name:watts:GH/s)")
    ladder: list[tuple[str, int, int]] = []
    for part in parts:
        if not isinstance(part, (list, tuple)) or len(part) != 3:
            raise ColumnError("has a mode that is not name:watts:GH/s")
        ladder.append((_text(_MODE_NAME, part[0]), _int(_MODE_W, part[1]), _int(_MODE_GHS, part[2])))
    watts = [mode[1] for mode in ladder]
    if len({mode[0] for mode in ladder}) != len(ladder):
        raise ColumnError("names a mode twice")
    if watts != sorted(watts) or ladder[0][2] != 0:
        raise ColumnError("must rise in watts and begin with sleep, which hashes 0 GH/s")
    return ladder


_CLEANERS = {"text": _text, "int": _int, "bool": _bool, "ints": _ints, "modes": _modes}
_MODE_NAME = Column("mode", length=24)
_MODE_W = Column("mode watts", "int", high=100_000)
_MODE_GHS = Column("mode GH/s", "int")

HOSTS: Final[tuple[Column, ...]] = (
    Column("name"),
    Column("gpu_model", length=40),
    Column("gpus", "int", high=MAX_GPUS_PER_HOST),
    Column("vram_mib", "int"),
    Column("vcpu_milli", "int", low=1),
    Column("ram_mib", "int", low=1),
    Column("nvme_gib", "int", default=0),
    Column("power_node"),
    Column("leaf", default="", length=40),
    Column("spine", default="", length=40),
    Column("nvlink_domains", "ints", default=None, high=MAX_GPUS_PER_HOST),
    Column("standby_w", "int", default=60, high=100_000),
    Column("parked_w", "int", high=100_000),
    Column("base_w", "int", high=100_000),
    Column("gpu_min_w", "int", high=10_000),
    Column("gpu_max_w", "int", high=10_000),
    Column("cap_control", "bool", default=True),
)
MINERS: Final[tuple[Column, ...]] = (
    Column("name"),
    Column("model", length=40),
    Column("power_node"),
    Column("driver", default="luxos", length=16),
    Column("address", default="", length=80),
    Column("modes", "modes"),
)
POWER_NODES: Final[tuple[Column, ...]] = (
    Column("name"),
    Column("parent", default=""),
    Column("kind", default="pdu", choices=[k for k in PowerNode.Kind.values if k != "site"]),
    Column("cap_w", "int", low=1),
    Column("fixed_w", "int", default=0),
    Column("metering", default="nameplate", choices=PowerNode.Metering.values),
    Column("overhead_gpu_permille", "int", default=1000, low=1000, high=5000),
    Column("overhead_miner_permille", "int", default=1000, low=1000, high=5000),
)


def clean(columns: Sequence[Column], row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(values by column, messages by column). An absent or empty value takes the default; unknown columns are wrong."""
    values: dict[str, Any] = {}
    wrong = {
        name: f"is no column of ours: use {', '.join(c.name for c in columns)}"
        for name in row
        if name not in {c.name for c in columns}
    }
    for column in columns:
        raw = row.get(column.name)
        if raw is None or (isinstance(raw, str) and not raw.strip()):
            if column.default is REQUIRED:
                wrong[column.name] = "is missing: give a value"
            else:
                values[column.name] = column.default
            continue
        try:
            values[column.name] = column.clean(raw)
        except ColumnError as error:
            wrong[column.name] = str(error)
    if not wrong:
        wrong = _together(values)
    return values, wrong


def _together(values: dict[str, Any]) -> dict[str, str]:
    """Rules between columns."""
    if "gpu_max_w" in values:
        domains = values["nvlink_domains"]
        if domains is None:
            values["nvlink_domains"] = [0] * values["gpus"]
        elif len(domains) != values["gpus"]:
            return {"nvlink_domains": f"has {len(domains)} numbers for {values['gpus']} GPUs: give one for each"}
        if values["gpus"] and not values["vram_mib"]:
            return {"vram_mib": "is 0: give the memory of one GPU in MiB"}
        if values["gpu_min_w"] > values["gpu_max_w"]:
            return {"gpu_min_w": f"is above gpu_max_w ({values['gpu_max_w']}): swap them"}
        full = values["base_w"] + values["gpus"] * values["gpu_max_w"]
        if not values["standby_w"] <= values["parked_w"] <= full:
            return {"parked_w": f"must stand between standby_w ({values['standby_w']}) and full power ({full} W)"}
    if "cap_w" in values and values["fixed_w"] >= values["cap_w"]:
        return {"fixed_w": f"leaves nothing of cap_w ({values['cap_w']}): lower it"}
    return {}
