"""The driver of this machine: NVML where there is an NVIDIA driver, else a host without GPUs and without cap control."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from typing import Any

from agent.hosts import HostError, HostReading, Poll, health


def nvml() -> Any:
    """The initialised NVML module, or None when this machine has no NVIDIA driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml


class LocalHost:
    """One host, this one. `settings` (name, power_node and any inventory field) override what is found."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.name = settings, str(settings["name"])
        self.nvml = nvml()
        self.devices = []
        if self.nvml:
            self.devices = [self.nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self.nvml.nvmlDeviceGetCount())]
        self.can_cap = bool(self.devices) and os.geteuid() == 0
        self.xids: Counter[tuple[int, int]] = Counter()
        self.xid_events = self._watch_xids() if self.devices else None

    def _constraints(self) -> tuple[int, int]:
        low, high = self.nvml.nvmlDeviceGetPowerManagementLimitConstraints(self.devices[0])
        return int(low) // 1000, int(high) // 1000

    async def inventory(self) -> dict[str, list[dict[str, Any]]]:
        row: dict[str, Any] = {
            "name": self.name,
            "gpu_model": "",
            "gpus": len(self.devices),
            "vram_mib": 0,
            "vcpu_milli": (os.cpu_count() or 1) * 1000,
            "ram_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
            "nvme_gib": 0,
            "leaf": "",
            "spine": "",
            "nvlink_domains": list(range(len(self.devices))),
            "standby_w": 15,
            "parked_w": 150,
            "base_w": 400,
            "gpu_min_w": 0,
            "gpu_max_w": 0,
            "cap_control": self.can_cap,
        }
        if self.devices:
            low, high = self._constraints()
            name = self.nvml.nvmlDeviceGetName(self.devices[0])
            memory = self.nvml.nvmlDeviceGetMemoryInfo(self.devices[0]).total
            row |= {
                "gpu_model": name if isinstance(name, str) else name.decode(),
                "vram_mib": int(memory) // 2**20,
                "gpu_min_w": low,
                "gpu_max_w": high,
                "parked_w": 150 + low * len(self.devices),
            }
        return {"hosts": [row | self.settings], "miners": []}

    def _read(self) -> HostReading:
        limits: list[int] = []
        watts = int(self.settings.get("base_w", 0))
        errors = self._device_errors()
        answered = True
        for i, device in enumerate(self.devices):
            try:
                limits.append(int(self.nvml.nvmlDeviceGetEnforcedPowerLimit(device)) // 1000)
                watts += int(self.nvml.nvmlDeviceGetPowerUsage(device)) // 1000
            except self.nvml.NVMLError as error:
                limits.append(0)
                answered = False
                errors.append(health.written(i, "lost", int(error.value), 1, str(error)))
        state = "full"
        if self.devices and answered:
            low, high = self._constraints()
            state = "full" if min(limits) >= high else "parked" if max(limits) <= low else "capped"
        return HostReading(self.name, True, state, tuple(limits), watts, tuple(errors))

    def _device_errors(self) -> list[str]:
        """XIDs since this process began, uncorrected memory errors since the driver came up, and pages or rows that were retired."""
        if not self.devices:
            return []
        self._drain_xids()
        found = [health.written(gpu, "xid", code, times) for (gpu, code), times in sorted(self.xids.items())]
        for i, device in enumerate(self.devices):
            for kind, count in (("ecc", self._uncorrected), ("retired", self._retired)):
                try:
                    number = count(device)
                except self.nvml.NVMLError:  # this model does not count them
                    continue
                if number:
                    found.append(health.written(i, kind, 0, number))
        return found

    def _uncorrected(self, device: Any) -> int:
        m = self.nvml
        return int(m.nvmlDeviceGetTotalEccErrors(device, m.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, m.NVML_VOLATILE_ECC))

    def _retired(self, device: Any) -> int:
        _, uncorrectable, _, _ = self.nvml.nvmlDeviceGetRemappedRows(device)
        return int(uncorrectable)

    def _watch_xids(self) -> Any:
        """A set of events that fills with XIDs; None where the driver has none (it is not for every platform)."""
        try:
            events = self.nvml.nvmlEventSetCreate()
            for device in self.devices:
                self.nvml.nvmlDeviceRegisterEvents(device, self.nvml.nvmlEventTypeXidCriticalError, events)
        except self.nvml.NVMLError:
            return None
        return events

    def _drain_xids(self) -> None:
        while self.xid_events is not None:
            try:
                event = self.nvml.nvmlEventSetWait_v2(self.xid_events, 0)
                gpu = int(self.nvml.nvmlDeviceGetIndex(event.device))
            except self.nvml.NVMLError:  # no more of them for now
                return
            self.xids[gpu, int(event.eventData)] += 1

    async def poll(self) -> Poll:
        return Poll(time.time(), [await asyncio.to_thread(self._read)])

    async def read(self, name: str) -> HostReading:
        if name != self.name:
            raise HostError(f"unknown_host: {name}")
        return await asyncio.to_thread(self._read)

    async def set_limits(self, name: str, limits_w: list[int]) -> tuple[int, ...]:
        if not self.can_cap:
            raise HostError("no_cap_control: power limits need NVML and root")
        for device, watts in zip(self.devices, limits_w, strict=True):
            try:
                await asyncio.to_thread(self.nvml.nvmlDeviceSetPowerManagementLimit, device, watts * 1000)
            except self.nvml.NVMLError as error:
                raise HostError(f"nvml: {error}") from error
        return (await self.read(name)).limits_w

    async def power(self, name: str, *, on: bool) -> None:
        raise HostError(f"no_power_control: {name} cannot switch itself {'on' if on else 'off'}")

    async def attach(self, name: str, key: str, gpus: tuple[int, ...], utilisation: float) -> None:
        pass

    async def detach(self, name: str, key: str) -> None:
        pass

    async def close(self) -> None:
        if self.nvml:
            self.nvml.nvmlShutdown()
