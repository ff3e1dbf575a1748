"""Memory that stays with the process: no page is mapped anew within, and what is free goes back after."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch

from dfadc.distillation.allocator import kept_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
MEBIBYTE = 2**20
PAGES = 64 * MEBIBYTE // resource.getpagesize()


def faults_of_a_new_tensor() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_tensor_takes_the_memory_of_the_one_before() -> None:
    with kept_memory(torch.device("cpu")):
        faults = [faults_of_a_new_tensor() for _ in range(40)]
        assert max(faults[-5:]) < PAGES / 100  # the first ones find no room that nothing small has been put into
    faults_of_a_new_tensor()
    assert faults_of_a_new_tensor() > PAGES / 1000  # the system's own way again (a page may be a huge one)


def test_what_is_free_goes_back() -> None:
    before = resident_bytes()
    with kept_memory(torch.device("cpu")):
        torch.ones(256 * MEBIBYTE, dtype=torch.uint8)
        assert resident_bytes() - before > 200 * MEBIBYTE
    assert resident_bytes() - before < 100 * MEBIBYTE


def test_a_gpu_keeps_its_own_memory() -> None:
    with kept_memory(torch.device("meta")):
        faults_of_a_new_tensor()
        assert faults_of_a_new_tensor() > PAGES / 1000
