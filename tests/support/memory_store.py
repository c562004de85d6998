# SPDX-License-Identifier: Apache-2.0
"""An object store in this process, whose requests can fail."""

import contextlib

import fsspec

from dcae_jax.files import buckets, copies

URL = "memory://bucket/run"


class Failing:
    """fsspec's store in memory; every `every`-th request (0: none) raises `error`."""

    def __init__(self):
        self.store = fsspec.filesystem("memory")
        self.every, self.error, self.requests = 0, ConnectionError("connection reset"), 0

    def __getattr__(self, name):
        function = getattr(self.store, name)

        def call(*arguments, **more):
            self.requests += 1
            if self.every and self.requests % self.every == 0:
                raise self.error
            return function(*arguments, **more)

        return call


@contextlib.contextmanager
def memory_store(monkeypatch, cache):
    """An empty store, as memory://BUCKET; the user's cache is the folder `cache` meanwhile."""
    system = Failing()
    _empty(system.store)
    monkeypatch.setitem(buckets.STORES, "memory", "fsspec")
    monkeypatch.setattr(buckets, "_system", lambda scheme, process: system)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    copies._own_folder.cache_clear()
    yield system
    _empty(system.store)
    copies._own_folder.cache_clear()


def _empty(store):
    store.store.clear()
    store.pseudo_dirs[:] = [""]
