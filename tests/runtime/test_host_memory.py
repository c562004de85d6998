# SPDX-License-Identifier: Apache-2.0
"""Memory of the host: jobs keep what programs give back, library calls change nothing."""

import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

import dcae_jax
from dcae_jax import config as config_lib
from dcae_jax.api import autoencoder
from dcae_jax.checkpoints import weights as checkpoint_weights

SCRIPT = """
import resource, threading
import numpy as np
from dcae_jax.runtime import host_memory

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


LIBRARY = """
import sys
import numpy as np
import dcae_jax
from dcae_jax.runtime import host_memory

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0]) / 1024

if sys.argv[1] == "job":
    host_memory.keep()
ae = dcae_jax.create_autoencoder("tiny")
dcae_jax.load_autoencoder(sys.argv[2])
before = resident()
arrays = [np.ones(5 << 20) for _ in range(10)]
full = resident()
del arrays
print(full - before, full - resident())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_library_calls_leave_their_users_memory_alone(tmp_path):
    """Catches a library that turns off the release of memory in a notebook, a server or a loader:
    400 MB of arrays that are none of its own would stay resident for ever."""
    ae = dcae_jax.create_autoencoder("tiny")
    meta = {"kind": "autoencoder", "model": config_lib.to_json(ae.model_config)}
    checkpoint_weights.save_export(str(tmp_path), jax.tree.map(np.asarray, ae.weights), meta)
    fallen = {}
    for who in ("user", "job"):
        command = [sys.executable, "-c", LIBRARY, who, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        taken, fallen[who] = map(float, done.stdout.split())
        assert taken > 350
    assert fallen["user"] > 350
    if platform.libc_ver()[0] == "glibc":
        assert fallen["job"] < 100, "the test would not notice that memory is kept"


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_weights_are_not_their_sources_memory(kind):
    """Catches weights on a CPU that a caller, or whoever changes a mapped file, changes later."""
    ae = dcae_jax.create_autoencoder("tiny")
    weights = {name: np.asarray(value).astype(kind) for name, value in ae.weights.items()}
    name = next(name for name, value in weights.items() if value.ndim == 1)
    room = np.zeros(64 + weights[name].nbytes, np.uint8)
    first = -room.ctypes.data % 64  # where JAX takes over a float32 array as it is
    mine = room[first : first + weights[name].nbytes].view(kind)
    mine[:] = weights[name]
    weights[name] = mine
    loaded = autoencoder.build_autoencoder(ae.model_config, weights.items(), ae.mesh)
    as_read = mine.astype(np.float32)
    mine += 1
    assert loaded.weights[name].dtype == np.float32
    np.testing.assert_array_equal(loaded.weights[name], as_read)
