"""Thousands of changed files of every format that people exchange: none harms, none takes long.

A file is refused with one line, or it is accepted and then holds what its format promises.
"""

import time
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from exchanged_files import FORMATS
from system.errors import UserError
from system.machine import peak_memory_bytes
from system.safe_text import one_line
from test_hostile_files import reset_peak_memory

MOST_SECONDS = 2  # of processor time, which a busy machine does not change
MOST_BYTES = 1 << 30


def attempt(read, case):
    """Read one case within the limits of time and memory: "accepted" or "refused"."""
    reset_peak_memory()
    before, started = peak_memory_bytes(torch.device("cpu")), time.process_time()
    try:
        read(case)
        result = "accepted"
    except UserError as error:
        line = one_line(str(error))
        assert line.isprintable() and 0 < len(line) < 500
        result = "refused"
    assert time.process_time() - started < MOST_SECONDS
    assert peak_memory_bytes(torch.device("cpu")) - before < MOST_BYTES
    return result


def try_cases(make, count):
    """How many of so many cases were accepted and refused: always the same cases."""
    cases, read = make()
    found = Counter()

    @seed(21)
    @settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases)
    def try_one(case):
        found[attempt(read, case)] += 1

    try_one()
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_few(name, in_tmp):
    make, _, few = FORMATS[name]
    found = try_cases(make, few)
    assert found["refused"] > 0 and found.total() >= few


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand(name, in_tmp, capsys):
    make, many, _ = FORMATS[name]
    found = try_cases(make, many)
    with capsys.disabled():
        print(f"\n{name}: {found['accepted']:,} accepted, {found['refused']:,} refused")
    assert found["refused"] > 0 and found.total() >= many


def test_they_are_ten_thousand():
    assert sum(many for _, many, _ in FORMATS.values()) >= 10_000
