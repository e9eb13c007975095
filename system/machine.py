"""The machine that runs this, the memory used, and the version of the code."""

import ctypes
import functools
import platform
import subprocess
import sys
from pathlib import Path

import torch


def machine(device):
    """Name and abilities of the device, in one line."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    bf16 = "multiplies" if cpu_multiplies_bf16() else "does not multiply"
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return (
        f"{name} ({capability}, {bf16} bf16 in hardware), {platform.machine()} CPU, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )


@functools.cache
def cpu_multiplies_bf16():
    """Whether this CPU multiplies bf16 in hardware; without it bf16 is far slower than fp32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def keep_freed_memory():
    """Let the next step have the memory that one frees, where the C library is glibc.

    Otherwise large blocks go back to the system at once and are fetched anew page by page, set to
    zero: 100,000 pages a step of the 25M preset, 8 % of its processor time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def peak_memory_bytes(device):
    """The most memory used so far, by the GPU or by this process; None if the system hides it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts the memory of the parent at the start
        lines = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        if lines:
            return int(lines[0].split()[1]) * 1024
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def code_version():
    """The commit of this repository, with `+` if files were changed; None outside git."""
    here = Path(__file__).resolve().parent.parent

    def git(*command):
        return subprocess.run(
            ["git", "-C", str(here), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
