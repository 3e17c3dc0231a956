"""`ofadiff record`: how a pipeline calls its denoiser, kept for runs without data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from accelerate import PartialState
from cyclopts import Group, Parameter

from ofadiff.denoisers.original import read_any_original
from ofadiff.dtypes import DTYPES
from ofadiff.recordings.folder import Recordings
from ofadiff.runs.recorded import make_recordings
from ofadiff.runs.settings import Calls, Model
from ofadiff.storage.output import check_folder
from ofadiff.values import WHOLE, Bundle, one_of


@Parameter(name="*", group=Group.create_ordered("sampling"))
@dataclass(frozen=True, kw_only=True)
class Recorded(Bundle):
    """How the pipeline samples while it is recorded."""

    output_dir: str
    """folder of the recordings; the same command goes on with one that was killed"""
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    """of the pipeline"""
    seed: Annotated[int, WHOLE] = 0
    """of the noise, and of the steps that are kept"""


def record_calls(*, model: Model, calls: Calls = Calls(), recorded: Recorded) -> Recordings:
    """Record what a pipeline's denoiser is called with, and what it answers.

    `ofadiff compress`, `heal` and `evaluate` take the recordings with `--recordings_dir`. On several processes, which
    share the calls: `accelerate launch -m ofadiff record …`.

    Raises:
        ValueError: If a call cannot be made, before the first one is; or the folder holds something else.
    """
    if calls.calls_file is None:
        raise ValueError("give the pipeline's calls with --calls_file")
    if calls.recordings_dir is not None:
        raise ValueError("--recordings_dir is for runs that use recordings; say where to put these with --output_dir")
    check_folder("--output_dir", recorded.output_dir)
    where = model.revision, model.variant, model.cache_dir
    original = read_any_original(model.pretrained_model_name_or_path, calls.component, *where)
    state = PartialState()
    recordings = make_recordings(
        original,
        replace(calls, recordings_dir=recorded.output_dir),
        Path(recorded.output_dir),
        DTYPES[recorded.dtype],
        recorded.seed,
        state.device,
    )
    state.print(
        f"{recordings.folder} holds {len(recordings)} calls of the {original.component}, "
        f"{recordings.bytes / 1e6:.1f} MB, of {len(recordings.pipeline_calls)} calls of the pipeline"
    )
    return recordings
