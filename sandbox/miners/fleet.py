"""The machines: their draw, their faults, and what they answer."""

from __future__ import annotations

import secrets
import struct
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

FAULTS = (
    "ack_ignore",
    "hang",
    "refuse",
    "truncated",
    "error_status",
    "session_stolen",
    "slow_ramp",
    "frozen_reading",
    "wattage_off",
    "reboot_running",
    "asleep_after_reboot",
)
# Not the firmware's fault but its lie: it obeys and reads as asleep, and the boards go on drawing. Only a meter sees it.
LIES = ("phantom",)
SESSION_S = 60.0
DOWN_S, UP_S, BOOT_S = 4.0, 40.0, 30.0
BOOT_SPREAD = 0.5  # of BOOT_S: no two boards find their pool and their clocks in the same time
# What a machine's supply draws for a moment when its firmware switches the boards on, in times of what they draw then. The supply
# itself comes up soft: power that returns is no surge before the boards are on.
INRUSH, INRUSH_S = 4.0, 0.5
SLOW = 15.0


class Fleet:
    """State of all miners as columns. Index i is the i-th row of the specification. `down_s`, `up_s`: from nothing to the top
    and back.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        seed: int = 1,
        speed: float = 1.0,
        down_s: float = DOWN_S,
        up_s: float = UP_S,
    ) -> None:
        rng = np.random.default_rng(seed)
        n = len(rows)
        self.rows, self.speed = list(rows), speed
        self.down_s, self.up_s = down_s, up_s
        self.rng = rng
        self.names = [str(row["name"]) for row in rows]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.by_address = {str(row["address"]).split(":")[0]: i for i, row in enumerate(rows)}
        self.ladders = [[(str(m), float(w), float(g)) for m, w, g in row["modes"]] for row in rows]
        self.top_w = np.array([ladder[-1][1] for ladder in self.ladders], dtype=float)
        self.profile = np.array([len(ladder) - 1 for ladder in self.ladders], dtype=int)
        self.asleep = np.zeros(n, dtype=bool)
        self.target_w = np.zeros(n)
        self.target_gh = np.zeros(n)
        # Machines differ from their nameplate: a per-unit bias, mostly below it.
        self.bias = rng.uniform(0.95, 1.0, n)
        self.powered = np.ones(n, dtype=bool)
        self.boot_left = np.zeros(n)
        self.boot_s = BOOT_S * (1 + BOOT_SPREAD * np.random.default_rng(seed + 1).random(n))
        self.fault: list[str] = [""] * n
        self.off_factor = np.ones(n)
        self.frozen: dict[int, tuple[float, float]] = {}
        self.sessions: dict[int, tuple[str, float]] = {}
        self.rate_scale = np.ones(n)
        self.commands = 0
        for i in range(n):
            self._retarget(i)
        self.true_w = self.target_w.copy()
        self.true_gh = self.target_gh.copy()
        self.boards = ~self.asleep
        self.surge_w = np.zeros(n)  # beyond `true_w`, at the beginning of the last step

    # --- physics

    def _retarget(self, i: int) -> None:
        ladder = self.ladders[i]
        _, watts, hashes = ladder[0] if self.asleep[i] and self.fault[i] not in LIES else ladder[self.profile[i]]
        self.target_w[i] = watts * self.bias[i]
        self.target_gh[i] = hashes * self.bias[i]

    def step(self, dt: float, energised: np.ndarray | None = None) -> None:
        """Moves the fleet by `dt` seconds; `energised` marks miners whose breakers are closed."""
        if not len(self.rows):
            return
        power = self.powered if energised is None else self.powered & energised
        booting = power & (self.boot_left > 0)
        self.boot_left = np.where(booting, self.boot_left - dt * self.speed, self.boot_left)
        self._switch(power & ~booting & ~self.asleep, dt * self.speed)
        goal = np.where(booting, 25.0, self.target_w)
        per_s = (
            np.where(goal < self.true_w, self.top_w / self.down_s, self.top_w / self.up_s)
            * self.speed
            * self.rate_scale
        )
        self.true_w = np.where(power, self.true_w + np.clip(goal - self.true_w, -per_s * dt, per_s * dt), 0.0)
        share = np.divide(self.true_w, self.target_w, out=np.zeros_like(self.true_w), where=self.target_w > 0)
        self.true_gh = np.where(power & ~booting & ~self.asleep, self.target_gh * np.minimum(share, 1.0), 0.0)

    def _switch(self, boards: np.ndarray, seconds: float) -> None:
        """Boards that come on surge, and the surges of before die away. In a step of many seconds they do not all come at once."""
        on = boards & ~self.boards
        self.surge_w *= np.exp(-seconds / INRUSH_S)
        self.surge_w = np.where(on, INRUSH * self.target_w * min(1.0, 1.0 / seconds), self.surge_w) * boards
        self.boards = boards

    def power_cut(self, lost: np.ndarray) -> None:
        """Machines that lose power forget their sessions and boot hashing when it returns."""
        for i in np.flatnonzero(lost):
            self.reboot(int(i), asleep=False)

    def reboot(self, i: int, *, asleep: bool) -> None:
        self.asleep[i] = asleep
        self.boot_left[i] = self.boot_s[i]
        self.true_w[i] = min(float(self.true_w[i]), 25.0)
        self.sessions.pop(i, None)
        self._retarget(i)

    # --- faults

    def set_fault(self, name: str, fault: str, *, factor: float = 1.2) -> None:
        """Sets one of FAULTS or LIES on a miner, or clears it with "". Raises KeyError for an unknown miner, ValueError for a fault."""
        i = self.index[name]
        if fault not in ("", *FAULTS, *LIES):
            raise ValueError(f"unknown miner fault {fault!r}; known: {', '.join((*FAULTS, *LIES))}")
        self.fault[i] = fault
        self.off_factor[i] = factor if fault == "wattage_off" else 1.0
        self.rate_scale[i] = 1 / SLOW if fault == "slow_ramp" else 1.0
        self.frozen.pop(i, None)
        self._retarget(i)
        if fault == "frozen_reading":
            self.frozen[i] = (float(self.true_w[i]), float(self.true_gh[i]))
        if fault in ("reboot_running", "asleep_after_reboot"):
            self.reboot(i, asleep=fault == "asleep_after_reboot")

    def reading(self, i: int) -> tuple[float, float]:
        """(W, GH/s) as the firmware reports them: 1 % noise, and what the fault does to them."""
        if i in self.frozen:
            return self.frozen[i]
        if self.fault[i] in LIES and self.asleep[i]:
            return self.ladders[i][0][1], 0.0
        noise = 1.0 + float(self.rng.normal(0, 0.005))
        return float(self.true_w[i]) * noise * float(self.off_factor[i]), float(self.true_gh[i])

    def mode(self, i: int) -> str:
        return self.ladders[i][0][0] if self.asleep[i] else self.ladders[i][self.profile[i]][0]

    # --- the protocol

    def answer(self, i: int, command: str, parameter: str) -> dict[str, Any]:
        self.commands += 1
        if "+" in command:
            return {part: [self.answer(i, part, "")] for part in command.split("+")} | {"id": 1}
        if self.fault[i] == "error_status" and command != "version":
            return self._status("E", 300, "Internal error")
        handler = getattr(self, f"_do_{command}", None)
        if handler is None:
            return self._status("E", 14, "Invalid command")
        result: dict[str, Any] = handler(i, parameter)
        return result

    @staticmethod
    def _status(flag: str, code: int, message: str, **sections: Any) -> dict[str, Any]:
        status = {
            "Code": code,
            "Description": "LUXminer 2025.6.9",
            "Msg": message,
            "STATUS": flag,
            "When": int(time.time()),
        }
        return {"STATUS": [status], **sections, "id": 1}

    def _do_version(self, i: int, _p: str) -> dict[str, Any]:
        model = f"Antminer {self.rows[i]['model']}"
        return self._status(
            "S", 22, "LUXminer versions", VERSION=[{"API": "3.7", "LUXminer": "2025.6.9", "Type": model}]
        )

    def _do_config(self, i: int, _p: str) -> dict[str, Any]:
        row = {
            "CurtailMode": "Sleep" if self.asleep[i] else "None",
            "Hostname": self.names[i],
            "MACAddr": "02:00:00:{:02x}:{:02x}:{:02x}".format(*struct.pack(">I", i)[1:]),
            "Model": f"Antminer {self.rows[i]['model']}",
            "Profile": self.ladders[i][self.profile[i]][0],
            "SerialNumber": f"SIM{i:08d}",
        }
        return self._status("S", 33, "LUXminer config", CONFIG=[row])

    def _do_profiles(self, i: int, _p: str) -> dict[str, Any]:
        rows = [
            {"Profile Name": mode, "Hashrate": gh / 1000, "Watts": int(w), "Step": str(k)}
            for k, (mode, w, gh) in enumerate(self.ladders[i])
            if k
        ]
        return self._status("S", 319, f"{len(rows)} Profiles", PROFILES=rows)

    def _do_pools(self, _i: int, _p: str) -> dict[str, Any]:
        pool = {"POOL": 0, "Group": 0, "URL": "stratum+tcp://pool.invalid:3333", "Status": "Alive", "User": "sim"}
        return self._status("S", 7, "1 Pool(s)", POOLS=[pool])

    def _do_groups(self, _i: int, _p: str) -> dict[str, Any]:
        return self._status("S", 83, "1 Groups", GROUPS=[{"Group": 0, "Name": "default", "Quota": 1, "PoolCount": 1}])

    def _do_stats(self, i: int, _p: str) -> dict[str, Any]:
        _, gh = self.reading(i)
        rows = [{"Type": f"Antminer {self.rows[i]['model']}"}, {"GHS 5s": round(gh, 2), "GHS av": round(gh, 2)}]
        return self._status("S", 70, "LUXminer stats", STATS=rows)

    def _do_power(self, i: int, _p: str) -> dict[str, Any]:
        watts, _ = self.reading(i)
        return self._status("S", 346, "Power", POWER=[{"PSU": True, "Watts": round(watts)}])

    def _do_session(self, i: int, _p: str) -> dict[str, Any]:
        sid, until = self.sessions.get(i, ("", 0.0))
        return self._status(
            "S", 319, "Session information", SESSION=[{"SessionID": sid if until > time.monotonic() else ""}]
        )

    def _do_logon(self, i: int, _p: str) -> dict[str, Any]:
        sid, until = self.sessions.get(i, ("", 0.0))
        if sid and until > time.monotonic():
            return self._status("E", 402, "Another session is active")
        sid = secrets.token_hex(4)
        self.sessions[i] = (sid, time.monotonic() + SESSION_S / self.speed)
        if self.fault[i] == "session_stolen":
            # Another controller takes the session between our logon and our command, once.
            self.sessions[i] = (secrets.token_hex(4), time.monotonic() + 0.5)
            self.fault[i] = ""
        return self._status("S", 316, "Session created", SESSION=[{"SessionID": sid}])

    def _do_logoff(self, i: int, parameter: str) -> dict[str, Any]:
        if not self._session_ok(i, parameter):
            return self._status("E", 316, "Invalid session")
        self.sessions.pop(i, None)
        return self._status("S", 317, "Session terminated")

    def _session_ok(self, i: int, sid: str) -> bool:
        known, until = self.sessions.get(i, ("", 0.0))
        return bool(known) and sid == known and until > time.monotonic()

    def _do_curtail(self, i: int, parameter: str) -> dict[str, Any]:
        sid, _, argument = parameter.partition(",")
        if not self._session_ok(i, sid):
            return self._status("E", 316, "Invalid session")
        if argument not in ("sleep", "wakeup"):
            return self._status("E", 22, "Invalid parameter")
        if self.fault[i] != "ack_ignore":
            self.asleep[i] = argument == "sleep"
            self._retarget(i)
        action = "sleep mode" if argument == "sleep" else "wake up"
        return self._status("S", 335, "Curtailment command sent", CURTAIL=[{"Action": action}])

    def _do_profileset(self, i: int, parameter: str) -> dict[str, Any]:
        sid, _, profile = parameter.partition(",")
        if not self._session_ok(i, sid):
            return self._status("E", 316, "Invalid session")
        names = [mode for mode, _, _ in self.ladders[i]]
        if profile not in names[1:]:
            return self._status("E", 322, f"Unknown profile {profile}")
        if self.fault[i] != "ack_ignore":
            self.profile[i] = names.index(profile)
            self._retarget(i)
        return self._status("S", 323, "Profile set")

    def _do_reboot(self, i: int, parameter: str) -> dict[str, Any]:
        if not self._session_ok(i, parameter.partition(",")[0]):
            return self._status("E", 316, "Invalid session")
        # LuxOS keeps a sleep across a reboot; the two reboot faults are the exceptions.
        self.reboot(i, asleep=bool(self.asleep[i]))
        return self._status("S", 42, "Rebooting")
