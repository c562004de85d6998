# SPDX-License-Identifier: Apache-2.0
"""Reports the progress of a run from its workdir, without changing anything there.

    dcae-jax status runs/phase1      one run
    dcae-jax status runs/tiny        a chain of phases, or any folder of workdirs
    dcae-jax status runs/phase1 --plot=phase1.png

For training: step, latest metrics, last evaluation, checkpoints and their damage, speed, time left,
goodput, restarts. For `encode` and `sample`: what is written so far. For all: whether a job is
running there, and how to resume it.
"""

import os
import re
import sys
from typing import Any

from dcae_jax import files
from dcae_jax.checkpoints import integrity
from dcae_jax.checkpoints import manager as checkpoints
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.config.loading import PHASES
from dcae_jax.data import latents
from dcae_jax.errors import UserError
from dcae_jax.jobs import evaluate, goodput, plan, sample
from dcae_jax.runtime import lease, process

Lines = list[tuple[str, str]]  # (item, its status)
RESUME = "to resume"
STATE_NONE = ("state", "not started")
SCORE = re.compile(r"(psnr|ssim|lpips|rfid)_\d+")  # of an evaluation, by pixels per side
TIMES = ["step_s", "step_deviation_s", "input_wait_s"]
# Jobs that write nothing to the workdir before they are done: job -> result file.
RESULTS = {
    "evaluate": evaluate.RESULTS,
    "plan": plan.PLAN,
    "export": checkpoint_weights.EXPORT,
}


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status. Raises UserError for a folder without a run."""
    parser = process.parser("dcae-jax status", __doc__)
    parser.add_argument("workdir", help="workdir of a job, or a folder of several")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw a training run's curves")
    given = parser.parse_args(arguments)
    workdir = given.workdir.rstrip("/")
    if not files.is_url(workdir):
        workdir = os.path.normpath(os.path.expanduser(given.workdir))
    sys.stdout.write(report(workdir))
    if given.plot:
        plot(workdir, given.plot)
    return process.DONE


def report(workdir: str) -> str:
    """Blocks of lines, one per run in `workdir`. Raises UserError if there is none."""
    files.check(workdir, "workdir")
    if not files.isdir(workdir):
        raise UserError(f"{workdir!r} is not a folder; name the --workdir of a job")
    if found := describe(workdir):
        return _block(workdir, found)
    inside = {name: describe(os.path.join(workdir, name)) for name in files.listdir(workdir)}
    runs = {name: found for name, found in inside.items() if found}
    if not runs:
        raise UserError(f"{workdir!r} holds no run; name the --workdir of a job, or its parent")
    if not runs.keys().isdisjoint(PHASES):
        _join(workdir, runs)
    return "\n".join(_block(os.path.join(workdir, name), runs[name]) for name in sorted(runs))


def _join(workdir: str, runs: dict[str, Lines]) -> None:
    """Joins the phases in `runs` into one chain, resumed as a whole. Modifies `runs`."""
    for phase in PHASES:
        lines = [line for line in runs.get(phase, [STATE_NONE]) if line[0] != RESUME]
        runs[phase] = lines
    states = [runs[phase][-1][1] for phase in PHASES]
    if not any(state.startswith("running") for state in states) and set(states) != {"done"}:
        first = next(phase for phase in PHASES if runs[phase][-1][1] != "done")
        runs[first].append(_resume(workdir))


def _resume(workdir: str) -> tuple[str, str]:
    return RESUME, f"rerun the same command, with --workdir={workdir}"


def _block(title: str, lines: Lines) -> str:
    width = max(len(what) for what, _ in lines)
    return "\n".join([title, *(f"  {what:{width}}  {how}" for what, how in lines)]) + "\n"


def describe(workdir: str) -> Lines | None:
    """Status of the run in `workdir`; None if there never was one."""
    owner = lease.holder(workdir)
    found = [of_job(workdir) for of_job in (_training, _encoding, _sampling, _finished)]
    lines = [line for of_job in found if of_job for line in of_job[0]]
    if owner:
        lines = lines or [("job", "nothing is written yet")]
        return [*lines, ("state", f"running: {owner}")]
    if not lines:
        return None
    if all(of_job[1] for of_job in found if of_job):
        return [*lines, ("state", "done")]
    return [*lines, ("state", "stopped"), _resume(workdir)]


# --- (lines, whether it is done) of a job; None if `workdir` has no such job ----------------------


def _training(workdir: str) -> tuple[Lines, bool] | None:
    record = files.read_object(os.path.join(workdir, checkpoints.CONFIG)) or {}
    config = record.get("config")
    if not isinstance(config, dict):  # published weights
        return None
    rows, steps = files.read_rows(workdir), checkpoints.saved_steps(workdir)
    row = rows[-1] if rows else {"step": 0}
    saved, whole = _checkpoints(workdir, steps)
    values = [f"{k} {v:.4g}" for k, v in row.items() if k != "step" and v is not None]
    lines = [
        ("job", f"train: {_model(config)}"),
        ("step", f"{max(row['step'], *steps, 0)} of {config['steps']}"),
        ("latest metrics", f"step {row['step']}: {', '.join(values)}" if rows else "none"),
        *_evaluation(workdir, rows, config),
        ("checkpoint", saved),
        *_times(workdir, rows, max(0, config["steps"] - max(row["step"], *steps, 0))),
    ]
    return lines, whole >= config["steps"]


def _evaluation(workdir: str, rows: list[dict[str, Any]], config: dict[str, Any]) -> Lines:
    """The last evaluation: scores of an autoencoder, samples of a diffusion model."""
    if config["objective"]:
        names = [n for n in files.listdir(os.path.join(workdir, "images")) if "samples" in n]
        return [("evaluated", f"images/{name}") for name in names[-1:]]
    scores = {row["step"]: {k: v for k, v in row.items() if SCORE.fullmatch(k)} for row in rows}
    for step, values in reversed(scores.items()):
        if values:
            shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
            return [("evaluated", f"step {step}: {shown}")]
    return []


def _times(workdir: str, rows: list[dict[str, Any]], left: int) -> Lines:
    """Speed, time left, goodput and restarts. left: steps to go."""
    lines: Lines = []
    speeds = [row for row in rows if row.get("step_s")]
    known = goodput.read(workdir)
    found = goodput.goodput(known)
    if speeds:
        step_s = speeds[-1]["step_s"]
        speed = f"{step_s:.3g} s per step, {speeds[-1]['images_per_s']:.4g} images per s"
        lines.append(("speed", speed))
        if left:  # with evaluations and checkpoints, as often as before
            lines.append(("time left", goodput.duration(left * step_s * found.overhead)))
    if known:
        restarts = f"{found.restarts}, {goodput.duration(found.stopped_s)} between the processes"
        lines += [
            ("goodput", goodput.summary(known)),
            ("restarts", restarts if found.restarts else "none"),
            ("machine", goodput.machine(known[-1])),
        ]
    return lines


def plot(workdir: str, path: str) -> None:
    """Writes a PNG of a training run's loss, scores, speed and time. Raises UserError."""
    rows = files.read_rows(workdir)
    if not rows:
        raise UserError(f"{workdir!r} has no {files.METRICS} to plot; name the workdir of a run")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    names = sorted({name for row in rows for name in row if SCORE.fullmatch(name)})
    curves = {"loss": ["loss"], "evaluation": names, "seconds per step": TIMES}
    for axis, (title, keys) in zip(axes, curves.items(), strict=False):
        axis.set(title=title, xlabel="step")
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points, strict=True), label=key) if points else None
        axis.legend() if len(keys) > 1 else None
    found = goodput.goodput(goodput.read(workdir))
    parts = {goodput.NAMES.get(k, k): v for k, v in found.sections.items()}
    parts["lost to kills"] = found.lost_s
    axes[3].barh(list(parts), [seconds / 3600 for seconds in parts.values()])
    axes[3].set(title=f"goodput {100 * found.fraction:.1f} %", xlabel="hours")
    with files.atomic(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def _model(config: dict[str, Any]) -> str:
    model = config["model"]
    if config["objective"]:
        return f"{model['name']} {model['variant']}, objective {config['objective']}"
    sizes = sorted(set(config["resolutions"] or [config["resolution"]]))
    return f"autoencoder {model['variant']} at {', '.join(map(str, sizes))} pixels"


def _checkpoints(workdir: str, steps: list[int]) -> tuple[str, int]:
    """(newest checkpoints, down to the first intact one; its step, or -1 if there is none)."""
    said = []
    good = "complete" if files.is_url(workdir) else "intact"  # by its sizes; by its checksums
    for step in reversed(steps):
        folder = checkpoints.step_folder(workdir, step)
        wrong = integrity.damage(folder)
        if not wrong:
            return "; ".join([*said, f"step {step}, {good}"]), step
        if files.isdir(folder):  # else its run has just removed it
            said.append(f"step {step}, damaged ({wrong})")
    return "; ".join(said) or "none", -1


def _encoding(workdir: str) -> tuple[Lines, bool] | None:
    identity = files.read_object(os.path.join(workdir, latents.IDENTITY))
    if identity is None:
        return None
    name = re.compile(rf"latents-\d+-of-(\d+){re.escape(latents.EXTENSION)}")
    shards = [match[1] for file in files.listdir(workdir) if (match := name.fullmatch(file))]
    of_all = f"of {int(shards[0])}" if shards else "so far"
    lines = [
        ("job", f"encode: {identity['model.variant']} at {identity['resolution']} pixels"),
        ("shards", f"{len(shards)} {of_all}"),
    ]
    return lines, files.exists(os.path.join(workdir, latents.MANIFEST))


def _sampling(workdir: str) -> tuple[Lines, bool] | None:
    record = files.read_object(os.path.join(workdir, sample.SETTINGS))
    if record is None:
        return None
    count, form = record["sample"]["count"], record["sample"]["format"]
    result = os.path.join(workdir, sample.RESULTS[form])
    if files.exists(result):
        drawn = f"{count} of {count}, {result}"
    else:
        parts = files.listdir(os.path.join(workdir, sample.PARTS))
        ranges = [name.partition(".")[0].split("-") for name in parts if name.endswith(".npy")]
        images = files.listdir(os.path.join(workdir, sample.IMAGES))
        done = sum(int(end) - int(first) for first, end in ranges)
        drawn = f"{done + sum(name.endswith('.png') for name in images)} of {count}"
    return [("job", f"sample: from {record['source']}"), ("images", drawn)], files.exists(result)


def _finished(workdir: str) -> tuple[Lines, bool] | None:
    paths = {job: os.path.join(workdir, file) for job, file in RESULTS.items()}
    lines = [("job", f"{job}: {path}") for job, path in paths.items() if files.exists(path)]
    return (lines, True) if lines else None
