"""The compiled kernels: windows, strides, threads, positions, and machines without a compiler."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, run
from gravity import cpu
from gravity.attention import gravity_attention
from gravity.law import gravity_attention_reference
from particles import CUTOFFS, assert_close, double, output_and_gradients, particles

pytestmark = pytest.mark.skipif(cpu.cpp_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def oldest_visited(monkeypatch):
    """For each forward pass the oldest key that each block of queries visited, (B, H, blocks)."""
    found = []
    run_kernel = cpu._Call.run

    def spying(self, kernel, **results):
        run_kernel(self, kernel, **results)
        if kernel == "gravity_forward":
            found.append(results["first"])

    monkeypatch.setattr(cpu._Call, "run", spying)
    return found


def long_particles(tokens, **settings):
    return particles(tokens, batch=1, coords=16, width=40, dtype=torch.float32, **settings)


@pytest.mark.parametrize("mass_in_value", [False, True])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("tokens", [47, 48, 49, 191, 193, 500])
def test_equals_reference_over_many_blocks(tokens, cutoff, mass_in_value):
    """Lengths around the kernels' block sizes, and widths that do not fill a vector."""
    data = long_particles(tokens, heads=3, cutoff=cutoff, spread=0.4)
    upstream = torch.randn_like(data["v"])
    settings = dict(cutoff=cutoff, mass_in_value=mass_in_value)
    truth = output_and_gradients(
        gravity_attention_reference, double(data), upstream.double(), **settings
    )
    found = output_and_gradients(gravity_attention, data, upstream, **settings)
    for name, expected in truth.items():
        error = (found[name].double() - expected).norm() / expected.norm()
        limit = 1e-3 if name in ("time_scale", "time_offset", "radius") else 1e-5
        assert error < limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_tolerance_skips_within_its_bound(tolerance, oldest_visited):
    data = long_particles(900, heads=3, spread=0.3)
    data["time_scale"] = torch.tensor([0.9, 0.3, 0.001])
    truth = gravity_attention_reference(**double(data))
    found = gravity_attention(**data, field_tolerance=tolerance)
    limit = 2 * tolerance * float(data["v"].abs().max()) + 1e-5
    assert (found - truth).abs().max() <= limit
    last_block = oldest_visited[0][0, :, -1]
    assert last_block[0] > 700 and last_block[1] > 300 and last_block[2] == 0
    gravity_attention(**data)
    assert (oldest_visited[1] == 0).all()


def test_skipping_is_exact_beyond_a_radius(oldest_visited):
    data = long_particles(700, heads=2, spread=0.3)
    data |= {"time_scale": torch.tensor([0.5, 0.04]), "radius": torch.tensor([8.0, 8.0])}
    upstream = torch.randn_like(data["v"])
    for cutoff in ("hard", "soft"):
        oldest_visited.clear()
        truth = output_and_gradients(
            gravity_attention_reference, double(data), upstream.double(), cutoff=cutoff
        )
        found = output_and_gradients(gravity_attention, data, upstream, cutoff=cutoff)
        assert_close(found, truth, 5e-5, 1e-4)
        assert (oldest_visited[0][0, :, -1] > torch.tensor([550, 250])).all()


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("newest", [1, 3, 60])
def test_decoding_with_gaps_in_the_positions(newest, low):
    data = long_particles(300, heads=4, spread=0.3, cutoff="hard")
    data |= {name: data[name].to(low) for name in "qkv"}
    t = torch.arange(300) + 5 * (torch.arange(300) // 70) + 10**6
    truth = gravity_attention_reference(
        **double(data), cutoff="hard", query_positions=t, key_positions=t
    )
    rows = gravity_attention(
        **data | {"q": data["q"][:, :, -newest:]},
        cutoff="hard",
        query_positions=t[-newest:],
        key_positions=t,
    )
    assert rows.dtype == low
    torch.testing.assert_close(
        rows.double(), truth[:, :, -newest:], rtol=0, atol=1e-5 if low == torch.float32 else 2e-2
    )


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4])
def test_a_decoding_step_leaves_out_within_its_bound(tolerance):
    """One query also skips values that weigh too little; both together stay within the bound."""
    data = long_particles(900, heads=3, spread=0.3)
    data["time_scale"] = torch.tensor([0.9, 0.3, 0.001])
    data["v"][:, :, :-30] *= -1  # so that leaving out changes the output
    t = torch.arange(900)
    last = data | {"q": data["q"][:, :, -1:]}
    positions = dict(query_positions=t[-1:], key_positions=t)
    truth = gravity_attention_reference(**double(last), **positions)
    found = gravity_attention(**last, **positions, field_tolerance=tolerance)
    error = float((found - truth).abs().max())
    assert error <= 2 * tolerance * float(data["v"].abs().max()) + 1e-5
    assert tolerance < 1e-1 or error > 1e-4
    exact = gravity_attention(**last, **positions)
    assert (exact - truth).abs().max() < 1e-5


def test_threads_do_not_matter():
    """One head on three threads: queries are split, the numbers are the same."""
    data = long_particles(600, heads=1)
    upstream = torch.randn_like(data["v"])
    one = output_and_gradients(gravity_attention, data, upstream, field_tolerance=1e-6)
    torch.set_num_threads(3)
    try:
        three = output_and_gradients(gravity_attention, data, upstream, field_tolerance=1e-6)
    finally:
        torch.set_num_threads(1)
    assert_close(three, one, 1e-5, 1e-6)


def test_heads_split_from_one_projection_and_a_transposed_value():
    data = long_particles(70, heads=3)
    strided = {n: data[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qk"}
    strided["v"] = data["v"].mT.contiguous().mT
    assert strided["v"].stride(-1) != 1 and not strided["q"].is_contiguous()
    assert (gravity_attention(**data | strided) - gravity_attention(**data)).abs().max() < 1e-6


def test_nan_stays_nan():
    """A broken weight must show in the loss, not be skipped like a token far away."""
    data = long_particles(300, heads=1)
    data["k"][0, 0, 10] = float("nan")
    out = gravity_attention(**data, field_tolerance=1e-4)
    assert out[0, 0, 10:60].isnan().all()


def test_rounding_mode_of_the_process_is_left_alone():
    """The kernels flush denormals; PyTorch's own numbers keep them."""
    gravity_attention(**long_particles(20))
    tiny = torch.tensor([1e-40]) * torch.ones(1)
    assert float(tiny) > 0


@pytest.mark.parametrize(
    "given, words",
    [
        ("env {cxx}", ["env", "{cxx}"]),
        ("{cxx} -m64", ["{cxx}", "-m64"]),
        ("'{cxx}' -DA='1 2'", ["{cxx}", "-DA=1 2"]),
        ("", ["{cxx}"]),
        ("no-such-compiler g++", None),
        ("g++ 'unclosed", None),
    ],
)
def test_a_compiler_of_several_words(given, words, monkeypatch):
    """CXX as make and cmake take it: a cache before it, flags behind."""
    (cxx,) = cpu.cpp_compiler()
    monkeypatch.setenv("CXX", given.format(cxx=cxx))
    found = cpu.cpp_compiler()
    if words is None:
        assert found is None
    else:
        expected = [word.format(cxx=cxx) for word in words]
        assert found == [shutil.which(expected[0]), *expected[1:]]


REFUSED = {  # what Apple's clang refuses, and what clang on Debian lacks
    "no OpenMP": "*-fopenmp*) echo \"error: unsupported option '-fopenmp'\" >&2; exit 1",
    "no libomp": "*-fopenmp*' -o '*) echo 'ld: cannot find -lomp' >&2; exit 1",
    "older ARM": "*-fopenmp*|*-march=*) echo 'error: no -march=native' >&2; exit 1",
}


@pytest.mark.parametrize("case", REFUSED)
def test_without_openmp_one_thread_computes(case, tmp_path, monkeypatch, capfd):
    """One thread of the compiled kernels beats plain PyTorch; one warning in each process."""
    compiler = tmp_path / "c++"
    # this compiler's own name for "this very processor"; -O0 compiles in no time
    arguments = 'set -- "${@/#-mcpu=native/-march=native}"\n' if "ARM" in case else ""
    (cxx,) = cpu.cpp_compiler()
    compiler.write_text(
        f'#!/bin/bash\ncase "$*" in {REFUSED[case]};; esac\n{arguments}exec {cxx} "$@" -O0\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for is_first in (True, False):
        kernels = cpu.library.__wrapped__()
        said = capfd.readouterr().err
        assert said.count("warning: ") == 1 and "one thread" in said
        assert ("compiling" in said) == is_first
    monkeypatch.setattr(cpu, "library", lambda: kernels)
    data = long_particles(60)
    truth = gravity_attention_reference(**double(data))
    assert (gravity_attention(**data) - truth).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["none", "broken"])
def test_without_a_working_compiler_one_warning(case, tmp_path):
    """Plain PyTorch takes over after one warning, with the same numbers."""
    compiler = tmp_path / "c++"
    if case == "broken":
        compiler.write_text("#!/bin/sh\necho 'error: no such luck' >&2\nexit 1\n")
        compiler.chmod(0o755)
    code = (
        "import torch; from gravity import gravity_attention as f\n"
        "x = torch.ones(1, 1, 5, 16); one = torch.ones(1)\n"
        "for _ in range(2): print(f(x, x, x, torch.ones(1, 5), time_scale=one, time_offset=one)"
        ".mean().item())\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    result = run(script, cwd=tmp_path, env=environment, check=0)
    assert [float(line) for line in result.stdout.split()] == pytest.approx([1, 1])
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "PyTorch" in warnings[0]


def test_the_library_is_made_once_and_survives_a_read_only_home(tmp_path):
    """A second process compiles nothing; without a folder to keep the library it still works."""
    compiler = tmp_path / "c++"
    (cxx,) = cpu.cpp_compiler()
    compiler.write_text(f'#!/bin/sh\nexec {cxx} "$@" -O0\n')  # compiles in no time
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    script = tmp_path / "script.py"
    script.write_text("from gravity import cpu; print(cpu.library()._name)")
    first, second = (run(script, cwd=tmp_path, env=environment, check=0) for _ in range(2))
    assert "compiling" in first.stderr and "compiling" not in second.stderr
    assert first.stdout == second.stdout != ""
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1
    environment |= {"XDG_CACHE_HOME": "/proc/no/such/place", "PYTHONPATH": str(ROOT)}
    third = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert third.returncode == 0 and third.stdout.strip().endswith(".so")
    assert not os.path.exists(third.stdout.strip())
