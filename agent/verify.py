"""What `tailrace-verify` runs: the benchmark of one host, on the GPUs that it is given. Prints one line, `tailrace-verify {...}`:

    {"gpus": [{"matmul_gflops", "memory_mb_s"}], "links": [{"a", "b", "mb_s"}], "disk": {"write_mb_s", "read_mb_s"},
     "network": {"down_kb_s", "up_kb_s"}, "errors": ["..."]}

Matrix products of 8192 x 8192 in BF16 (FP16 before compute capability 8) through cuBLAS; copies inside each device (read and written
bytes) and from each device to the next (one direction) through the CUDA driver; a file in the working folder, written, synced, dropped from
the page cache and read; bytes from and to TAILRACE_PROBE_URL. A part that fails says why in `errors`, and the others go on.
Stdlib only, and no import of the agent: it runs wherever jobs run.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PREFIX = "tailrace-verify"
MIB = 1 << 20
BLOCK = 4 * MIB
N = 8192  # of the matrices
PRODUCTS = 40
COPY_BYTES = 1 << 30
COPIES = 20
NETWORK_S = 20.0
BF16, FP16, FLOAT_MATH, TENSOR_OP = 14, 2, 68, 99  # cudaDataType_t, cublasComputeType_t, cublasGemmAlgo_t
MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR


class PartError(Exception):
    """A part of the benchmark could not run; the text says why."""


# --- disk and network
def disk(folder: Path, mib: int) -> dict[str, int]:
    """MB/s of a file of `mib` MiB: written until it is on the device, then read with the page cache dropped."""
    path = folder / f"{PREFIX}.{os.getpid()}"
    block = os.urandom(BLOCK)
    blocks = max(1, mib * MIB // BLOCK)
    try:
        start = time.monotonic()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for _ in range(blocks):
                if os.write(handle, block) != BLOCK:
                    raise PartError("disk: a write was cut short: is the drive full?")
            os.fsync(handle)
            written = time.monotonic() - start
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(handle, 0, os.SEEK_SET)
            start = time.monotonic()
            while os.read(handle, BLOCK):
                pass
            taken = time.monotonic() - start
        finally:
            os.close(handle)
    except OSError as error:
        raise PartError(f"disk: {error}") from error
    finally:
        path.unlink(missing_ok=True)
    total = blocks * BLOCK / 1e6
    return {"write_mb_s": int(total / max(written, 1e-6)), "read_mb_s": int(total / max(taken, 1e-6))}


def network(url: str, mib: int) -> dict[str, int]:
    """KB/s from and to `url`: GET answers bytes, POST takes them."""
    if not url.startswith(("http://", "https://")):
        raise PartError("network: TAILRACE_PROBE_URL is not set")
    try:
        start, got = time.monotonic(), 0
        with urllib.request.urlopen(f"{url}?mib={mib}", timeout=NETWORK_S) as answer:  # noqa: S310 - checked above
            while chunk := answer.read(BLOCK):
                got += len(chunk)
        down = got / 1e3 / max(time.monotonic() - start, 1e-6)
        body = os.urandom(MIB) * mib
        request = urllib.request.Request(url, body, {"Content-Type": "application/octet-stream"})  # noqa: S310 - as above
        start = time.monotonic()
        with urllib.request.urlopen(request, timeout=NETWORK_S):  # noqa: S310 - as above
            up = len(body) / 1e3 / max(time.monotonic() - start, 1e-6)
    except OSError as error:
        raise PartError(f"network: {error}") from error
    return {"down_kb_s": int(down), "up_kb_s": int(up)}


# --- GPUs
class Cuda:
    """The CUDA driver and cuBLAS by ctypes: what this needs of them. Raises PartError with the call that failed."""

    def __init__(self) -> None:
        self.driver = self._load("libcuda.so.1", why="gpus: there is no NVIDIA driver here")
        self.call("cuInit", 0)
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        self.devices: list[ctypes.c_int] = []
        self.contexts: list[ctypes.c_void_p] = []
        for i in range(count.value):
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self.call("cuDeviceGet", ctypes.byref(device), i)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self.devices.append(device)
            self.contexts.append(context)

    @staticmethod
    def _load(*names: str, why: str) -> Any:
        for name in names:
            with contextlib.suppress(OSError):
                return ctypes.CDLL(name)
        raise PartError(why)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status:
            raise PartError(f"gpus: {name} answered {status}")

    def use(self, device: int) -> None:
        self.call("cuCtxSetCurrent", self.contexts[device])

    @contextlib.contextmanager
    def memory(self, size: int) -> Iterator[ctypes.c_uint64]:
        """Device memory of the current context, filled with a pattern that is no zero: zeros would draw less power."""
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        try:
            self.call("cuMemsetD16_v2", pointer, ctypes.c_ushort(0x3C3C), ctypes.c_size_t(size // 2))
            yield pointer
        finally:
            self.call("cuMemFree_v2", pointer)

    def seconds(self, work: Callable[[], None]) -> float:
        """What the device takes for `work`, once it is warm, by its own clock."""
        work()
        events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in events:
            self.call("cuEventCreate", ctypes.byref(event), 0)
        self.call("cuEventRecord", events[0], None)
        work()
        self.call("cuEventRecord", events[1], None)
        self.call("cuEventSynchronize", events[1])
        milliseconds = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(milliseconds), *events)
        for event in events:
            self.call("cuEventDestroy_v2", event)
        return max(milliseconds.value / 1e3, 1e-9)

    def copy_mb_s(self, device: int) -> int:
        """Read and written bytes of copies inside the device."""
        self.use(device)
        with self.memory(COPY_BYTES) as source, self.memory(COPY_BYTES) as target:

            def work() -> None:
                for _ in range(COPIES):
                    self.call("cuMemcpyDtoDAsync_v2", target, source, ctypes.c_size_t(COPY_BYTES), None)

            return int(2 * COPIES * COPY_BYTES / self.seconds(work) / 1e6)

    def link_mb_s(self, a: int, b: int) -> int:
        """Bytes from device `a` to device `b`."""
        able = ctypes.c_int()
        self.call("cuDeviceCanAccessPeer", ctypes.byref(able), self.devices[b], self.devices[a])
        self.use(b)
        with self.memory(COPY_BYTES) as target:
            if able.value:
                status = self.driver.cuCtxEnablePeerAccess(self.contexts[a], 0)
                if status not in (0, 704):  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
                    raise PartError(f"gpus: cuCtxEnablePeerAccess answered {status}")
            self.use(a)
            with self.memory(COPY_BYTES) as source:
                self.use(b)

                def work() -> None:
                    for _ in range(COPIES):
                        self.call(
                            "cuMemcpyPeerAsync",
                            target,
                            self.contexts[b],
                            source,
                            self.contexts[a],
                            ctypes.c_size_t(COPY_BYTES),
                            None,
                        )

                found = int(COPIES * COPY_BYTES / self.seconds(work) / 1e6)
                self.use(a)
            self.use(b)
        return found

    def matmul_gflops(self, device: int) -> int:
        blas = self._load(
            "libcublas.so.13",
            "libcublas.so.12",
            "libcublas.so.11",
            why="gpus: there is no cuBLAS here: use an image with CUDA",
        )
        self.use(device)
        major = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(major), MAJOR, self.devices[device])
        kind = BF16 if major.value >= 8 else FP16
        handle, one, zero = ctypes.c_void_p(), ctypes.c_float(1.0), ctypes.c_float(0.0)
        if status := blas.cublasCreate_v2(ctypes.byref(handle)):
            raise PartError(f"gpus: cublasCreate answered {status}")
        size = 2 * N * N
        with self.memory(size) as a, self.memory(size) as b, self.memory(size) as c:
            pointers = [ctypes.c_void_p(pointer.value) for pointer in (a, b, c)]

            def work() -> None:
                for _ in range(PRODUCTS):
                    status = blas.cublasGemmEx(
                        handle, 0, 0, N, N, N, ctypes.byref(one), pointers[0], kind, N, pointers[1], kind, N, ctypes.byref(zero),
                        pointers[2], kind, N, FLOAT_MATH, TENSOR_OP,
                    )  # fmt: skip
                    if status:
                        raise PartError(f"gpus: cublasGemmEx answered {status}")

            seconds = self.seconds(work)
        blas.cublasDestroy_v2(handle)
        return int(PRODUCTS * 2 * N**3 / seconds / 1e9)


def devices() -> dict[str, Any]:
    """`gpus` and `links`, each device after the other: what one does never slows another."""
    cuda = Cuda()
    count = len(cuda.devices)
    found = [{"matmul_gflops": cuda.matmul_gflops(i), "memory_mb_s": cuda.copy_mb_s(i)} for i in range(count)]
    pairs = [(i, (i + 1) % count) for i in range(count)] if count > 1 else []
    return {"gpus": found, "links": [{"a": a, "b": b, "mb_s": cuda.link_mb_s(a, b)} for a, b in pairs]}


def main(environ: dict[str, str]) -> int:
    """Runs all parts; 0 also where one failed: what it could measure is told, and control judges."""
    found: dict[str, Any] = {"gpus": [], "links": [], "disk": {}, "network": {}, "errors": []}
    parts: list[Callable[[], dict[str, Any]]] = [
        devices,
        lambda: {"disk": disk(Path.cwd(), int(environ.get("TAILRACE_VERIFY_DISK_MIB", "2048")))},
        lambda: {
            "network": network(
                environ.get("TAILRACE_PROBE_URL", ""), int(environ.get("TAILRACE_VERIFY_NETWORK_MIB", "32"))
            )
        },
    ]
    for part in parts:
        try:
            found |= part()
        except PartError as error:
            found["errors"].append(str(error))
    print(f"{PREFIX} {json.dumps(found, separators=(',', ':'))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(dict(os.environ)))
