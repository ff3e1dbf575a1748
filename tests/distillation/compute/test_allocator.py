"""Memory that stays with the process: no page is mapped anew within, and what is free goes back after.

Each is seen in a process of its own: where others left room in the heap, any tensor finds it.
"""

from __future__ import annotations

import platform
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from command_line import run_python

from dfadc.distillation.compute.allocator import kept_memory

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
MEBIBYTE = 2**20
PAGES = 64 * MEBIBYTE // resource.getpagesize()


def faults_of_a_new_tensor() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_a_fresh_process(measure: Callable[[], list[int]]) -> list[int]:
    program = "import runpy, sys; sys.path.append(sys.argv[1]); print(*runpy.run_path(sys.argv[2])[sys.argv[3]]())"
    done = run_python(program, Path(__file__).parents[2], __file__, measure.__name__)
    assert done.code == 0, done.err
    return [int(number) for number in done.out.split()]


def faults_within_and_after() -> list[int]:
    with kept_memory(torch.device("cpu")):
        faults = [faults_of_a_new_tensor() for _ in range(40)]
    faults_of_a_new_tensor()
    return [max(faults[-5:]), faults_of_a_new_tensor()]  # the first ones find no room without anything small in it


def bytes_within_and_after() -> list[int]:
    before = resident_bytes()
    with kept_memory(torch.device("cpu")):
        torch.ones(256 * MEBIBYTE, dtype=torch.uint8)
        within = resident_bytes() - before
    return [within, resident_bytes() - before]


def faults_with_a_gpu() -> list[int]:
    with kept_memory(torch.device("meta")):
        return [faults_of_a_new_tensor() for _ in range(2)]


def test_a_tensor_takes_the_memory_of_the_one_before() -> None:
    within, after = in_a_fresh_process(faults_within_and_after)
    assert within < PAGES / 100
    assert after > PAGES / 1000  # the system's own way again (a page may be a huge one)


def test_what_is_free_goes_back() -> None:
    within, after = in_a_fresh_process(bytes_within_and_after)
    assert within > 200 * MEBIBYTE
    assert after < 100 * MEBIBYTE


def test_a_gpu_keeps_its_own_memory() -> None:
    _, second = in_a_fresh_process(faults_with_a_gpu)
    assert second > PAGES / 1000
