# SPDX-License-Identifier: Apache-2.0
"""The launch scripts, against stand-ins for gcloud, kubectl, sbatch, srun and scontrol.

PATH holds the stand-ins and a few plain tools alone: no script can reach a real cluster.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TOOLS = ("bash", "env", "git", "mktemp", "rm", "dirname", "sleep", "cat", "head", "tar")
JOB = ["--config=configs/phase1.py:tiny", '--config.trainable=("a\\.b c", "$d & e")']

# Writes its name and arguments as a line of JSON, then does as the test says.
STAND_IN = """#!{python} -S
import json, os, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["CALLS"], "a") as file:
    stdin = sys.stdin.read() if name in ("kubectl", "sbatch") else ""
    file.write(json.dumps([name, sys.argv[1:], stdin]) + "\\n")
{body}
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a script among stand-ins -> (status, what it wrote, the calls that it made)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))

    def run(script, *arguments, body="", cwd=ROOT, **settings):
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol"):
            file = folder / name
            file.write_text(STAND_IN.format(python=sys.executable, body=body))
            file.chmod(0o755)
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            [str(script), *arguments],
            env={"PATH": str(folder), "CALLS": str(calls), "HOME": str(tmp_path), **settings},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        seen = [json.loads(line) for line in calls.read_text().splitlines()]
        return done.returncode, done.stdout + done.stderr, seen

    return run


SETTINGS = {
    "tpu_vm.sh": {"NAME": "run1", "ZONE": "zone", "POLL": "0"},
    "gke.sh": {"NAME": "run1", "IMAGE": "registry/image:1", "ACCOUNT": "trainer"},
    "slurm.sh": {"NAME": "run1", "NODES": "2", "GPUS": "4"},
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    """Catches an unquoted variable, which breaks on the first argument with a space."""
    beside = os.path.dirname(sys.executable)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([beside, os.environ["PATH"]]))
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_each_file_is_short(path):
    """Catches a script that grew past what a reader takes in at once."""
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_dry_run_calls_nothing_and_shows_the_job(launch, script):
    """Catches a dry run that spends money, or that hides what would run."""
    status, said, calls = launch(script, "--dry-run", *JOB, **SETTINGS[script.name])
    assert status == 0 and not calls, said
    assert "configs/phase1.py:tiny" in said and "run1" in said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_missing_argument_is_told(launch, script):
    """Catches a script that starts half a job: without a name, or without flags."""
    settings = SETTINGS[script.name]
    status, said, calls = launch(script, **settings)
    assert status == 2 and "error: no job" in said and not calls
    status, said, calls = launch(script, *JOB, **(settings | {"NAME": ""}))
    assert status != 0 and "NAME" in said and not calls


def test_the_manifest_is_a_jobset(launch):
    """Catches a misspelt field, which Kubernetes may drop in silence, and a mangled argument."""
    status, said, calls = launch(LAUNCH / "gke.sh", *JOB, **SETTINGS["gke.sh"])
    assert status == 0 and [call[:2] for call in calls] == [["kubectl", ["apply", "-f", "-"]]], said
    manifest = yaml.safe_load(calls[0][2])
    schema = json.loads((ROOT / "tests" / "jobset_schema.json").read_text())
    jsonschema.validate(manifest, schema)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4  # 4x4 chips, 4 a host
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == JOB
    assert job["template"]["spec"]["serviceAccountName"] == "trainer"
    rules = job["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule["onExitCodes"]["values"]) for rule in rules] == [
        ("FailJob", [1, 2])
    ]
    assert rules[0]["onExitCodes"]["containerName"] == container["name"]
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize(
    "status, again", [(0, False), (1, False), (2, False), (75, True), (137, True), (143, True)]
)
def test_slurm_queues_again_after_75_and_kills_alone(launch, tmp_path, status, again):
    """Catches a mistake that is queued for days, and a preempted run that is not."""
    settings = SETTINGS["slurm.sh"]
    done, said, calls = launch(LAUNCH / "slurm.sh", *JOB, **settings, PYTHON="python", cwd=tmp_path)
    assert done == 0 and [call[0] for call in calls] == ["sbatch"], said
    script = tmp_path / "batch.sh"
    script.write_text(calls[0][2])
    script.chmod(0o755)
    body = f"sys.exit({status} if name == 'srun' else 0)"
    done, said, calls = launch(script, body=body, cwd=tmp_path, SLURM_JOB_ID="17")
    assert calls[0][0] == "srun" and calls[0][1][-2:] == JOB
    assert calls[1:] == ([["scontrol", ["requeue", "17"], ""]] if again else [])
    assert done == status
    _, _, calls = launch(
        script, body=body, cwd=tmp_path, SLURM_JOB_ID="17", SLURM_RESTART_COUNT="20"
    )
    assert len(calls) == 1, "it never gives up"


def test_slurm_judges_by_what_failed_first(launch, tmp_path):
    """Catches a mistake of one process being queued again, since the others were then killed."""
    settings = SETTINGS["slurm.sh"]
    _, _, calls = launch(LAUNCH / "slurm.sh", *JOB, **settings, PYTHON="python", cwd=tmp_path)
    script = tmp_path / "batch.sh"
    script.write_text(calls[0][2])
    script.chmod(0o755)
    # Process 0 exits 2, process 1 is killed for it; srun reports the larger status.
    body = """
import subprocess
if name == "srun":
    start = sys.argv.index("bash")
    wrapper = sys.argv[start : start + 4]
    assert wrapper[1] == "-c"
    for status in ("exit 2", "exit 137"):
        subprocess.run([*wrapper, "bash", "-c", status])
    sys.exit(137)
"""
    done, said, calls = launch(script, body=body, cwd=tmp_path, SLURM_JOB_ID="17")
    assert done == 2 and [call[0] for call in calls] == ["srun"], said


# A slice that is there from the second look on; the job ends with the next of STATUSES.
SLICE = """
state = os.path.join(os.environ["HOME"], "state")
there = os.path.exists(state)
job = any("exec .venv/bin/python" in argument for argument in sys.argv)
if "list" in sys.argv:
    asked = os.path.join(os.environ["HOME"], "asked")
    with open(asked, "a") as file: file.write(".")
    if os.path.getsize(asked) == 3: sys.exit(1)  # a failed call, of a slice that is there
    if there: print(open(state).read())
elif "create" in sys.argv:
    if there: sys.exit(1)
    open(state, "w").write("ACTIVE")
elif "delete" in sys.argv:
    os.remove(state)
elif job:
    ends = os.path.join(os.environ["HOME"], "ends")
    first, *rest = open(ends).read().split()
    open(ends, "w").write(" ".join(rest))
    if first == "255": open(state, "w").write("SUSPENDED")  # taken away
    sys.exit(int(first))
"""


@pytest.mark.parametrize(
    "ends, verbs",
    [
        ("0", ["create", "job"]),
        ("1", ["create", "job"]),
        ("2", ["create", "job"]),
        ("75 0", ["create", "job", "job"]),
        ("137 0", ["create", "job", "job"]),
        ("255 0", ["create", "job", "delete", "create", "job"]),
    ],
)
def test_a_tpu_slice_is_made_used_and_made_again(launch, tmp_path, ends, verbs):
    """Catches a job that stays dead after a preemption or a failed question, and a mistake that is
    run twenty times."""
    (tmp_path / "ends").write_text(ends)
    status, said, calls = launch(LAUNCH / "tpu_vm.sh", *JOB, body=SLICE, **SETTINGS["tpu_vm.sh"])
    assert status == int(ends.split()[-1]), said
    seen = []
    for _, arguments, _ in calls:
        assert "--zone=zone" in arguments and arguments[:2] == ["compute", "tpus"]
        if any("exec .venv/bin/python" in argument for argument in arguments):
            seen.append("job")
            assert "--worker=all" in arguments
            # What a worker's shell makes of it is the job again.
            command = next(a for a in arguments if a.startswith("--command=")).split("=", 1)[1]
            tail = command.split("dcae_jax.main ")[1]
            echoed = subprocess.run(
                ["bash", "-c", f"printf '%s\\n' {tail}"], capture_output=True, text=True
            ).stdout.splitlines()
            assert echoed == JOB
        elif arguments[3] in ("create", "delete"):
            seen.append(arguments[3])
    assert seen == verbs, said


def test_a_tpu_run_gives_up_after_its_restarts(launch, tmp_path):
    """Catches a job that dies at once and is started for ever."""
    (tmp_path / "ends").write_text("137 " * 9)
    settings = SETTINGS["tpu_vm.sh"] | {"RESTARTS": "2"}
    status, _, calls = launch(LAUNCH / "tpu_vm.sh", *JOB, body=SLICE, **settings)
    jobs = [c for c in calls if any("exec .venv/bin/python" in a for a in c[1])]
    assert status == 75 and len(jobs) == 3


def test_nothing_of_ours_stands_in_the_scripts():
    """Catches a path or project of whoever wrote them."""
    for path in LAUNCH.iterdir():
        for word in ("/home/", "/root", "/work", "/data", "gs://", "gcr.io", "pkg.dev"):
            text = path.read_text().replace("gs://BUCKET/", "")
            assert word not in text, (path.name, word)


def test_the_image_holds_what_the_job_needs():
    """Catches an image that installs into a folder without configs, or lacks the entry point."""
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    for source in copied:
        assert (ROOT / source).exists(), f"COPY {source}: there is no such file"
    assert {"dcae_jax", "configs", "pyproject.toml"} <= copied
    assert 'ENTRYPOINT ["python", "-m", "dcae_jax.main"]' in lines
    assert any('-e ".[${EXTRA}]"' in line for line in lines)
