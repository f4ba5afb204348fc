"""`CupyRuntime` without CuPy: what it hands to the runtime and, by ctypes, to the driver; where CuPy is, its names."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lmpipe.cuda import hip
from lmpipe.cuda.hip import RuntimeCalls
from lmpipe.cuda.runtime import NOT_EXPORTABLE, Runtime, Stream
from lmpipe.errors import DeviceError, DeviceLost

NAME = "lmpipe.cuda.cupy_runtime"
UUID = bytes([0, 0x11, 0, 0x33, *range(12)])


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cudaErrorSomething: status {status}")
        self.status = status


class Api(ModuleType):
    """Takes every call down; `status` makes all of them fail."""

    is_hip = False
    CUDARuntimeError = CUDARuntimeError

    def __init__(self) -> None:
        super().__init__("cupy.cuda.runtime")
        self.status, self.calls = 0, list[tuple[Any, ...]]()

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: object) -> object:
            self.calls.append((name, *args))
            if self.status and name != "setDevice":
                raise CUDARuntimeError(self.status)
            return {"getDeviceCount": 2, "memGetInfo": (1, 2), "ipcGetMemHandle": bytes(64), "eventQuery": 600}.get(
                name, 7
            )

        return call


def _words(address: int) -> Any:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_size_t))


_AT = ctypes.c_void_p


class Library:
    """What is asked of libcuda."""

    @staticmethod
    @ctypes.CFUNCTYPE(ctypes.c_int, _AT, _AT, ctypes.c_size_t)
    def range_of(base: int, nbytes: int, address: int) -> int:
        _words(base)[0], _words(nbytes)[0] = address & ~0xFFF, 0x1000
        return 1 if address < 0x1000 else 0

    @staticmethod
    @ctypes.CFUNCTYPE(ctypes.c_int, _AT, ctypes.c_int)
    def uuid(raw: int, number: int) -> int:
        ctypes.memmove(raw, UUID[:-1] + bytes([number]), 16)
        return 0

    @staticmethod
    @ctypes.CFUNCTYPE(ctypes.c_int, _AT, _AT, _AT, ctypes.c_size_t, _AT, _AT, ctypes.c_size_t, _AT, _AT)
    def batch(
        dst: int, src: int, nbytes: int, count: int, attributes: int, first: int, kinds: int, failed: int, stream: int
    ) -> int:
        order = ctypes.cast(attributes, ctypes.POINTER(ctypes.c_int))[0]
        if (order, _words(first)[0], kinds, stream) != (1, 0, 1, 7):
            return 1
        for i in range(count):
            ctypes.memmove(_words(dst)[i], _words(src)[i], _words(nbytes)[i])
        return 0

    def __init__(self, name: str) -> None:
        functions = {
            "cuMemGetAddressRange_v2": self.range_of,
            "cuDeviceGetUuid_v2": self.uuid,
            "cuMemcpyBatchAsync": self.batch,
        }
        self.functions: dict[str, Any] = functions if name == "libcuda.so.1" else {}

    def __getitem__(self, name: str) -> Any:
        try:
            return self.functions[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """CuPy's runtime, in the module's place."""
    api = Api()
    cuda = ModuleType("cupy.cuda")
    cuda.runtime = api  # type: ignore[attr-defined]
    for name, module in {"cupy": ModuleType("cupy"), "cupy.cuda": cuda, "cupy.cuda.runtime": api}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    yield api
    sys.modules.pop(NAME, None)


def opened(name: str = "1") -> Runtime:
    return importlib.import_module(NAME).open_device(name)


def test_a_device_by_number_or_uuid(api: Api) -> None:
    second = "00110033-0001-0203-0405-060708090a01"
    assert opened("1").uuid == opened(f"GPU-{second}").uuid == opened(f"MIG-{second.upper()}").uuid == f"GPU-{second}"
    assert {call for call in api.calls if call[0] == "setDevice"} == {("setDevice", 1)}
    with pytest.raises(DeviceError, match=r"no GPU 2 here; these are visible: GPU-0011.*00, GPU-0011.*01"):
        opened("2")


def test_every_call_names_its_device_first(api: Api) -> None:
    runtime = opened()
    api.calls.clear()
    stream, event = runtime.new_stream(urgent=False), runtime.new_event(shared=True)
    runtime.wait(stream, event)
    runtime.pin(4096, 8192)
    runtime.open_memory(bytes(64))
    runtime.copy_rows(1, 2, 3, 4, 5, 6, stream)
    assert api.calls[::2] == [("setDevice", 1)] * 6
    assert api.calls[1::2] == [
        ("streamCreateWithPriority", 1, 1 << 30),
        ("eventCreateWithFlags", 7),
        ("streamWaitEvent", 7, 7, 0),
        ("hostRegister", 4096, 8192, 1),
        ("ipcOpenMemHandle", bytes(64), 1),
        ("memcpy2DAsync", 1, 2, 3, 4, 5, 6, 4, 7),
    ]
    assert not runtime.reached(event)
    for call in (runtime.free_event, runtime.synchronize, runtime.export_event):
        call(event)
    for release in (runtime.unpin, runtime.free_pinned, runtime.close_memory, runtime.new_pinned):
        release(4096)
    runtime.record(event, stream)
    runtime.finish(stream)
    runtime.free_stream(stream)
    assert runtime.memory() == (1, 2) and runtime.open_event(bytes(64)) == 7
    assert runtime.export_memory(4096) == bytes(64)
    api.calls.clear()
    begin, end = runtime.new_event(timed=True), runtime.new_event(timed=True)
    assert runtime.elapsed_ms(begin, end) == 7 and runtime.number == 1
    assert api.calls[1::2] == [("eventCreateWithFlags", 1)] * 2 + [("eventElapsedTime", 7, 7)]


@pytest.mark.parametrize("batched", [True, False])
def test_copies_go_in_one_call_where_there_is_one(api: Api, batched: bool) -> None:
    runtime = opened()
    if not batched:
        runtime._driver.batch = None  # type: ignore[attr-defined]
    api.calls.clear()
    src, dst = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
    places = np.array([0, 48, 16], np.uint64)
    sizes = np.array([4, 16, 8], np.uint64)
    at = [places + np.uint64(memory.ctypes.data) for memory in (dst, src)]
    runtime.copy(at[0], at[1], sizes, Stream(7))
    if batched:
        assert all((dst[i : i + n] == src[i : i + n]).all() for i, n in zip([0, 48, 16], [4, 16, 8], strict=True))
        assert dst.astype(bool).sum() == 3 + 16 + 8
        with pytest.raises(DeviceError, match="copying 3 pieces: cuMemcpyBatchAsync"):
            runtime.copy(at[0], at[1], sizes, Stream(8))
    copied = [call for call in api.calls if call[0] == "memcpyAsync"]
    assert copied == (
        []
        if batched
        else [
            ("memcpyAsync", to, come_from, n, 4, 7)
            for to, come_from, n in zip(*(a.tolist() for a in at), sizes.tolist(), strict=True)
        ]
    )
    runtime.copy(at[0][:1], at[1][:1], sizes[:1], Stream(7))
    runtime.copy(at[0][:0], at[1][:0], sizes[:0], Stream(7))
    assert sum(call[0] == "memcpyAsync" for call in api.calls) == (1 if batched else 4)


def test_allocations_are_the_drivers(api: Api) -> None:
    runtime = opened()
    assert runtime.allocation(0x7FFF_1234_5678) == (0x7FFF_1234_5000, 0x1000)
    with pytest.raises(DeviceError, match="0x10 is no memory of the device"):
        runtime.allocation(0x10)


def test_statuses_become_errors(api: Api) -> None:
    runtime = opened()
    api.status = 1
    with pytest.raises(DeviceError) as caught:
        runtime.export_memory(4096)
    assert str(caught.value) == f"exporting pages: cudaErrorSomething: status 1 (1): {NOT_EXPORTABLE}"
    api.status = 2
    with pytest.raises(DeviceError, match="memlock"):
        runtime.pin(4096, 4096)
    api.status = 719
    with pytest.raises(DeviceLost):
        runtime.memory()
    api.status = 35
    with pytest.raises(DeviceError, match="install a driver"):
        opened()


class HipLibrary:
    """What is asked of libamdhip64: notes what it was given, as integers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.status = 0
        self.id = b"0123456789abcde"
        size, number, pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
        self._types: dict[str, tuple[Any, ...]] = {
            "hipStreamCreateWithPriority": (pointer, ctypes.c_uint, number),
            "hipIpcGetEventHandle": (pointer, pointer),
            "hipIpcOpenEventHandle": (pointer, hip.EventHandle),
            "hipHostRegister": (pointer, size, ctypes.c_uint),
            "hipHostUnregister": (pointer,),
            "hipMemcpy2DAsync": (pointer, size, pointer, size, size, size, number, pointer),
        }

    def uuid(self, raw: int, number: int) -> int:
        """As text: a serial number's digits."""
        text = self.id + str(number).encode() if self.id else b"XX"
        ctypes.memmove(raw, text.ljust(16, b"\0"), 16)
        return 0

    def _noted(self, name: str, *args: Any) -> int:
        if name == "hipIpcGetEventHandle":
            ctypes.memset(args[0], 0x5A, 64)
        elif name in ("hipStreamCreateWithPriority", "hipIpcOpenEventHandle"):
            _words(args[0])[0] = 77
        shown = (bytes(arg) if isinstance(arg, hip.EventHandle) else arg for arg in args)
        self.calls.append((name, *shown))
        return self.status

    def __getitem__(self, name: str) -> Any:
        if name == "hipMemGetAddressRange":
            return Library.range_of
        if name == "hipDeviceGetUuid":
            return ctypes.CFUNCTYPE(ctypes.c_int, _AT, ctypes.c_int)(self.uuid)
        if name not in self._types:
            raise AttributeError(name)
        return ctypes.CFUNCTYPE(ctypes.c_int, *self._types[name])(partial(self._noted, name))


@pytest.fixture
def library(api: Api, monkeypatch: pytest.MonkeyPatch) -> HipLibrary:
    """CuPy's build for ROCm, which refuses what it has only stubs for."""
    library = HipLibrary()
    monkeypatch.setattr(api, "is_hip", True, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library if name == hip.LIBRARY else None)
    for name in [name for name in vars(RuntimeCalls) if not name.startswith("_")]:

        def refuse(*_: object) -> None:
            raise CUDARuntimeError(999)

        monkeypatch.setattr(api, name, refuse, raising=False)
    return library


def test_hip_has_its_own_library(library: HipLibrary) -> None:
    """For what CuPy refuses there, with CUDA's constants, which are HIP's too."""
    runtime = opened("0")
    assert runtime.allocation(0x5678)[0] == 0x5000
    stream, event = runtime.new_stream(urgent=True), runtime.new_event(shared=True)
    assert (stream, event) == (77, 7)
    assert runtime.export_event(event) == b"\x5a" * 64 and runtime.open_event(b"\xa5" * 64) == 77
    runtime.pin(4096, 8192)
    runtime.unpin(4096)
    runtime.copy_rows(1, 2, 3, 4, 5, 6, stream)
    assert [(name, *args) for name, *args in library.calls if "Ipc" not in name] == [
        ("hipStreamCreateWithPriority", library.calls[0][1], 1, -(1 << 30)),
        ("hipHostRegister", 4096, 8192, 1),
        ("hipHostUnregister", 4096),
        ("hipMemcpy2DAsync", 1, 2, 3, 4, 5, 6, 4, 77),
    ]
    assert [call[0] for call in library.calls if "Ipc" in call[0]] == ["hipIpcGetEventHandle", "hipIpcOpenEventHandle"]
    assert library.calls[2][2] == b"\xa5" * 64
    library.status = 2
    with pytest.raises(DeviceError, match=r"pinning memory: .* 2 .*memlock"):
        runtime.pin(4096, 8192)


def test_copies_under_hip_are_calls_of_their_own(api: Api, library: HipLibrary) -> None:
    runtime = opened("0")
    api.calls.clear()
    ones = np.ones(3, np.uint64)
    runtime.copy(ones, ones, ones, Stream(7))
    assert [call[0] for call in api.calls] == ["setDevice"] + ["memcpyAsync"] * 3


def test_devices_under_hip_are_called_as_rocminfo_does(
    api: Api, library: HipLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened("1").uuid == opened("GPU-0123456789ABCDE1").uuid == "GPU-0123456789abcde1"
    library.id = b""
    monkeypatch.setattr(api, "deviceGetPCIBusId", lambda number: f"0000:c{number}:00.0", raising=False)
    assert [opened(number).uuid for number in "01"] == ["GPU-0000:c0:00.0", "GPU-0000:c1:00.0"]


def test_an_old_rocm_is_refused(library: HipLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    old = HipLibrary()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: old)
    monkeypatch.delitem(old._types, "hipIpcOpenEventHandle")
    with pytest.raises(DeviceError, match=r"libamdhip64.so has no hipIpcOpenEventHandle: install a newer"):
        opened("0")


def test_the_library_that_cupy_has_loaded_is_used(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 08:01 42                         {}\n"
    maps.write_text(line.format("/usr/lib/libc.so.6") + line.format("/opt/rocm/lib/libamdhip64.so.7.1"))
    assert hip.library_path(maps) == "/opt/rocm/lib/libamdhip64.so.7.1"
    maps.write_text(line.format("/usr/lib/libc.so.6") + line.format("[heap]"))
    assert hip.library_path(maps) == hip.LIBRARY


def test_no_library_no_device(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(DeviceError, match=r"libcuda.so.1 cannot be loaded: .*; install the driver"):
        opened()


def test_cupy_has_what_is_asked_of_it() -> None:
    """Every name that the stub for the type checker has, CuPy has too."""
    cupy_api = pytest.importorskip("cupy.cuda.runtime", exc_type=ImportError)
    stub = (Path(__file__).parents[2] / "typings/cupy/cuda/runtime.pyi").read_text()
    names = [line.split("(")[0].removeprefix("def ") for line in stub.splitlines() if line.startswith("def ")]
    assert len(names) > 20 and all(callable(getattr(cupy_api, name)) for name in names)
    assert issubclass(cupy_api.CUDARuntimeError, RuntimeError) and isinstance(cupy_api.is_hip, bool)
