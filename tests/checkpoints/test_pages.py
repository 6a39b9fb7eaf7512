"""Pages that a process keeps: counted by the system, in a process of its own."""

import json
import platform
import resource
import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, json, resource, sys, threading
import numpy as np
from optax_moma.checkpoints._pages import keep_pages

# One fault brings in a whole huge page: PR_SET_THP_DISABLE.
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
kept = keep_pages() if sys.argv[1] == "keep" else None

def faults_of_an_array():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = np.empty(64 << 20, np.uint8)
    array[:: resource.getpagesize()] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults = [faults_of_an_array() for _ in range(3)]
in_thread = []
thread = threading.Thread(target=lambda: in_thread.append(faults_of_an_array()))
thread.start()
thread.join()
print(json.dumps([kept, faults, in_thread[0]]))
"""


def _counts(how: str) -> tuple[bool | None, list[int], int]:
    arguments = [sys.executable, "-c", _PROGRAM, how]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_pages_serve_the_next_array_and_other_threads():
    pages = (64 << 20) / resource.getpagesize()
    _, faults, in_thread = _counts("leave")
    assert min(*faults, in_thread) > 0.9 * pages  # all of them are new ones, each time
    kept, faults, in_thread = _counts("keep")
    assert kept
    assert faults[0] > 0.9 * pages
    assert max(*faults[1:], in_thread) < 0.01 * pages
