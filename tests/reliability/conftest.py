# SPDX-License-Identifier: Apache-2.0
"""What the tests that kill and starve jobs share."""

import pytest
from support import killing


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
