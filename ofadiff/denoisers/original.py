"""The pretrained pipeline: how it calls its denoiser, read from its configuration files before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ModelMixin

from ofadiff.denoisers.encoder import AUTOENCODERS, spatial_compression
from ofadiff.denoisers.kind import FLOW_MATCHING, DenoiserKind
from ofadiff.denoisers.pipelines import class_of_component, find_component
from ofadiff.denoisers.recorded import recorded_kind
from ofadiff.denoisers.table import kind_of_pipeline, pipelines_in_words, trainable_kinds
from ofadiff.noise.choice import forward_process_of, make_noise_scheduler
from ofadiff.noise.noisy_samples import ForwardProcess
from ofadiff.reading.json_file import read_object
from ofadiff.reading.stumbles import in_one_sentence
from ofadiff.sizes import CONFIG_NAME
from ofadiff.storage.finite import check_finite_pipeline
from ofadiff.storage.model_classes import model_class
from ofadiff.storage.strangers import check_no_code, check_pipeline, empty_model


@dataclass(frozen=True)
class Original:
    """What the configuration of a pretrained pipeline says.

    Attributes:
        name: A folder or a hub name, as the user gave it.
        folder: Folder of the pipeline; of a hub name in the cache.
        variant: Variant of its weight files.
        kind: Kind of its denoiser.
        component: What the pipeline calls it.
        denoiser: Without weights, on the meta device.
        vae: The same of its VAE; None for models of pixels.
        scheduler: The configuration of its scheduler.
    """

    name: str
    folder: Path
    variant: str | None
    kind: DenoiserKind
    component: str
    denoiser: ModelMixin
    vae: ModelMixin | None
    scheduler: Mapping[str, Any]

    @property
    def classes(self) -> float | None:
        """How many classes it is conditioned on; infinitely many where it takes any number, None without classes."""
        return None if self.kind.classes is None else self.kind.classes(self.denoiser)

    @property
    def channels(self) -> int:
        """Of its images: 1, 3 or 4."""
        return (self.denoiser if self.vae is None else self.vae).config.in_channels

    def resolution(self, asked: int | None) -> int:
        """Side of the images that it is trained on, in pixels: the one asked for, or its own.

        Raises:
            ValueError: If the model cannot take images of that side, or has none of its own.
        """
        config, own = self.denoiser.config, self.own_resolution
        if self.kind.fixed_size and asked not in (None, own):
            raise ValueError(f"--resolution {asked} cannot be had: images of this model have {own} pixels a side")
        resolution = asked or own
        if resolution is None:
            size = config.get("sample_size")
            raise ValueError(f"the model's sample size is {size}; give the side of square images with --resolution")
        multiple = self.compression * self.kind.packing * self.kind.divisor(config)
        if resolution % multiple:
            raise ValueError(f"--resolution {resolution} is not a multiple of {multiple}, as this model needs")
        largest = config.get("pos_embed_max_size") or resolution
        if resolution > largest * multiple:
            raise ValueError(f"--resolution {resolution} is more than {largest * multiple}, this model's largest")
        return resolution

    @property
    def compression(self) -> int:
        """Pixels to a latent, along a side; 1 for models of pixels."""
        return 1 if self.vae is None else spatial_compression(self.vae)

    @property
    def own_resolution(self) -> int | None:
        """Side of the square images that it was made for, in pixels; None if its configuration does not say."""
        size = self.denoiser.config.get("sample_size")
        return size * self.compression if isinstance(size, int) else None

    def forward_process(self, snr_gamma: float | None = None, noise_offset: float = 0.0) -> ForwardProcess:
        """How training makes its samples noisy, see `forward_process_of`."""
        name = self.scheduler["_class_name"]
        if FLOW_MATCHING not in self.kind.forward_processes:
            make_noise_scheduler(name, self.scheduler)
        return forward_process_of(name, self.scheduler, snr_gamma, noise_offset)

    def load(self) -> DiffusionPipeline:
        """The pipeline in full precision, without a safety checker.

        Raises:
            ValueError: If it cannot be loaded, or has weights that are not finite.
        """
        index = DiffusionPipeline.load_config(self.folder)
        without: dict[str, Any] = absent_components(index)
        if "safety_checker" in index:
            without |= {"safety_checker": None, "requires_safety_checker": False}
        with _loading(self.name, [self.kind]):
            pipeline = DiffusionPipeline.from_pretrained(
                self.folder, variant=self.variant, use_safetensors=True, **without
            )
        check_finite_pipeline(pipeline, self.name)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def read_original(
    name: str,
    kinds: Sequence[DenoiserKind] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> Original:
    """Checks a pretrained pipeline by its configuration files; of a hub name everything is downloaded.

    Args:
        name: A folder or a hub name.
        kinds: Kinds of denoisers that come into question; by default all that can be trained.
        revision: Revision of the hub repository.
        variant: Variant of the weight files, such as `"fp16"`.
        cache_dir: Where downloads go.

    Raises:
        ValueError: If it is no pipeline, none of these kinds, or its parts do not fit each other.
    """
    kinds = trainable_kinds() if kinds is None else kinds
    check_pipeline_folder(name, kinds)
    if Path(name).is_dir():
        check_no_code(name)
    with _loading(name, kinds):
        index = DiffusionPipeline.load_config(name, revision=revision, cache_dir=cache_dir)
    found = kind_of_pipeline(index, kinds)
    if found is None:
        parts = [f"{value[1]} as its {part}" for part, value in index.items() if isinstance(value, list) and value[1]]
        raise ValueError(
            f"{name} is a {index['_class_name']}; expected {pipelines_in_words(kinds)}; it has a {', a '.join(parts)}"
        )
    kind, component = found
    denoiser_class = _denoiser_class(kind)
    with _loading(name, kinds):
        folder = Path(name)
        if not folder.is_dir():
            options = {"revision": revision, "variant": variant, "cache_dir": cache_dir, "use_safetensors": True}
            folder = Path(DiffusionPipeline.download(name, **options))
    check_pipeline(folder, variant, {**absent_components(index), "safety_checker": None})
    with _loading(name, kinds):
        scheduler = DDPMScheduler.load_config(folder, subfolder="scheduler")
        denoiser = empty_model(folder / component, denoiser_class)
        vae = empty_model(folder / "vae", _autoencoder_class(folder / "vae")) if index.get("vae") else None
    original = Original(name, folder, variant, kind, component, denoiser, vae, scheduler)
    _check_channels(original)
    return original


def read_any_original(
    name: str,
    component: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> Original:
    """Like `read_original`, for a pipeline of any class that is trained on recordings.

    Args:
        name: A folder or a hub name.
        component: What the pipeline calls the denoiser that is compressed; needed where it has several.
        revision: As in `read_original`.
        variant: As in `read_original`.
        cache_dir: As in `read_original`.

    Raises:
        ValueError: If it is no pipeline, or the component is no denoiser that can be built.
    """
    expected = "a diffusers pipeline"
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise ValueError(f"{name} is not the folder of {expected}; it has no model_index.json")
    if Path(name).is_dir():
        check_no_code(name)
    try:
        index = DiffusionPipeline.load_config(name, revision=revision, cache_dir=cache_dir)
        parts = {part: value for part, value in index.items() if isinstance(value, (list, tuple)) and value[1]}
        classes = {part: class_of_component(*value) for part, value in parts.items()}
        found = find_component(classes, component, index["_class_name"])
        folder = Path(name)
        if not folder.is_dir():
            options = {"revision": revision, "variant": variant, "cache_dir": cache_dir, "use_safetensors": True}
            folder = Path(DiffusionPipeline.download(name, **options))
        check_no_code(folder)
        denoiser = empty_model(folder / found, classes[found])
    except (AttributeError, OSError) as error:
        raise cannot_load(name, expected, error) from error
    kind = recorded_kind(denoiser, index["_class_name"], found)
    return Original(name, folder, variant, kind, found, denoiser, None, {})


def check_pipeline_folder(name: str, kinds: Sequence[DenoiserKind]) -> None:
    """Raises ValueError for a folder that is no diffusers pipeline; hub names pass."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        config = folder / "config.json"
        alone = read_object(config).get("_class_name") if config.is_file() else None
        found = f"it is the folder of a single {alone}" if alone else "it has no model_index.json"
        raise ValueError(f"{name} is not the folder of {pipelines_in_words(kinds)}; {found}")


def check_not_compressed(name: str, component: str | None = None) -> None:
    """Raises ValueError for the folder of an OFA checkpoint, unless another component of it is meant."""
    compressed = [file.parent.name for file in sorted(Path(name).glob(f"*/{CONFIG_NAME}"))]
    if compressed and (component is None or component in compressed):
        of_several = f": its {' and '.join(compressed)}" if component is not None else ""
        raise ValueError(f"{name} is compressed already{of_several}; expected the original model")


def absent_components(index: Mapping[str, Any]) -> dict[str, None]:
    """What a pipeline was saved without, such as the T5 of Stable Diffusion 3; diffusers wants to be told so.

    Args:
        index: What its `model_index.json` says.
    """
    return {name: None for name, value in index.items() if value == [None, None]}


def cannot_load(name: str, expected: str, error: Exception) -> ValueError:
    """What to raise where diffusers could not load a pipeline or a part of it."""
    reason = " ".join(str(error).split()) if Path(name).is_dir() else "no such folder, and the hub gave none"
    return ValueError(f"cannot load {name}, expected {expected}; {reason}")


@contextmanager
def _loading(name: str, kinds: Sequence[DenoiserKind]) -> Iterator[None]:
    """A block in which what diffusers cannot load is an error that says what was expected."""
    try:
        with in_one_sentence("it cannot be read"):
            yield
    except (OSError, ValueError) as error:
        raise cannot_load(name, pipelines_in_words(kinds), error) from error


def _denoiser_class(kind: DenoiserKind) -> Any:
    """Raises ValueError unless it is in diffusers or in `MODEL_CLASSES`."""
    found = model_class(kind.model)
    if found is None:
        raise ValueError(
            f"there is no class {kind.model!r}; it must be one of diffusers or in MODEL_CLASSES of "
            "ofadiff.storage.model_classes"
        )
    return found


def _autoencoder_class(folder: Path) -> Any:
    """Raises ValueError unless it is one that images can be encoded with."""
    known = {autoencoder.__name__: autoencoder for autoencoder in AUTOENCODERS}
    name = AutoencoderKL.load_config(folder)["_class_name"]
    if name not in known:
        raise ValueError(f"its VAE is an {name}, not an {' or '.join(known)}")
    return known[name]


def _check_channels(original: Original) -> None:
    """Raises ValueError unless the denoiser predicts what it takes, and takes what the VAE gives."""
    name, kind, config = original.name, original.kind, original.denoiser.config
    given, put_out = config.in_channels, config.out_channels or config.in_channels
    in_words = f"the {original.component} of {name} has {given} input and {put_out} output channels"
    # A learned variance has as many channels as the prediction.
    if original.vae is not None:
        latent = original.vae.config.latent_channels
        expected = latent * kind.packing**2
        if given != expected or put_out not in (given, 2 * given):
            raise ValueError(
                f"{in_words}, its VAE {latent}; models of latents have {expected} channels of both then, or twice as "
                "many of output"
            )
    elif put_out != given and not (kind.learned_variance and put_out == 2 * given):
        raise ValueError(f"{in_words}; learned variances are not supported")
