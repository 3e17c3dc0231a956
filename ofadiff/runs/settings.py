"""What a training run is asked for: flags, lines of a YAML file or arguments, in bundles.

The names are those of diffusers' training examples where these have one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from cyclopts import Group, Parameter

from ofadiff.allocation import BUDGETS
from ofadiff.denoisers.kind import CALLS, CAPTIONS, CLASSES, CONDITIONS, DenoiserKind
from ofadiff.dtypes import PRECISIONS
from ofadiff.importance import CRITERIA
from ofadiff.options import check_options
from ofadiff.reweight import STRATEGIES
from ofadiff.values import (
    AT_LEAST_ZERO,
    BELOW_ONE,
    COUNT,
    COUNT_OR_NONE,
    POSITIVE,
    SHARE,
    SIZES,
    WHOLE,
    Bundle,
    SizeOrName,
    one_of,
)

OPTIMIZERS = ("muon", "adamw")
# How the size of a step is chosen where nothing was asked for, and a run does not go on from another's checkpoint.
STRATEGY = "spread"
CONSTANT = "constant_with_warmup"
LR_SCHEDULERS = ("linear", "cosine", CONSTANT)

# What holds where nothing else is asked for, and the kind of denoiser has no default of its own.
DEFAULTS: Mapping[str, Any] = {
    "validation_fraction": 0.1,
    "max_train_steps": 10_000,
    "learning_rate": 1e-4,
    "lr_warmup_steps": 100,
    "tracker_project_name": "ofadiff",
    "validation_inference_steps": 50,
    "criterion": "taylor",
    "num_validation_images": 8,
}


@Parameter(name="*", group=Group.create_ordered("model"))
@dataclass(frozen=True, kw_only=True)
class Model(Bundle):
    """The pretrained pipeline."""

    pretrained_model_name_or_path: str
    """pipeline of the original model, or the checkpoint whose size is healed: a folder or a hub name"""
    revision: str | None = None
    """of the model on the hub"""
    variant: str | None = None
    """of the model's weight files, such as fp16"""
    cache_dir: str | None = None
    """where what comes from the hub is kept"""


@Parameter(name="*", group=Group.create_ordered("data"))
@dataclass(frozen=True, kw_only=True)
class Data(Bundle):
    """The images."""

    train_data_dir: str | None = None
    """folder of images: with a subfolder per class for class-conditional models; for text-to-image models with a
    metadata.jsonl (file_name, text), of parquet files, or of .tar shards"""
    dataset_name: str | None = None
    """a `datasets` data set: a hub name, or a folder made by save_to_disk"""
    dataset_config_name: str | None = None
    """configuration of the data set"""
    dataset_split: str = "train"
    """split of the data set"""
    image_column: str = "image"
    """its column of images"""
    resolution: Annotated[int | None, COUNT] = None
    """side of the images in pixels; 512 for text-to-image models, the model's own for others"""
    random_flip: bool = False
    """mirror half of the training images"""
    validation_fraction: float | None = None
    """share of the images held out for validation; 0.1, for text-to-image models 0.02"""
    dataloader_num_workers: Annotated[int, COUNT_OR_NONE] = 0
    """processes that load images"""


@Parameter(name="*", group=Group.create_ordered("classes"))
@dataclass(frozen=True, kw_only=True)
class Classes(Bundle):
    """What only models have that are conditioned on classes."""

    label_column: str = "label"
    """column of integer classes in the data set"""
    class_dropout_prob: Annotated[float, SHARE] = 0.1
    """share of labels left out for guidance, of models that know the class of nothing (DiT)"""


@Parameter(name="*", group=Group.create_ordered("captions"))
@dataclass(frozen=True, kw_only=True)
class Captions(Bundle):
    """What only text-to-image models have."""

    dataset_data_files: tuple[str, ...] | None = None
    """files of the data set: paths, addresses, patterns, numbered ones such as shards/{000..099}.tar with
    --dataset_name webdataset"""
    caption_column: str = "text"
    """column of captions: strings, or lists to pick one from; or json.text"""
    streaming: bool = False
    """read the data set while training; its first --validation_samples images are held out, unless
    --validation_fraction is 0"""
    shuffle_buffer_size: Annotated[int, COUNT] = 1000
    """images of a stream that are shuffled, in memory"""
    max_unreadable_fraction: Annotated[float, SHARE] = 0.1
    """share of a stream's samples that may be unreadable; with more the run stops"""
    center_crop: bool = False
    """crop the middle of each image; by default a random square"""
    cache_dir_latents: str | None = None
    """encode images and captions once and keep them in this folder"""
    proportion_empty_prompts: float = 0.1
    """share of captions left out, for guidance"""


@Parameter(name="*", group=Group.create_ordered("calls"))
@dataclass(frozen=True, kw_only=True)
class Calls(Bundle):
    """The pipeline's own calls in place of images: its denoiser learns from what the original answered in them."""

    calls_file: str | None = None
    """calls of the pipeline: prompts, one a line (.txt), or the arguments of its own call (.jsonl, .json, .csv); images
    by their paths, from the file's folder on
    """
    recordings_dir: str | None = None
    """folder of the recordings of these calls, made or continued; without --calls_file one that is there. The output
    folder's name with -recordings by default; with -full-size-recordings where a checkpoint heals itself"""
    call_arguments: tuple[str, ...] | None = None
    """arguments of all calls that do not have their own: NAME=VALUE, such as num_inference_steps=20 height=512"""
    steps_per_call: Annotated[int, COUNT] = 4
    """denoising steps recorded of each call"""
    max_recordings_gb: Annotated[float | None, POSITIVE] = None
    """stop recording before it takes more gigabytes on disk; no limit by default"""
    component: str | None = None
    """what the pipeline calls the denoiser that is compressed; needed where it has several"""

    @property
    def given(self) -> bool:
        """Whether there are calls in place of images."""
        return self.calls_file is not None or self.recordings_dir is not None


@Parameter(name="*", group=Group.create_ordered("compression"))
@dataclass(frozen=True, kw_only=True)
class Compression(Bundle):
    """The sizes, and how they are found and trained."""

    sizes: Annotated[tuple[float, ...], SIZES] = (0.4, 0.6, 0.8, 1.0)
    """fractions of the full model"""
    budget: Annotated[str, one_of(BUDGETS)] = "params"
    """what a size is a fraction of: params, macs, latency, or channels"""
    min_keep: float = 0.25
    """smallest share of its channels that a layer keeps; 0 drops what would keep under a quarter"""
    criterion: Annotated[str | None, one_of(CRITERIA)] = None
    """how channels are ranked: taylor (by the loss, the default), sensitivity (by what they do to the output, the
    default for recordings), magnitude or random
    """
    importance_samples: Annotated[int, COUNT] = 1024
    """noisy images that the ranking looks at"""
    importance_batch_size: Annotated[int | None, COUNT] = None
    """of them per device and forward; --train_batch_size by default"""
    importance_loss_threshold: Annotated[float | None, BELOW_ONE] = None
    """of the criterion taylor: leave out images whose loss is under this share of the largest; 0 by default"""
    rotate: Annotated[bool, Parameter(negative="--no-rotate")] = True
    """turn attention heads into the basis of their singular vectors before ranking"""
    correction_samples: Annotated[int, COUNT_OR_NONE] = 384
    """noisy images on which the sizes are fitted to the original in closed form before they are trained; 0 for none"""
    correction_rank: Annotated[int | None, COUNT_OR_NONE] = None
    """rank of a LoRA that each size gets for what it needs beyond the weights that all share, where nothing is trained
    (--max_train_steps 0), 8 by default there; 0 for none
    """
    correction_ridge: Annotated[float | None, POSITIVE] = None
    """pull of that fit towards the weights as they are; by default the one that serves best a quarter of the samples,
    left out of it
    """
    reweight: Annotated[str | None, one_of(STRATEGIES)] = None
    """which size each step trains: spread (weights of equation 6, evenly over the steps; the default), linear (drawn at
    random with these weights), uniform or sandwich"""
    reweight_m: Annotated[float | None, POSITIVE] = None
    """of spread and linear: how many times more often the smallest size is trained than the largest; 3 if not given"""

    def criterion_options(self) -> dict[str, float]:
        """Options of the criterion that were asked for. Raises ValueError if it does not take them."""
        threshold, criterion = self.importance_loss_threshold, self.criterion or DEFAULTS["criterion"]
        options = {} if threshold is None else {"loss_threshold": threshold}
        check_options(f"--criterion {criterion}", CRITERIA[criterion], options)
        return options

    def strategy_options(self) -> dict[str, float]:
        """Options of the strategy that were asked for. Raises ValueError if it does not take them."""
        options = {} if self.reweight_m is None else {"m": self.reweight_m}
        strategy = self.reweight or STRATEGY
        check_options(f"--reweight {strategy}", STRATEGIES[strategy], options)
        return options


@Parameter(name="*", group=Group.create_ordered("one size"))
@dataclass(frozen=True, kw_only=True)
class OneSize(Bundle):
    """Which size is healed, and what of it is trained."""

    size: Annotated[SizeOrName, SIZES]
    """one of the checkpoint's sizes, or smallest, largest"""
    lora_rank: Annotated[int | None, COUNT] = None
    """train a LoRA of this rank; by default all weights of the extracted subnet"""
    lora_alpha: Annotated[float | None, POSITIVE] = None
    """its scale times its rank; --lora_rank by default"""
    lora_target_modules: tuple[str, ...] | None = None
    """ends of the names of the layers that get it; by default every linear map and convolution that sizes cut, which
    is where they differ from the full model"""
    teacher_model_name_or_path: str | None = None
    """pipeline whose denoiser teaches; by default the checkpoint at full size, which cannot teach itself"""


@Parameter(name="*", group=Group.create_ordered("losses"))
@dataclass(frozen=True, kw_only=True)
class Losses(Bundle):
    """What is minimised."""

    distill_weight: Annotated[float | None, AT_LEAST_ZERO] = None
    """weight of the distance to the teacher's prediction; 4, for one size 1"""
    feature_distill_weight: Annotated[float, AT_LEAST_ZERO] = 0.0
    """weight of the distance to its block outputs"""
    snr_gamma: Annotated[float | None, POSITIVE] = None
    """min-SNR weighting of timesteps with this gamma, such as 5; none by default; for DDPM-style schedulers"""
    noise_offset: Annotated[float, AT_LEAST_ZERO] = 0.0
    """size of a random shift of each channel's noise, such as 0.05; for DDPM-style schedulers"""
    stratify_timesteps: Annotated[bool | None, Parameter(negative="--no-stratify_timesteps")] = None
    """spread the noise levels of a step's images evenly, in place of independent draws; yes by default"""


@Parameter(name="*", group=Group.create_ordered("training"))
@dataclass(frozen=True, kw_only=True)
class Optimization(Bundle):
    """Steps, precision and optimizer."""

    max_train_steps: Annotated[int | None, COUNT_OR_NONE] = None
    """optimizer steps; 0 only cuts; 10,000, for text-to-image models 50,000, for one size 20,000"""
    train_batch_size: Annotated[int, COUNT] = 16
    """images per device and forward"""
    gradient_accumulation_steps: Annotated[int, COUNT] = 1
    """forwards per optimizer step"""
    gradient_checkpointing: bool = False
    """save memory: compute activations twice"""
    mixed_precision: Annotated[str | None, one_of(PRECISIONS)] = None
    """of forwards: no, fp16 or bf16; accelerate's configuration by default"""
    allow_tf32: bool = False
    """faster float32 products on Ampere GPUs and later"""
    learning_rate: Annotated[float | None, POSITIVE] = None
    """of Muon and AdamW alike, after warm-up; 1e-4, for text-to-image models 5e-5; for one size 1e-4 for a LoRA, whose
    few weights begin without effect, and 2e-5 for a whole subnet, which joint training has left close to where it shall
    go"""
    lr_scheduler: Annotated[str | None, one_of(LR_SCHEDULERS)] = None
    """learning rate over time: linear (to zero), cosine or constant_with_warmup; linear, for one size cosine"""
    lr_warmup_steps: Annotated[int | None, COUNT_OR_NONE] = None
    """steps over which the learning rate rises; 100, for text-to-image models 500"""
    optimizer: Annotated[str | None, one_of(OPTIMIZERS)] = None
    """muon (orthogonal steps for the matrices of blocks, AdamW's for all else) or adamw. By default muon where all
    sizes are trained jointly, but for FSDP, which splits matrices, and --use_8bit_adam; one size is healed with adamw
    """
    muon_momentum: Annotated[float, BELOW_ONE] = 0.9
    """of Muon"""
    use_8bit_adam: bool = False
    """keep AdamW's moments in 8 bits; needs bitsandbytes"""
    adam_beta1: Annotated[float, BELOW_ONE] = 0.9
    """of AdamW"""
    adam_beta2: Annotated[float, BELOW_ONE] = 0.999
    """of AdamW"""
    adam_weight_decay: Annotated[float, AT_LEAST_ZERO] = 0.0
    """of AdamW; decays channels on steps that do not use them"""
    adam_epsilon: Annotated[float, POSITIVE] = 1e-8
    """of AdamW"""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """gradients are clipped to this norm"""
    max_skipped_steps: Annotated[int, COUNT] = 10
    """a step whose loss or gradient is not finite is skipped; so many of them in a row stop the run"""
    ema_decay: Annotated[float | None, BELOW_ONE] = None
    """largest decay of the average of the weights; by default the average reaches over the last twentieth of the steps,
    with a constant learning rate 0.9999"""
    offload_ema: bool = False
    """keep that average in main memory; slower"""
    seed: Annotated[int, WHOLE] = 0
    """of sizes, images and noise"""


@Parameter(name="*", group=Group.create_ordered("watching and resuming"))
@dataclass(frozen=True, kw_only=True)
class Watching(Bundle):
    """Validations, trackers and checkpoints."""

    validation_steps: Annotated[int, COUNT] = 1000
    """steps between validations"""
    validation_samples: Annotated[int, COUNT] = 512
    """noisy images of a validation"""
    num_validation_images: Annotated[int | None, COUNT_OR_NONE] = None
    """images drawn per size at each validation, 8 by default; text-to-image models draw --validation_prompts"""
    validation_prompts: tuple[str, ...] | None = None
    """prompts drawn at every size at each validation, for text-to-image models; none by default"""
    validation_inference_steps: Annotated[int | None, Parameter(alias="--ddpm_num_inference_steps"), COUNT] = None
    """denoising steps of these images; 50, for text-to-image models 25"""
    guidance_scale: Annotated[float | None, AT_LEAST_ZERO] = None
    """of these images; the pipeline's own by default, 1 for models of classes (DiTPipeline guides models of 1000)"""
    checkpointing_steps: Annotated[int, COUNT] = 1000
    """steps between checkpoints"""
    checkpoints_total_limit: Annotated[int | None, COUNT] = None
    """how many checkpoints are kept; all by default"""
    resume_from_checkpoint: str | None = None
    """a checkpoint folder, its name in the output folder, or 'latest': the newest there, if any; what is trained must
    be asked for as before"""
    report_to: str = "none"
    """tracker: tensorboard, wandb, … or none"""
    logging_dir: str = "logs"
    """the tracker's folder, inside the output folder"""
    tracker_project_name: str | None = None
    """the tracker's project; ofadiff-ddpm, ofadiff-dit, ofadiff-sd or ofadiff-finetune"""


@Parameter(name="*", group=Group.create_ordered("output"))
@dataclass(frozen=True, kw_only=True)
class Output(Bundle):
    """What is made."""

    output_dir: str
    """pipeline folder to make; must be new or empty. Healing a size with a LoRA: the checkpoint itself, which gets the
    adapter, or a copy to make"""
    overwrite_output_dir: Annotated[bool, Parameter(alias="--overwrite")] = False
    """replace the result of an earlier run and its checkpoints, or the adapter of the size"""
    push_to_hub: bool = False
    """upload the result to the hub, without checkpoints"""
    hub_model_id: str | None = None
    """name of the repository; the output folder's by default"""


# Bundles that only denoisers with one condition have, and single flags of others.
ONLY_FOR = {"captions": CAPTIONS, "classes": CLASSES, "calls": CALLS}
FLAGS_ONLY_FOR = {"validation_prompts": CAPTIONS, "num_validation_images": CLASSES}

# What has no meaning for images that are mixed into recordings: nothing is drawn, no teacher is there.
NOT_FOR_MIXED = (
    *("distill_weight", "guidance_scale", "validation_inference_steps", "validation_prompts", "num_validation_images"),
    *("importance_loss_threshold", "streaming"),
)

# What has no meaning for recordings, where noise, timesteps and answers are what they were.
NOT_FOR_CALLS = (
    *("train_data_dir", "dataset_name", "dataset_config_name", "dataset_split", "image_column", "resolution"),
    *("random_flip", "distill_weight", "snr_gamma", "noise_offset", "guidance_scale", "validation_inference_steps"),
    *("stratify_timesteps", "importance_loss_threshold"),
)


@dataclass(frozen=True)
class RunSettings:
    """All that one run is asked for. `compression` makes a supernet, `one_size` heals one of its sizes."""

    model: Model
    data: Data
    output: Output
    captions: Captions = field(default_factory=Captions)
    classes: Classes = field(default_factory=Classes)
    calls: Calls = field(default_factory=Calls)
    compression: Compression = field(default_factory=Compression)
    losses: Losses = field(default_factory=Losses)
    optimization: Optimization = field(default_factory=Optimization)
    watching: Watching = field(default_factory=Watching)
    one_size: OneSize | None = None

    def flags(self) -> dict[str, Any]:
        """All values by the name of their flag, as JSON keeps them."""
        bundles = [getattr(self, each.name) for each in dataclasses.fields(self)]
        values = [dataclasses.asdict(bundle) for bundle in bundles if bundle is not None]
        merged = {name: value for bundle in values for name, value in bundle.items()}
        return json.loads(json.dumps(merged, default=str))

    def with_defaults(self, defaults: Mapping[str, Any]) -> RunSettings:
        """The same with values where nothing was asked for."""
        changed = {}
        for each in dataclasses.fields(self):
            bundle = getattr(self, each.name)
            names = [] if bundle is None else [own.name for own in dataclasses.fields(bundle)]
            chosen = {name: defaults[name] for name in names if name in defaults and getattr(bundle, name) is None}
            if chosen:
                changed[each.name] = dataclasses.replace(bundle, **chosen)
        return dataclasses.replace(self, **changed)

    def check_condition(self, kind: DenoiserKind, name: str, images: DenoiserKind | None = None) -> None:
        """Raises ValueError for a flag that was given and that this kind of denoiser has not.

        Args:
            kind: Kind of the denoiser.
            name: Name of the model, for the error.
            images: The kind that it is where images are mixed into recordings.
        """
        conditions = (None, kind.condition, images.condition if images is not None else None)
        for each in dataclasses.fields(self):
            bundle = getattr(self, each.name)
            for own in () if bundle is None else dataclasses.fields(bundle):
                condition = FLAGS_ONLY_FOR.get(own.name, ONLY_FOR.get(each.name))
                if getattr(bundle, own.name) == own.default:
                    continue
                if images is not None and own.name in NOT_FOR_MIXED:
                    raise ValueError(f"--{own.name} is not for runs that mix images into recordings")
                if condition not in conditions:
                    raise ValueError(f"--{own.name} is for {CONDITIONS[condition]} only; {name} is none")
                if kind.condition == CALLS and images is None and own.name in NOT_FOR_CALLS:
                    raise ValueError(f"--{own.name} is for models that are trained on images; this run has recordings")
