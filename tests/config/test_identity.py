# SPDX-License-Identifier: Apache-2.0
"""What a resumed run shares with the run that it continues."""

import pytest
from support import to_json

from dcae_jax import config as config_lib

# Top-level keys that a resumed run must share: the contract of docs, not read off the code.
IDENTITY = (
    "model trainable loss optimizer ema_decay ema_warmup accumulate data seed batch_size "
    "resolution resolutions dtype patch_size objective label_dropout structured augment meanflow "
    "distill"
).split()
FREE = ("data.workers", "data.threads", "data.prefetch")  # how fast the same batches arrive


def test_identity_names_what_differs_and_lets_speed_keys_pass():
    """Catches a resume with another batch size, and one refused for a worker more."""
    before, now = config_lib.default(), config_lib.default()
    now.batch_size, now.steps, now.data.workers, now.mesh.fsdp = 64, 7, 3, 2
    now.optimizer.b1 = 0.5
    changes = config_lib.identity_changes(to_json(before), to_json(now))
    assert changes == {"batch_size": (256, 64), "optimizer.b1": (0.9, 0.5)}


@pytest.mark.parametrize("before", ["constant", "cosine"])
@pytest.mark.parametrize("now", ["constant", "cosine"])
def test_steps_are_identity_where_the_schedule_ends_at_them(before, now):
    """Catches a learning rate that jumps from near 0 back up, for a few steps more."""
    a, b = config_lib.default(), config_lib.default()
    a.steps, b.steps = 1000, 2000
    a.optimizer.schedule, b.optimizer.schedule = before, now
    changes = config_lib.identity_changes(to_json(a), to_json(b))
    assert ("steps" in changes) == ("cosine" in (before, now))


@pytest.mark.parametrize("key", list(config_lib.flatten(config_lib.default().to_dict())))
def test_a_resumed_run_shares_every_key_of_its_identity_and_no_other(key):
    """Catches a key that leaves the identity, so that a run goes on as another one, and a resume
    refused for a key that changes no number."""
    before, now = config_lib.default(), config_lib.default()
    old = config_lib.flatten(to_json(before))[key]
    section, _, last = key.rpartition(".")
    here = now[section] if section else now
    here[last] = _another(here[last])
    changes = config_lib.identity_changes(to_json(before), to_json(now))
    shared = key.split(".")[0] in IDENTITY and key not in FREE
    assert changes == ({key: (old, config_lib.flatten(to_json(now))[key])} if shared else {})


def _another(value):
    """A value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    return (*value, "x") if isinstance(value, tuple) else value + type(value)(1)


def test_a_run_of_an_older_version_goes_on():
    """Catches an update of this package after which no run of the version before resumes."""
    before, now = to_json(config_lib.default()), config_lib.default()
    del before["distill"], before["model"]["decoder_widths"]
    assert not config_lib.identity_changes(before, to_json(now))
    now.distill.l1_weight = 0.5
    changes = config_lib.identity_changes(before, to_json(now))
    assert changes == {"distill.l1_weight": (0.0, 0.5)}


def test_tuples_survive_json():
    """Catches every run refusing to resume because () became []."""
    config = config_lib.default()
    assert not config_lib.identity_changes(to_json(config), to_json(config_lib.default()))
