# SPDX-License-Identifier: Apache-2.0
"""`dcae-jax status`: how far a run is, by what its workdir holds."""

import json
import os
import re
import shutil

import pytest
from PIL import Image

from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.data import latents
from dcae_jax.errors import UserError
from dcae_jax.jobs import goodput, status
from dcae_jax.runtime import lease


def _lines(workdir):
    """{what: how it stands} of the block of one run."""
    title, *lines = status.report(str(workdir)).splitlines()
    assert title == str(workdir)
    return dict(re.fullmatch(r"  (\w+(?: \w+)*) +(\S.*)", line).groups() for line in lines)


@pytest.fixture
def longer(generator_run, tmp_path):
    """A copy of that run, which was to take 9 steps and stopped at 4."""
    workdir = tmp_path / "run"
    shutil.copytree(generator_run, workdir)
    record = json.loads((workdir / checkpoints.CONFIG).read_text())
    record["config"]["steps"] = 9
    (workdir / checkpoints.CONFIG).write_text(json.dumps(record))
    return workdir


def test_a_run_that_is_done(generator_run):
    """Catches a finished run that is offered to be resumed, and figures of another step."""
    found = _lines(generator_run)
    assert found["state"] == "done" and status.RESUME not in found
    assert found["step"] == "4 of 4" and found["checkpoint"] == "step 4, intact"
    assert re.match(r"step 4: .*\bloss \d", found["latest metrics"])
    assert found["job"] == "train: uvit tiny, objective epsilon"


def test_speed_time_left_and_goodput_are_those_of_all_restarts(longer, tmp_path):
    """Catches a time left without evaluations, and restarts or lost steps that are not counted."""
    (longer / "metrics.jsonl").write_text(
        '{"step": 2, "psnr_32": 9.5, "step_s": 9.0, "images_per_s": 1.0}\n'
        '{"step": 4, "loss": 0.1, "step_s": 2.0, "images_per_s": 4.0}\n'
    )
    whole = dict.fromkeys((f"{name}_s" for name in goodput.SECTIONS), 0.0)
    facts = {"marks": {"0": 0.0, "2": 30.0}, "peak_bytes": 0, "peak_host_bytes": 2e9}
    first = whole | facts | {"started": 0.0, "first_step": 0, "last_step": 3, "step_s": 40.0}
    second = whole | facts | {"started": 100.0, "first_step": 2, "last_step": 4, "step_s": 10.0}
    second |= {"evaluation_s": 50.0, "startup_s": 20.0}
    (longer / goodput.FILE).write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    found = _lines(longer)
    assert found["speed"] == "2 s per step, 4 images per s"
    assert found["time left"] == "20 s"  # 5 steps of 2 s, as long again for evaluations
    assert found["goodput"].startswith("33.3 % of 2 min 0 s in steps; start-up 16.7 %")
    assert "lost to kills 8.3 %" in found["goodput"]
    assert found["restarts"] == "1, 1 min 0 s between the processes"
    assert found["machine"] == "peak host memory 2.00 GB"
    path = str(tmp_path / "plot.png")
    assert status.main([str(longer), f"--plot={path}"]) == 0
    assert Image.open(path).size[0] > 500


def test_the_last_evaluation_is_named(generator_run, tmp_path):
    """Catches the scores of an older evaluation, and samples that are not found."""
    assert _lines(generator_run)["evaluated"] == "images/step0000004_samples.png"
    rows = [{"step": 1, "psnr_32": 9.0}, {"step": 2, "psnr_32": 9.5, "loss": 1.0}, {"step": 3}]
    said = status._evaluation(str(tmp_path), rows, {"objective": ""})
    assert said == [("evaluated", "step 2: psnr_32 9.5")]


def test_a_run_that_stopped_says_how_to_resume(longer):
    """Catches a run without its last steps that looks done; and a status that writes."""
    before = sorted(os.walk(longer))
    found = _lines(longer)
    assert (found["step"], found["state"]) == ("4 of 9", "stopped")
    assert found[status.RESUME].endswith(f"--workdir={longer}")
    assert sorted(os.walk(longer)) == before


def test_a_damaged_checkpoint_is_named_and_the_whole_one_before_it(longer):
    """Catches a damaged checkpoint reported as what the run will resume from."""
    array = next((longer / "checkpoints" / "4").rglob("d/*"))
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    said = _lines(longer)["checkpoint"]
    assert said.startswith("step 4, damaged (") and said.endswith("); step 2, intact")


def test_a_run_that_is_running_names_its_owner(longer, tmp_path):
    """Catches a running job that is said to have stopped, and a lock that a crash left behind."""
    (longer / lease.FILE).write_text("{}")
    assert _lines(longer)["state"] == "stopped"
    with lease.hold(str(longer)):
        found = _lines(longer)
        assert found["state"].startswith(f"running: process {os.getpid()} on ")
        assert status.RESUME not in found
    with lease.hold(str(tmp_path / "new")):
        found = _lines(tmp_path / "new")
        assert found["job"] == "nothing is written yet" and found["state"].startswith("running: ")


def test_a_chain_is_resumed_as_a_whole(generator_run, longer):
    """Catches the workdir of a phase in the command that has to name the chain's."""
    chain = longer.parent
    shutil.copytree(generator_run, chain / "phase1")
    longer.rename(chain / "phase2")
    blocks = [block.splitlines() for block in status.report(str(chain)).split("\n\n")]
    assert [os.path.basename(block[0]) for block in blocks] == ["phase1", "phase2", "phase3"]
    states = [[line.split()[1] for line in block if " state " in line] for block in blocks]
    assert states == [["done"], ["stopped"], ["not"]]
    (resume,) = [line for block in blocks for line in block if status.RESUME in line]
    assert resume in blocks[1] and resume.endswith(f"--workdir={chain}")


def test_shards_of_latents_are_counted(latents_folder, tmp_path):
    """Catches latents without their manifest, which no training takes, reported as done."""
    workdir = tmp_path / "latents"
    shutil.copytree(latents_folder, workdir)
    found = _lines(workdir)
    assert (found["shards"], found["state"]) == ("1 of 1", "done")
    (workdir / latents.MANIFEST).unlink()
    shard = latents.shard_name(0, 1)
    (workdir / shard).rename(workdir / latents.shard_name(2, 3))
    assert (_lines(workdir)["shards"], _lines(workdir)["state"]) == ("1 of 3", "stopped")


@pytest.mark.parametrize("form, files", [("npz", "parts"), ("png", "images")])
def test_images_drawn_so_far_are_counted(tmp_path, form, files):
    """Catches batches counted as images, or half-written files of a killed job."""
    settings = {"sample": {"count": 9, "format": form}, "source": "runs/uvit"}
    (tmp_path / "sample.json").write_text(json.dumps(settings))
    names = {"parts": ["000000-000003.npy", "000003-000005.npy", "000005-000008.npy.7.tmp"]}
    names["images"] = [f"{n:06d}.png" for n in range(5)] + ["000005.png.7.tmp"]
    (tmp_path / files).mkdir()
    for name in names[files]:
        (tmp_path / files / name).write_bytes(b"")
    assert (_lines(tmp_path)["images"], _lines(tmp_path)["state"]) == ("5 of 9", "stopped")
    (tmp_path / {"npz": "samples.npz", "png": "labels.json"}[form]).write_bytes(b"")
    found = _lines(tmp_path)
    assert found["images"].startswith("9 of 9, ") and found["state"] == "done"


@pytest.mark.parametrize("name", ["none", "empty", "file"])
def test_a_folder_without_a_run_is_a_mistake(tmp_path, name):
    """Catches a mistyped workdir that is reported as a run which never started."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{name}' .*name the --workdir of a job"):
        status.report(str(tmp_path / name))
