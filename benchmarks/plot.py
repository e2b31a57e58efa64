"""Learning curves as PNG, over the authors' published ones where the task is the same.

    pip install matplotlib
    python benchmarks/plot.py run RUN_DIR OUT_FOLDER --title Boxing --task boxing
    python benchmarks/plot.py results control benchmarks/results/control/control.png
    python benchmarks/plot.py results boxing OUT.png --also FOLDER/curve.json

`run` draws one run directory and keeps its curve as JSON. `results` draws what learning.py has kept
of a set of tasks: every seed is a line, the published seeds are pale lines of the same colour.
"""

import csv
import json
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from learning import COMMANDS, PUBLISHED, SETS, published
from speed import HERE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curve = list[tuple[float, float]]  # of (frames, return of an episode)
FEW = 60  # episodes of a run: each of so few is drawn as a point, more are averaged to so many
COLOURS = {"dreamer_v1": "tab:green", "dreamer_v2": "tab:orange", "dreamer_v3": "tab:blue",
           "dreamer_v3_2025": "tab:purple"}
STYLES = ("-", "--", ":", "-.")  # of the seeds


def draw_published(axes: plt.Axes, script: str, task: str) -> None:
    """Each seed as a pale line."""
    for number, curve in enumerate(published(script, task)):
        axes.plot(*zip(*curve), color=COLOURS[script], alpha=0.3, linewidth=1, zorder=1,
                  label=f"published, {script.replace('_2025', '')}" * (number == 0) or None)


def draw(axes: plt.Axes, curve: Curve, label: str, seed: int, colour: str) -> None:
    """One run."""
    style, points = STYLES[(seed - 1) % len(STYLES)], thin_out(curve)
    marker = "o" if len(curve) <= FEW / 5 else ""
    axes.plot(*zip(*points), linestyle=style, marker=marker, markersize=3, linewidth=1.2,
              color=colour, label=label or None)


def thin_out(curve: Curve) -> Curve:
    """The curve, or, of more than FEW episodes, means over equal numbers of frames."""
    if len(curve) <= FEW:
        return curve
    frames, returns = np.array(curve).T
    edges = np.linspace(0, frames[-1], FEW + 1)
    parts = np.searchsorted(edges, frames, side="left")
    return [(edges[part], returns[parts == part].mean()) for part in np.unique(parts)]


def kept_curve(path: Path) -> Curve:
    """Frames and returns of a run of learning.py."""
    with open(path) as file:
        return [(int(row["frames"]), float(row["return"])) for row in csv.DictReader(file)]


def results(name: str, out: Path, /, also: tuple[Path, ...] = ()) -> None:
    """Draw what learning.py has kept of a set of tasks, and in each of them what `run` has kept."""
    folder = HERE / "results" / name
    tasks = [task for task in SETS[name] if [*folder.glob(f"dreamer_*_{task}_?.csv")]]
    figure, grid = plt.subplots(1, len(tasks), figsize=(max(5, 3 * len(tasks)), 2.8), squeeze=False)
    for axes, task in zip(grid[0], tasks):
        last, shown = 0, set()
        for script in COMMANDS:
            paths = sorted(folder.glob(f"{script}_{task}_?.csv"))
            for path in paths:
                curve, seed = kept_curve(path), int(path.stem[-1])
                if curve:
                    names = ", ".join(each.stem[-1] for each in paths)
                    label = f"{script}, seed{'s' * (len(paths) > 1)} {names}"
                    draw(axes, curve, label * (path == paths[0]), seed, COLOURS[script])
                    last = max(last, curve[-1][0])
            if paths and PUBLISHED[script] not in shown:
                draw_published(axes, script, task)
                shown.add(PUBLISHED[script])
        for path in also:
            kept = json.loads(path.read_text())
            curve, seed = kept["frames_and_returns"], kept["args"]["seed"]
            draw(axes, curve, f"seed {seed}, in {path.parent.name}/", seed, "tab:red")
            last = max(last, curve[-1][0])
        axes.set(title=task.removeprefix("control_").replace("_", " "), xlabel="frames")
        axes.xaxis.set_major_locator(plt.MaxNLocator(4))
        if any(published(script, task) for script in COMMANDS):
            axes.set_xlim(0, 2 * last)
        axes.legend(fontsize=6)
    grid[0][0].set_ylabel("return while training")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def run(run_dir: Path, out: Path, /, title: str = "", task: str = "") -> None:
    """Draw one run directory, over the published curves of `task`; write curve.json, curve.png."""
    stored = json.loads((run_dir / "args.json").read_text())
    settings, script = stored["args"], stored.get("script", "dreamer_v3")
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    points = [(event.step * settings["action_repeat"], event.value)
              for event in events.Scalars("charts/episodic_return")]
    out.mkdir(parents=True, exist_ok=True)
    (out / "curve.json").write_text(json.dumps(
        {"frames_and_returns": points,
         "args": {name: value for name, value in settings.items() if name != "runs_dir"}},
        indent=1) + "\n")
    axes = plt.figure(figsize=(6, 3.5)).add_subplot()
    draw_published(axes, script, task)
    draw(axes, points, "this run", settings["seed"], "black")
    axes.set(title=title, xlabel="frames", ylabel="return of a training episode",
             xlim=(0, 3 * points[-1][0]))
    axes.legend()
    axes.figure.tight_layout()
    axes.figure.savefig(out / "curve.png", dpi=110)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "results": results}, description=__doc__)
