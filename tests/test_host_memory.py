# SPDX-License-Identifier: Apache-2.0
"""What the process does with memory that programs give back."""

import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

from dcae_jax import config as config_lib
from dcae_jax import host_memory, sharding

SCRIPT = """
import resource, threading
import numpy as np
from dcae_jax import host_memory

def work():
    for call in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(1 << 24, np.float32)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults = []
if {keep}:
    assert host_memory.keep()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again_without_faults():
    """Catches a setting that glibc refuses, or that does not reach the threads of programs: each
    call would fault in its 64 MB again."""
    faults = {}
    for keep in (False, True):
        command = [sys.executable, "-c", SCRIPT.format(keep=keep)]
        faults[keep] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert faults[False] > 30  # 2 MB pages at the largest
    assert faults[True] < 30


def test_jax_takes_an_owned_copy_over_as_it_is():
    """Catches weights that lie in memory twice while placed, or that a caller can change."""
    mesh = sharding.make_mesh(config_lib.default().mesh, jax.devices()[:1])
    value = np.arange(12.0, dtype=np.float16).reshape(3, 4).T
    copy = host_memory.owned(value)
    placed = sharding.host_to_global(copy, sharding.replicated(mesh))
    assert placed.addressable_data(0).unsafe_buffer_pointer() == copy.ctypes.data
    value += 1
    np.testing.assert_array_equal(placed, value.astype(np.float32) - 1)
