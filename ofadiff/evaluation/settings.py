"""How an evaluation samples and measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofadiff.evaluation.metrics.clip_scorer import DEFAULT_CLIP
from ofadiff.evaluation.metrics.precision_recall import NEIGHBORHOOD
from ofadiff.reading.arguments import check_argument, check_dict, check_path, check_seed, check_whole
from ofadiff.recordings.folder import Recordings


@dataclass(frozen=True)
class EvaluationSettings:
    """How an evaluation samples and measures; every field is a keyword of `evaluate` too.

    Attributes:
        num_samples: Images sampled per size, if a metric looks at images.
        batch_size: Images per call of a pipeline.
        seed: Seed of the first image, see `generate`.
        num_inference_steps: Denoising steps.
        arguments: What the pipeline's call takes for each image, see `generate`; prompts are `{"prompt": [...]}`.
        call_arguments: What the call takes once, for all images, such as `{"guidance_scale": 7.5}`.
        calls: In place of `arguments`: calls of the pipeline as `ofadiff.record` takes them, used in turn, one image or
            video each; for pipelines of any class.
        variants: More rows of an `OFAPipeline` by their names, each sampled from the supernet itself: what its call
            takes beside all else, such as `{"fast": {"size": "fast"}, "guided": {"guidance_size": 0.4}}`. They have no
            costs: those are of one forward.
        recordings: Recordings of the original's denoiser: costs are measured on their first call, and answers compared.
            Without calls nothing is sampled of a pipeline that cannot do without arguments.
        extractor: Features for FID, KID, MIND, precision and recall: `"inception"`, `"dinov2"`, another of
            torch-fidelity's, or a registered one.
        fid_seeds: Sets of samples for FID, `num_samples` each, from seeds of their own: with several the report has the
            mean ± standard deviation of their FIDs, and sampling takes that many times as long. Set s = 0, 1, … begins
            at seed + s · num_samples and is asked for the same labels or prompts; other metrics look at set 0.
        prc_neighborhood: k of precision and recall: each needs k + 1 samples and reference images.
        clip_model: CLIP for the CLIP score of images and prompts: a folder or a hub repository, see `ClipScorer`.
        cost_batch_size: Images of the forward whose latency and memory are measured.
        num_shown: Images per size that the report shows.
        samples_dir: Folder to keep the images in. An evaluation that was cut off goes on from those that are there;
            images made in another way are refused. By default images are held in memory.
        overwrite_samples: Replace images that another evaluation left there.
        save_reference_statistics: A `.safetensors` to write the statistics of the reference images to.
        title: The report's.
        command: The command line that makes this report, if there is one.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If a number is below 1, or something of another type than it is here.
    """

    num_samples: int = 1000
    batch_size: int = 64
    seed: int = 0
    num_inference_steps: int = 50
    arguments: Mapping[str, Sequence[Any]] | None = None
    call_arguments: Mapping[str, Any] | None = None
    calls: Sequence[str | Mapping[str, Any]] | None = None
    variants: Mapping[str, Mapping[str, Any]] | None = None
    recordings: Recordings | None = None
    extractor: str = "inception"
    fid_seeds: int = 1
    prc_neighborhood: int = NEIGHBORHOOD
    clip_model: str | Path = DEFAULT_CLIP
    cost_batch_size: int = 1
    num_shown: int = 10
    samples_dir: str | Path | None = None
    overwrite_samples: bool = False
    save_reference_statistics: str | Path | None = None
    title: str = "One model, every size"
    command: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "num_inference_steps", "num_shown", "fid_seeds", "cost_batch_size"):
            check_whole(name, getattr(self, name), 1)
        check_whole("prc_neighborhood", self.prc_neighborhood, 1)
        check_seed("seed", self.seed)
        for name in ("arguments", "call_arguments", "variants"):
            check_dict(name, getattr(self, name))
        if self.calls is not None:
            check_argument("calls", self.calls, isinstance(self.calls, Sequence), "a list of calls, or None")
        known = self.recordings is None or isinstance(self.recordings, Recordings)
        check_argument("recordings", self.recordings, known, "Recordings, or None")
        check_argument("extractor", self.extractor, isinstance(self.extractor, str), "the name of a feature extractor")
        check_path("clip_model", self.clip_model)
        for name in ("samples_dir", "save_reference_statistics"):
            if getattr(self, name) is not None:
                check_path(name, getattr(self, name))
        said = self.command is None or isinstance(self.command, str)
        check_argument("command", self.command, said, "text, or None")
        check_argument("title", self.title, isinstance(self.title, str), "text")
