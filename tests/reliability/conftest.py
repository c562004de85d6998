# SPDX-License-Identifier: Apache-2.0
"""What the tests that kill and starve jobs share."""

import importlib.util

import fsspec
import pytest
from support import killing, stores

from dcae_jax.files import buckets


@pytest.fixture(scope="module")
def forks():
    """A server that runs command lines in forked processes."""
    server = killing.Forks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of images to train on."""
    return killing.pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, tmp_path_factory):
    """(URL of a bucket, the proxy before its store); the clients' environment is set."""
    for package in (stores.PACKAGES[request.param], buckets.STORES[request.param]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; run `make test-buckets`")
    folder = tmp_path_factory.mktemp(request.param)
    with stores.store(request.param, folder) as (proxy, environment):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            buckets._system.cache_clear()
            fsspec.get_filesystem_class(request.param).clear_instance_cache()  # of other modules
            yield f"{request.param}://{stores.BUCKET}", proxy


@pytest.fixture(scope="module")
def run(bucket):
    """A server that runs command lines; it has the environment of the store's clients."""
    server = killing.Forks()
    yield server
    server.close()
