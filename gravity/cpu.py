"""Gravity attention on CPUs in fp32 and bf16: compiles `cpu.cpp` once and calls its kernels.

It needs a C++ compiler (`CXX`, else g++). The library is kept in the user's cache directory. Its
name contains a hash of source, compiler and processor: if one of them changes, it is compiled anew.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gravity.law import Law
from system.errors import warn

SOURCE = Path(__file__).with_name("cpu.cpp")
# -ffast-math without the parts that break infinities and NaN or change the rounding of the process
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fassociative-math", "-fno-signed-zeros"),
)
HOMEBREW = ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")
CUTOFF_CODES = {"none": 0, "hard": 1, "soft": 2}  # as cpu.cpp numbers them
DTYPES = (torch.float32, torch.bfloat16)


class _Tensor(ctypes.Structure):
    """`struct Tensor` of cpu.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
    ]


_SIZES = ("batch", "heads", "queries", "keys", "coords", "width", "exponent", "cutoff", "threads")
_LAW_TENSORS = ("time_scale", "time_offset", "background", "radius")
_POSITIONS = ("query_positions", "key_positions")
_RESULTS = ("result", "total", "first", "d_q", "d_k", "d_v", "d_mass", "d_law")


class _Problem(ctypes.Structure):
    """`struct Problem` of cpu.cpp: the same fields in the same order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        ("tolerance", ctypes.c_double),
        *((name, _Tensor) for name in ("q", "k", "v", "out", "grad_out")),
        ("mass", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in (*_LAW_TENSORS, *_POSITIONS, *_RESULTS)),
    ]


def cpp_compiler():
    """The words of the command that compiles C++: CXX, which may be `ccache g++`, else g++.

    None if there is no such program.
    """
    given = os.environ.get("CXX") or "g++"
    try:
        words = [given] if shutil.which(given) else shlex.split(given)
    except ValueError:  # a quote that does not end
        return None
    found = shutil.which(words[0]) if words else None
    return found and [found, *words[1:]]


def machine_flags():
    """Yield what to add to FLAGS, the best first: with OpenMP, or else for one thread."""
    yield ["-march=native", "-fopenmp"]
    # Apple's clang needs a libomp named. PyTorch's own comes first, because two abort the process.
    for folder in (Path(torch.__file__).parent, *map(Path, HOMEBREW)):
        openmp = folder / "lib" / "libomp.dylib"
        if openmp.exists():
            found = ["-Xclang", "-fopenmp", str(openmp), f"-Wl,-rpath,{openmp.parent}"]
            yield ["-mcpu=native", *found]
            break
    yield ["-march=native"]
    yield ["-mcpu=native"]  # as older clangs for ARM spell it


def cache_directory():
    """Where compiled libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "newton-gravity"


@functools.cache
def library():
    """The compiled kernels, or None after one warning if they cannot be compiled or loaded."""
    compiler, reason = cpp_compiler(), None
    if compiler is None:
        warn(
            "no C++ compiler (g++): gravity runs in plain PyTorch, several times slower; "
            "install one, or name it in CXX"
        )
        return None
    for flags in machine_flags():
        try:
            loaded = ctypes.CDLL(str(_compiled([*compiler, *FLAGS, *flags])))
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            reason = reason or f"does not compile here, so plain PyTorch is used: {lines[0]}"
        except OSError as error:
            reason = reason or f"cannot be loaded here, so plain PyTorch is used: {error}"
        else:
            if "-fopenmp" not in flags:
                warn("this C++ compiler has no OpenMP: gravity computes with one thread")
            loaded.rows_per_block.restype = ctypes.c_int64
            return loaded
    warn(f"{SOURCE.name} {reason}")
    return None


def _compiled(command):
    """The path of the library for this source, command and processor; compiled if missing."""
    # -dM lists the compiler's version and all processor features that -march=native found
    macros = subprocess.run(
        [*command, "-E", "-dM", "-x", "c++", os.devnull], check=True, capture_output=True, text=True
    ).stdout
    made_from = "\n".join([shlex.join(command), macros, SOURCE.read_text(encoding="utf-8")])
    name = f"gravity_cpu_{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    path = _folder_for(name) / name
    if not path.exists():
        # compiled elsewhere and then moved, so that no other process loads half a library
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / name
            run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
            # an empty file first, which shows in no time that the linker finds no OpenMP
            run([*command, "-x", "c++", os.devnull, "-o", str(made)])
            print(f"compiling {SOURCE.name}, once: takes some seconds", file=sys.stderr, flush=True)
            run([*command, str(SOURCE), "-o", str(made)])
            made.replace(path)
    return path


def _folder_for(name):
    """The cache directory, or a temporary one for this process if that cannot be written."""
    try:
        folder = cache_directory()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (folder / name).exists() or os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # the home directory cannot be written, or there is none
        pass
    folder = tempfile.mkdtemp(prefix="newton-gravity-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def cpu_handles(q, v):
    """Whether the kernels take these tensors and can be compiled; the first call compiles them."""
    fits = q.device.type == "cpu" and q.dtype in DTYPES and v.dtype in DTYPES
    return fits and library() is not None


def cpu_attention(q, k, v, mass, law):
    """`gravity_attention` with checked arguments, on a CPU in fp32 or bf16."""
    if not torch.is_grad_enabled():
        return cpu_forward(q, k, v, mass, law)[0]
    return _CompiledGravity.apply(q, k, v, mass, *law)


class _CompiledGravity(torch.autograd.Function):
    """The kernels with their gradients; the backward kernel recomputes the fields."""

    @staticmethod
    def forward(ctx, q, k, v, mass, *law):
        law = Law(*law)
        out, total, first = cpu_forward(q, k, v, mass, law)
        ctx.fixed = law.fixed
        ctx.save_for_backward(q, k, v, mass, *law.learned, out, total, first)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        *inputs, out, total, first = ctx.saved_tensors
        law = Law(*inputs[4:], *ctx.fixed)
        gradients = cpu_backward(grad_out, *inputs[:4], law, out, total, first)
        return *gradients, *(None for _ in ctx.fixed)


def cpu_results(q, v):
    """Memory for what `cpu_forward` returns, the output in fp32.

    Returns:
        `(out, total, first)`: out (B, H, Tq, D); total, the sums of fields, (B, H, Tq); first, the
        oldest key that each block of queries visited, (B, H, blocks).
    """
    batch, heads, queries, _ = q.shape
    blocks = -(-queries // library().rows_per_block())
    # heads of a token side by side, as the next layer reads them
    out = q.new_empty(batch, queries, heads, v.shape[-1], dtype=torch.float32).transpose(1, 2)
    total = q.new_empty(batch, heads, queries, dtype=torch.float32)
    return out, total, q.new_empty(batch, heads, blocks, dtype=torch.int32)


def cpu_forward(q, k, v, mass, law):
    """The forward kernel; returns `(out, total, first)` as `cpu_results`, out in v's dtype."""
    result, total, first = cpu_results(q, v)
    call = _Call(q, k, v, mass, law)
    call.run("gravity_forward", result=result, total=total, first=first)
    return result.to(v.dtype), total, first


def cpu_backward(grad_out, q, k, v, mass, law, out, total, first):
    """The backward kernel, for what `cpu_forward` returned.

    Returns:
        A list of the gradients of q, k, v, mass and `law.learned`; None for a missing one.
    """
    batch, heads = q.shape[:2]
    gradients = [  # (B, T, H, C) in memory, as their inputs
        torch.empty(batch, x.shape[2], heads, x.shape[3], dtype=torch.float32).transpose(1, 2)
        for x in (q, k, v)
    ]
    d_mass = torch.empty(batch, k.shape[2], dtype=torch.float32)
    # time_scale, time_offset, radius, background
    d_law = torch.empty(4, heads, dtype=torch.float32)
    call = _Call(q, k, v, mass, law, out=out, grad_out=grad_out)
    by_name = dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True))
    call.run("gravity_backward", total=total, first=first, **by_name, d_mass=d_mass, d_law=d_law)
    grads = (*gradients, d_mass, *d_law.unbind())
    inputs = (q, k, v, mass, *law.learned)
    return [None if x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]


class _Call:
    """One call of a kernel: its arguments, and the tensors that they point into."""

    def __init__(self, q, k, v, mass, law, **tensors):
        self.alive = []  # tensors that must not be freed before the call: C++ has only addresses
        batch, heads, queries, coords = q.shape
        self.problem = _Problem(
            *(batch, heads, queries, k.shape[2], coords, v.shape[3]),
            *(law.exponent, CUTOFF_CODES[law.cutoff], torch.get_num_threads(), law.tolerance),
            *(self.tensor(x) for x in (q, k, v)),
        )
        for name, tensor in tensors.items():
            setattr(self.problem, name, self.tensor(tensor))
        self.pointers(
            torch.float32,
            mass=mass,
            time_scale=law.time_scale,
            time_offset=law.time_offset,
            radius=law.radius,
            background=law.background,
        )
        self.pointers(
            torch.int64, query_positions=law.query_positions, key_positions=law.key_positions
        )

    def tensor(self, tensor):
        """A (B, H, T, C) argument; the kernel takes any strides but in the last dimension."""
        if tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self.alive.append(tensor)
        strides = tensor.stride()
        return _Tensor(tensor.data_ptr(), *strides[:3], tensor.dtype == torch.bfloat16)

    def pointers(self, dtype, **tensors):
        """Set arguments that the kernel reads as plain arrays of a type; None is a null pointer."""
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.to(dtype).contiguous()
                self.alive.append(tensor)
                setattr(self.problem, name, tensor.data_ptr())

    def run(self, kernel, **results):
        """Call a kernel that writes into these tensors, or reads what the forward one wrote."""
        for name, tensor in results.items():
            setattr(self.problem, name, tensor.data_ptr())
        getattr(library(), kernel)(ctypes.byref(self.problem))
