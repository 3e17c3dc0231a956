"""Quality at matched parameters: the library beside the paper as printed, one model per size, and other ways to shrink.

    python benchmarks/quality.py --output_dir quality --studies digits-unet --seeds 0 1 2 --joint_steps 800

compresses the same teacher with every method of `quality_methods.py`, and measures each size of each alike: excess of
the held-out loss over the teacher's, FID, KID, precision, recall, MIND, and PSNR with the teacher's images. A joint run
has `--joint_steps` for all its sizes. Methods with one model per size have as many for each of them, or, as
`alone_share`, as many as a joint run has for each on average.

Every training is kept in `<output_dir>/<study>/<method>-seed<seed>/` (a subfolder per size where each is a training of
its own), its measurements beside it in `result.json`, of `--judge tuning` in `result-tuning.json`. What is there is not
made again, so a run that was stopped goes on, and several processes can work on other seeds or methods in the same
folder once `--teacher_only` has made what they share. A teacher may also be put there by hand, as the pipeline folder
`<output_dir>/<study>/teacher`: it should not have seen the judging part, which is what the demo and `data_free.py` hold
out with seed 0. `--table_only` prints what there is. `results.json` and `results.png` are written by every process that
ends.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from diffusers.utils import logging
from quality_data import STUDIES, Place, prepare_place
from quality_measure import NAMES, Judge
from quality_methods import METHODS, Job, load_size

from ofadiff.commands.command import main, script
from ofadiff.values import COUNT, COUNT_OR_NONE, Bundle, one_of

PARTS = ("judging", "tuning")
TEACHER = "teacher"
OURS = "ofadiff"
DEFAULT_METHODS = (
    *("cut_paper", "cut_ofadiff", "paper", "ofadiff", "alone_share", "alone_share_distilled", "alone"),
    *("alone_distilled", "scratch", "torch_pruning", "blocks"),
)
# Whose mean excess over all sizes is divided by whose.
RATIOS = (("ofadiff", "paper"), ("ofadiff", "alone_share_distilled"), ("ofadiff", "alone_distilled"))
COLUMNS = {
    "excess": ("excess, 1e-4", 1),
    "fid": ("FID", 2),
    "kid": ("KID", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "mind": ("MIND", 2),
    "psnr": ("PSNR, dB", 1),
    "loss": ("loss", 5),
}
# What a logarithmic axis shows of an excess that is nothing.
LEAST_EXCESS = 0.1

# Measurements by study, method, size and name: a value for each seed.
Results = dict[str, dict[str, dict[float, dict[str, dict[int, float]]]]]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Comparison(Bundle):
    """What is compared, and how large."""

    output_dir: str = "quality"
    """folder to make or to go on with"""
    studies: Annotated[tuple[str, ...], one_of(STUDIES)] = tuple(STUDIES)
    """data sets with a model of each"""
    methods: Annotated[tuple[str, ...], one_of(METHODS)] = DEFAULT_METHODS
    """what is compared; see METHODS"""
    seeds: tuple[int, ...] = (0,)
    """of the compression; the teacher is the same for all"""
    joint_steps: Annotated[int, COUNT] = 800
    """steps of a joint run, and of each model of methods with one per size"""
    teacher_steps: Annotated[int | None, COUNT] = None
    """training steps of the original model; the study's own by default"""
    num_samples: Annotated[int, COUNT] = 1000
    """images sampled of each model"""
    noisy_images: Annotated[int, COUNT] = 2048
    """noisy images of the held-out loss"""
    judge: Annotated[str, one_of(PARTS)] = "judging"
    """images that models are measured on: judging, or tuning while a method is chosen"""
    teacher_only: bool = False
    """make images, teacher and features, and stop"""
    table_only: bool = False
    """train and measure nothing"""
    threads: Annotated[int, COUNT_OR_NONE] = 0
    """threads of PyTorch; 0 leaves it to it"""


def compare(*, comparison: Comparison = Comparison()) -> Results:
    """Compare compressed models of the same teacher at the same number of parameters.

    Raises:
        ImportError: If a method needs a package that is not installed.
        ValueError: If a folder holds a training of other steps.
    """
    logging.disable_progress_bar()
    if comparison.threads:
        torch.set_num_threads(comparison.threads)
    folder = Path(comparison.output_dir)
    for name in () if comparison.table_only else comparison.studies:
        study = STUDIES[name]
        place = Place(study, folder / name, {"teacher_steps": comparison.teacher_steps or study.teacher_steps})
        place.folder.mkdir(parents=True, exist_ok=True)
        prepare_place(place)
        if not comparison.teacher_only:
            work(place, comparison)
    results = collect(folder, comparison)
    if results:
        print("\n" + tables(results))
        write(folder / "results.json", results)
        draw(results, folder / "results.png")
    return results


# Work.


def jobs(place: Place, comparison: Comparison) -> Iterator[Job]:
    """All trainings of a study, seed by seed."""
    for seed in comparison.seeds:
        for method in comparison.methods:
            folder = place.folder / f"{method}-seed{seed}"
            sizes = place.study.sizes
            if not METHODS[method].each_size:
                yield Job(place, method, seed, sizes, comparison.joint_steps, folder)
                continue
            for size in sizes:
                yield Job(place, method, seed, (size,), comparison.joint_steps, folder / f"{size:g}")


def work(place: Place, comparison: Comparison) -> None:
    """Trains and measures what is missing of a study."""
    judge = Judge(place, comparison.judge, comparison.num_samples, comparison.noisy_images)
    teacher_file = place.folder / f"{TEACHER}_{result_name(comparison.judge)}"
    if read(teacher_file).get("settings") != judge.settings():
        values = {"1": judge.measure(judge.teacher)}
        write(teacher_file, {"settings": judge.settings(), "sizes": values})
    for job in jobs(place, comparison):
        train(job)
        measure(job, judge)


def train(job: Job) -> None:
    """Trains what a job has to, unless that was done."""
    done, asked = job.folder / "trained.json", {"steps": job.steps, "sizes": list(job.sizes), "seed": job.seed}
    if done.exists():
        trained = {name: read(done)[name] for name in asked}
        if trained != asked:
            raise ValueError(
                f"{job.folder} holds a training of {trained}, and {asked} is asked for; choose another --output_dir"
            )
        return
    # What was cut off is made anew.
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    print(f"\n{job.folder}: {job.steps} steps", flush=True)
    started = time.perf_counter()
    more = METHODS[job.method].train(job)
    write(done, {**asked, "seconds": round(time.perf_counter() - started, 1), **more})


def measure(job: Job, judge: Judge) -> None:
    """Measures what a job has trained, unless that was done with the same settings."""
    file = job.folder / result_name(judge.part)
    if read(file).get("settings") == judge.settings():
        return
    values = {f"{size:g}": judge.measure(load_size(job, size, judge.teacher)) for size in job.sizes}
    of = {"method": job.method, "seed": job.seed, "settings": judge.settings()}
    write(file, {**of, "trained": read(job.folder / "trained.json"), "sizes": values})
    for size, row in values.items():
        worth = f"excess {row['excess']:.1f}, FID {row['fid']:.2f}"
        print(f"{job.method}, seed {job.seed}, size {size}: {worth}", flush=True)


def result_name(part: str) -> str:
    """What the file of measurements on a part is called."""
    return "result.json" if part == "judging" else f"result-{part}.json"


def read(file: Path) -> dict[str, Any]:
    """A JSON file; nothing where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(file: Path, values: Mapping[str, Any]) -> None:
    """A JSON file that is there as a whole or not at all."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


# What came out.


def collect(folder: Path, comparison: Comparison) -> Results:
    """All measurements of the studies that are there, whichever process made them."""
    results: Results = {}
    name = result_name(comparison.judge)
    for study in comparison.studies:
        found: dict[str, dict[float, dict[str, dict[int, float]]]] = {}
        teacher = read(folder / study / f"{TEACHER}_{name}")
        files = sorted((folder / study).glob(f"*-seed*/**/{name}"))
        for values in [{"method": TEACHER, "seed": 0, **teacher}, *map(read, files)] if teacher else []:
            # Measured in another way: FID depends on the number of samples.
            if values["settings"] != teacher["settings"]:
                continue
            sizes = found.setdefault(values["method"], {})
            for size, row in values["sizes"].items():
                kept = sizes.setdefault(float(size), defaultdict(dict))
                for metric, value in row.items():
                    if value is not None:
                        kept[metric][values["seed"]] = value
        if found:
            order = [TEACHER, *METHODS]
            results[study] = {method: found[method] for method in sorted(found, key=order.index)}
    return results


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def tables(results: Results) -> str:
    """Markdown: of every study a table for each measurement, a row per method, a column per size, and the ratios."""
    lines = []
    for study, methods in results.items():
        sizes = sorted({size for rows in methods.values() for size in rows})
        lines += [f"## {study}", ""]
        for metric, (label, digits) in {"share": ("parameters", 4), **COLUMNS}.items():
            if not any(metric in row for rows in methods.values() for row in rows.values()):
                continue
            header = [label, *(f"{size:g}" for size in sizes), "mean"]
            lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
            for method, rows in methods.items():
                values = [[*rows.get(size, {}).get(metric, {}).values()] for size in sizes]
                cells = [mean_and_spread(each, digits) for each in values]
                means = [*mean_over_sizes(rows, metric, sizes).values()] if method != TEACHER else []
                lines.append(f"| {' | '.join([method, *cells, mean_and_spread(means, digits)])} |")
            lines.append("")
        lines += ratio_lines(methods, sizes)
    return "\n".join(lines)


def mean_over_sizes(
    rows: Mapping[float, Mapping[str, Mapping[int, float]]], metric: str, sizes: Sequence[float]
) -> dict[int, float]:
    """Mean over all sizes, of every seed that has all of them."""
    by_size = [rows.get(size, {}).get(metric, {}) for size in sizes]
    seeds = set.intersection(*(set(each) for each in by_size))
    return {seed: statistics.fmean(each[seed] for each in by_size) for seed in sorted(seeds)}


def ratio_lines(methods: Mapping[str, Any], sizes: Sequence[float]) -> list[str]:
    """Ratios of mean excess, of those pairs of methods that are there."""
    lines = []
    for ours, theirs in RATIOS:
        if ours in methods and theirs in methods:
            pair = [mean_over_sizes(methods[name], "excess", sizes) for name in (ours, theirs)]
            seeds = sorted(set(pair[0]) & set(pair[1]))
            if seeds:
                means = [statistics.fmean(each[seed] for seed in seeds) for each in pair]
                each_seed = ", ".join(f"{pair[0][seed] / pair[1][seed]:.2f}" for seed in seeds)
                lines.append(f"- mean excess, {ours} over {theirs}: {means[0] / means[1]:.2f} (by seed: {each_seed})")
    return [*lines, ""]


def draw(results: Results, file: Path) -> None:
    """Excess and FID over parameters, a panel per study, a line per method, seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {"excess": f"excess of the held-out loss, 1e-4 ({LEAST_EXCESS:g} stands for less)", "fid": "FID"}
    figure, axes = pyplot.subplots(
        len(shown), len(results), figsize=(6.5 * len(results), 10), squeeze=False, layout="constrained"
    )
    names = [name for name in METHODS if any(name in methods for methods in results.values())]
    colormap = pyplot.colormaps["tab10" if len(names) <= 10 else "tab20"]
    colours = {name: colormap(index % 20) for index, name in enumerate(names)}
    for column, (study, methods) in enumerate(results.items()):
        for row, (metric, label) in enumerate(shown.items()):
            axis = axes[row, column]
            for method, rows in methods.items():
                if method == TEACHER:
                    if metric == "fid":
                        axis.axhline(statistics.fmean(rows[1.0][metric].values()), color="black", ls=":", label=TEACHER)
                    continue
                draw_line(axis, rows, metric, colours[method], method)
            low, high = axis.get_ylim()
            log = low <= 0 or high > 5 * low
            axis.set(xlabel="parameters, share of the teacher's", ylabel=label, yscale="log" if log else "linear")
            axis.set_title(study if row == 0 else "")
            axis.grid(alpha=0.3, which="both")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles.update({label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)})
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    unfinished = file.with_suffix(".tmp")
    figure.savefig(unfinished, dpi=130, format="png")
    unfinished.replace(file)
    pyplot.close(figure)


def draw_line(axis: Any, rows: Mapping[float, Mapping[str, Mapping[int, float]]], metric: str, colour: Any, name: str):
    """One method: mean over seeds, and a band from the smallest to the largest."""
    points = []
    for _, row in sorted(rows.items()):
        values = [max(value, LEAST_EXCESS) for value in row[metric].values() if math.isfinite(value)]
        if values:
            share = statistics.fmean(row["share"].values())
            points.append((share, statistics.fmean(values), min(values), max(values)))
    if not points:
        return
    # Whole blocks have sizes of their own.
    shares, means, lows, highs = zip(*sorted(points), strict=True)
    axis.plot(shares, means, marker="o", markersize=4, color=colour, label=name, linewidth=3 if name == OURS else 1.5)
    axis.fill_between(shares, lows, highs, color=colour, alpha=0.2)


assert set(COLUMNS) >= set(NAMES)

if __name__ == "__main__":
    main(script(compare, __file__))
