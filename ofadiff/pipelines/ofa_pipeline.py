"""`OFAPipeline`: the user's own diffusers pipeline class, with sizes."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    ModelMixin,
)
from diffusers.utils import DummyObject

from ofadiff.denoisers.pipelines import check_found_by_diffusers, class_count
from ofadiff.diffusers_hooks import moves_weights
from ofadiff.dtypes import torch_dtype_taken
from ofadiff.extraction.extracted_model import WIDTHS_KEY, ExtractedModel
from ofadiff.extraction.reader import load_extracted
from ofadiff.layers import cut_once
from ofadiff.pipelines.class_conditional import ClassConditionalDDPMPipeline
from ofadiff.pipelines.fitting import (
    Budget,
    CallCost,
    FittingSize,
    Measurements,
    call_to_measure,
    largest_that_fits,
    remembered_cost,
)
from ofadiff.pipelines.guidance import check_guidance, guided
from ofadiff.pipelines.one_size import OneSizePipeline, one_size_pipeline_class
from ofadiff.pipelines.steps import following
from ofadiff.reading.arguments import check_argument, check_dict, check_path
from ofadiff.reading.json_file import shown
from ofadiff.reading.stumbles import in_one_sentence
from ofadiff.size_schedule import SizeSchedule
from ofadiff.sizes import SizeTable
from ofadiff.storage.ofa_config import denoiser_class, read_ofa_config
from ofadiff.storage.pipeline_folder import find_denoisers, local_folder
from ofadiff.storage.pipeline_index import read_index
from ofadiff.storage.strangers import check_pipeline, forbid_pickles
from ofadiff.supernet import Supernet
from ofadiff.supernet_model import SupernetModel, unwrapped

# They choose the class of a task themselves and cannot be made.
AUTO_PIPELINES = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)

# Their code does not change weights during a pipeline's call, unless the user's own tells it to.
LIBRARIES = ("accelerate", "diffusers", "ofadiff", "peft", "tokenizers", "torch", "transformers")


class OFAPipeline:
    """A diffusers pipeline around a supernet: the checkpoint's own pipeline class, `size=` added to its call.

    `OFAPipeline.from_pretrained` makes it, `OFAPipeline.from_pipe` one for another task. Everything else is as in that
    class: schedulers, callbacks, devices, other components. Of a pipeline with several supernets, such as both
    transformers of Wan 2.2, the sizes move together.

    Example:
        >>> pipeline = OFAPipeline.from_pretrained("ofa")
        >>> pipeline.sizes
        (0.5, 1.0)
        >>> images = pipeline(size=0.5, num_inference_steps=2).images
    """

    _denoiser_names: tuple[str, ...]
    _stock_class: type[DiffusionPipeline]
    _only_subnets: Mapping[str, SizeTable] | None = None  # of a pipeline that was loaded with one size alone
    fitted: FittingSize | None = None  # of one that was loaded with size="fit": the size, and why

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, size: float | str | None = None, **kwargs: Any
    ) -> Any:
        """Loads an OFA checkpoint.

        Args:
            pretrained_model_name_or_path: A folder, or a hub repository, of a diffusers pipeline whose denoiser is a
                supernet.
            size: Load only this size's weights: one of the checkpoint's sizes, `"smallest"`, `"largest"`, or `"fit"`,
                the largest one that fits. The pipeline then has this size alone. By default the whole supernet, set to
                its largest size.
            **kwargs: Every other argument as in the pipeline class's own `from_pretrained`. With `size="fit"` these
                as well: `max_memory` (bytes, or a text such as `"6GB"`) and `latency_ms`, what a call of the pipeline
                may take, by default a GPU's free memory; `call`, its arguments, by default a prompt or a class alone;
                `device`, where it is measured and stays, by default the GPU if there is one. See `size_for`; what was
                found out is in the pipeline's `fitted`.

        Returns:
            An instance of the checkpoint's own pipeline class that is an `OFAPipeline` too.

        Raises:
            ValueError: If the checkpoint is no OFA checkpoint, has no such size or none that fits, names a module
                without the denoiser's class, or an argument cannot work with it.

        Example:
            >>> OFAPipeline.from_pretrained("my-ofa-checkpoint", size=0.6, torch_dtype=torch.bfloat16)
        """
        for argument in ("device_map", "quantization_config"):
            if kwargs.get(argument):
                raise ValueError(
                    f"{argument} is not supported for an OFA checkpoint; extract a size and load that with it"
                )
        check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        forbid_pickles(kwargs)
        directory = local_folder(pretrained_model_name_or_path, kwargs)
        if isinstance(size, str) and size == "fit":
            return cls._largest_that_fits(directory, kwargs)
        for argument in ("latency_ms", "max_memory", "call", "device"):
            if argument in kwargs:
                raise ValueError(f"{argument} is given, but size is {shown(size)}; it is for size='fit'")
        names = find_denoisers(directory)
        _check_denoisers_not_passed(names, kwargs)
        for name in names:
            check_found_by_diffusers(directory, name, denoiser_class(directory / name))
        custom = kwargs.get("custom_pipeline") is not None
        check_pipeline(
            directory, kwargs.get("variant"), {*names, *kwargs}, custom or bool(kwargs.get("trust_remote_code"))
        )
        tables = {name: SizeTable.from_dict(read_ofa_config(directory / name)) for name in names}
        dtypes = _taken_dtypes(kwargs)
        denoisers = {}
        for name, subnets in tables.items():
            own = dtypes.get(name, dtypes.get("default", torch.float32)) if isinstance(dtypes, dict) else dtypes
            # As in diffusers, a component without files of the variant is loaded without it.
            variant = kwargs.get("variant")
            variant = variant if any((directory / name).glob(f"*.{variant}*.safetensors")) else None
            options = {"torch_dtype": own, "variant": variant}
            if size is None:
                denoisers[name] = Supernet.from_pretrained(directory / name, **options).model
            else:
                stock = denoiser_class(directory / name)
                denoisers[name] = load_extracted(directory / name, stock, subnets.find(size), **options)
        # With the denoiser given, diffusers loads everything but that. A custom pipeline may be of any class, so sizes
        # are mixed in afterwards.
        loader = DiffusionPipeline if custom else stock_pipeline_class(directory, denoisers[names[0]])
        with torch_dtype_taken(), in_one_sentence(f"{directory} cannot be loaded"):
            pipeline = loader.from_pretrained(directory, **denoisers, **{**kwargs, "use_safetensors": True})
        if dtypes is None:
            # diffusers loads its own models in float32 then, transformers its own in the dtype that they are stored in.
            for component, part in pipeline.components.items():
                if isinstance(part, torch.nn.Module) and component not in (*names, *kwargs):
                    torch.nn.Module.float(part)
        only = None if size is None else {name: subnets.only(size) for name, subnets in tables.items()}
        return _mix_in_sizes(pipeline, names, only)

    @classmethod
    def _largest_that_fits(cls, directory: Path, kwargs: dict[str, Any]) -> Any:
        """Loads sizes, the largest first, until one fits what `from_pretrained` was told."""
        names = find_denoisers(directory)
        tables = [SizeTable.from_dict(read_ofa_config(directory / name)) for name in names]
        latency_ms, memory, call = (kwargs.pop(name, None) for name in ("latency_ms", "max_memory", "call"))
        device = torch.device(kwargs.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
        if latency_ms is None and memory is None and device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0]
        budget = Budget.of(latency_ms, memory, "max_memory")
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32
        if kwargs.get("custom_pipeline") is None:  # a call that cannot be is found out before anything is loaded
            with torch.device("meta"):
                own: Any = denoiser_class(directory / names[0])
                denoiser = own.from_config(own.load_config(directory / names[0]))
            call_to_measure(stock_pipeline_class(directory, denoiser), call)
        others: dict[str, Any] = {}
        loaded: dict[float, Any] = {}

        def cost_at(size: float) -> CallCost | None:
            weights = sum(table.find(size).params for table in tables)
            if (
                budget.memory is not None
                and isinstance(dtype, torch.dtype)
                and weights * dtype.itemsize > budget.memory
            ):
                return None
            loaded.clear()  # before the next one is there
            try:
                pipeline = cls.from_pretrained(directory, size=size, **{**others, **kwargs}).to(device)
                loaded[size] = pipeline
                others.update({name: part for name, part in pipeline.components.items() if name not in names})
                return remembered_cost(pipeline, call_to_measure(pipeline._stock_class, call), Measurements())
            except torch.OutOfMemoryError:
                return None

        size = largest_that_fits(tables[0].sizes, cost_at, budget, device)
        pipeline = loaded[size]
        pipeline.fitted = size
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, pipeline_class: type[DiffusionPipeline], **kwargs: Any) -> Any:
        """A pipeline for another task around the same components, with the same sizes.

        Nothing is copied or cast: setting a size, loading an adapter or moving one pipeline changes what both share.
        Offloading is enabled anew on the pipeline that is called next, as in diffusers.

        Args:
            pipeline: An `OFAPipeline`.
            pipeline_class: The class to make, such as `StableDiffusionImg2ImgPipeline`, or one that chooses
                it for the model, such as `AutoPipelineForImage2Image`.
            **kwargs: Components that the class needs beyond those of `pipeline`, such as `controlnet`, or other ones in
                their place, such as `scheduler`, or what a class that chooses takes, such as `enable_pag`; `dtype` (or
                `torch_dtype`) casts all components, the shared ones too.

        Returns:
            An instance of `pipeline_class` that is an `OFAPipeline` too.

        Raises:
            ValueError: If `pipeline` has no sizes, `pipeline_class` is no diffusers pipeline class, or the denoiser is
                passed.
            TypeError: If the class needs a component that `pipeline` has not.

        Example:
            >>> inpaint = OFAPipeline.from_pipe(pipeline, StableDiffusionInpaintPipeline)
            >>> OFAPipeline.from_pipe(pipeline, StableDiffusionControlNetPipeline, controlnet=controlnet)
        """
        if not isinstance(pipeline, OFAPipeline):
            raise ValueError(
                f"this {type(pipeline).__name__} has no sizes; pass what OFAPipeline.from_pretrained returned, "
                "and the class to make"
            )
        _check_denoisers_not_passed(pipeline._denoiser_names, kwargs)
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        if pipeline_class in AUTO_PIPELINES:
            made = pipeline_class.from_pipe(pipeline, **kwargs)
        else:
            known = isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)
            if not known or issubclass(pipeline_class, OFAPipeline | OneSizePipeline):
                raise ValueError(
                    f"pipeline_class is {shown(pipeline_class)}; it must be a diffusers pipeline class such as "
                    "StableDiffusionImg2ImgPipeline"
                )
            made = pipeline._rebuild(pipeline_class, **kwargs)
        names = tuple(name for name in pipeline._denoiser_names if name in made.components)
        _mix_in_sizes(made, names, pipeline._only_subnets)
        return made.to(dtype=dtypes[0] or dtypes[1])

    def __call__(
        self,
        *args: Any,
        size: float | str | SizeSchedule | None = None,
        guidance_size: float | str | SizeSchedule | None = None,
        autoguidance_scale: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The pipeline's own call; what is added holds for this call only.

        The denoiser is this thread's until the call ends: calls of other pipelines around it wait.

        Args:
            *args: As in the pipeline's own call.
            size: One of `sizes`, `"smallest"` or `"largest"` for all steps, or a `SizeSchedule`, or the name of one of
                `schedules`, for each of them. By default the size that is set.
            guidance_size: The same, for the unconditional half of classifier-free guidance; by default that of the
                conditional one. A batch of both is two forwards then.
            autoguidance_scale: With it, the size `guidance_size` is the bad version of the model that autoguidance
                (arXiv 2406.02507) leads away from, by this factor, from 1 on, at which it changes nothing. It needs no
                unconditional half: `guidance_scale=1.0` leaves that out.
            **kwargs: As in the pipeline's own call.

        Raises:
            ValueError: If there is no such size; a schedule cannot be followed: the pipeline has no scheduler, or its
                denoiser is called at other times than the scheduler's; or a size cannot guide: which half is the
                unconditional one is not known, or there is no classifier-free guidance.
        """
        supernets = self.supernets
        (schedule, chosen), (_, guiding) = self._chosen(size), self._chosen(guidance_size)
        if guiding or autoguidance_scale is not None:
            parameters = inspect.signature(self._stock_class.__call__).parameters
            by_place = dict(zip([name for name in parameters if name != "self"], args, strict=False))
            guided_by = {"guidance_size": guidance_size, "autoguidance_scale": autoguidance_scale}
            check_guidance(self._stock_class, parameters, {**by_place, **kwargs, **guided_by})
        if not supernets:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        for supernet in supernets.values():  # every denoiser must have them
            for each in (*chosen, *guiding):
                supernet.subnets.find(each)
        with ExitStack() as stack:
            for supernet in supernets.values():
                stack.enter_context(supernet.used_at(chosen[0] if chosen else None))
            if self._weights_stay(args, kwargs):
                stack.enter_context(cut_once(2 if guiding else 1))
            denoisers = {name: self.components[name] for name in supernets}  # type: ignore[attr-defined]
            if guiding:
                sizes = SizeSchedule(chosen) if chosen else None
                stack.enter_context(guided(self, denoisers, sizes, SizeSchedule(guiding), autoguidance_scale))
            elif schedule is not None:
                stack.enter_context(following(self, denoisers, schedule))
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _chosen(self, size: float | str | SizeSchedule | None) -> tuple[SizeSchedule | None, list[float]]:
        """The schedule that a call is given, if it is one, and the sizes of it, or the one size."""
        named = self.schedules
        if isinstance(size, str) and named and size not in (*named, "smallest", "largest"):
            sizes = ", ".join(f"{each:g}" for each in self.sizes)
            names = ", ".join(map(repr, ("smallest", "largest", *named)))
            raise ValueError(f"size is {shown(size)}; it must be one of {sizes}, {names}")
        found = named.get(size, size) if isinstance(size, str) else size
        if isinstance(found, SizeSchedule):
            return found, [self.subnets.find(each).size for each in found]
        return None, [] if found is None else [self.subnets.find(found).size]

    def _weights_stay(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether no weight of the denoiser can change, or leave the device, during a call with these arguments.

        An offloaded denoiser is to leave the device between its forwards, and its parts with it; one that is stored in
        another dtype is to take no more memory than that; and only code of libraries is known not to touch weights: no
        callback, hook or component of the user's may run.
        """
        denoisers = [unwrapped(self.components[name]) for name in self._denoiser_names]  # type: ignore[attr-defined]
        if any(denoiser.device != self._execution_device for denoiser in denoisers):  # type: ignore[attr-defined]
            return False
        code = [value for value in (*args, *kwargs.values()) if callable(value)]
        parts = [*self.components.values()]  # type: ignore[attr-defined]
        for module in itertools.chain.from_iterable(denoiser.modules() for denoiser in denoisers):
            if moves_weights(module):
                return False
            parts += [module, vars(module).get("processor")]
            code += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        code += [self._stock_class, *{type(part) for part in parts if part is not None}]
        return all(_library_of(each) in LIBRARIES for each in code)

    @property
    def denoiser_names(self) -> tuple[str, ...]:
        """What the pipeline calls the components that have sizes, mostly one."""
        return self._denoiser_names

    @property
    def supernets(self) -> dict[str, Supernet]:
        """The denoisers with their sizes by name; empty if the pipeline has one size alone, or they were replaced."""
        models = {name: unwrapped(self.components[name]) for name in self._denoiser_names}  # type: ignore[attr-defined]
        return {
            name: Supernet.of(model)
            for name, model in models.items()
            if isinstance(model, SupernetModel) and model.ofa_state is not None
        }

    @property
    def supernet(self) -> Supernet | None:
        """The denoiser with its sizes, the first one of several; None where there is none, see `supernets`."""
        return self.supernets.get(self._denoiser_names[0])

    @property
    def subnets(self) -> SizeTable:
        """The sizes that can be sampled, with widths and costs of the denoiser, the first one of several.

        Raises:
            ValueError: If a denoiser was replaced by one without sizes.
        """
        supernets, only = self.supernets, self._only_subnets or {}
        for name in self._denoiser_names:
            model = unwrapped(self.components[name])  # type: ignore[attr-defined]
            as_loaded = isinstance(model, ExtractedModel) and name in only
            if name not in supernets and not (as_loaded and model.config[WIDTHS_KEY] == only[name][0].widths):
                raise ValueError(
                    f"the pipeline's {name} is another {type(model).__name__} than it was loaded with, and that has no "
                    "sizes"
                )
        name = self._denoiser_names[0]
        return supernets[name].subnets if name in supernets else only[name]

    @property
    def sizes(self) -> tuple[float, ...]:
        """The sizes that can be sampled, ascending."""
        return self.subnets.sizes

    @property
    def size(self) -> float:
        """The size that a call without `size=` samples at."""
        return self.sizes[0] if self.supernet is None else self.supernet.size

    def set_size(self, size: float | str) -> None:
        """Sets the size that calls without `size=` sample at.

        In a `callback_on_step_end` it is the size of the steps that follow; a call with `size=` ends where it began.

        Raises:
            ValueError: If there is no such size; a pipeline that was loaded with `size=` has only that one.
        """
        subnet = self.subnets.find(size)
        for supernet in self.supernets.values():
            supernet.set_size(subnet.size)

    @property
    def schedules(self) -> Mapping[str, SizeSchedule]:
        """The schedules that are kept with the sizes, by their names; a call takes them as its `size=`."""
        return {} if self.supernet is None else self.supernet.schedules

    def set_schedule(self, name: str, schedule: SizeSchedule | None) -> None:
        """Keeps a schedule under a name, see `Supernet.set_schedule`; `save_pretrained` saves it.

        Raises:
            ValueError: If the name or a size cannot be, or the pipeline has one size alone.
        """
        if self.supernet is None:
            raise ValueError("the pipeline has one size alone; load it without size= to keep schedules")
        self.supernet.set_schedule(name, schedule)

    def size_for(
        self,
        latency_ms: float | None = None,
        memory: int | str | None = None,
        call: Mapping[str, Any] | None = None,
        measure_again: bool = False,
    ) -> FittingSize:
        """The largest size with which a call of the pipeline fits a budget, on the device that it is on.

        Sizes are measured from the largest one down until one fits, and what was measured is remembered, in
        `ofadiff/measured.json` in the cache of Hugging Face's libraries (`HF_HOME`), for the same call, components,
        device and versions. A call of more than six steps is timed with two and with six, and the others are added.

        Args:
            latency_ms: Milliseconds that a call may take.
            memory: What it may take of memory, in bytes or as a text such as `"6GB"`: weights of all components with
                this size alone, as `from_pretrained(…, size=…)` or `extract` holds it, and the peak on top of them, as
                PyTorch allocates it; a GPU's own context comes on top.
            call: Arguments of the pipeline's call, such as the prompt, the resolution and the number of steps; by
                default a prompt or a class alone.
            measure_again: Whether to measure what is remembered.

        Returns:
            The size, a number; its `reason` says in one line what was measured.

        Raises:
            ValueError: If nothing fits, and what would; if there is no budget, or it cannot be one; or the pipeline
                cannot be called so.

        Example:
            >>> size = pipeline.size_for(memory="6GB", call={"prompt": "a red car", "num_inference_steps": 20})
            >>> pipeline.set_size(size)
        """
        check_dict("call", call)
        check_argument("measure_again", measure_again, isinstance(measure_again, bool), "True or False")
        budget = Budget.of(latency_ms, memory)
        arguments = call_to_measure(self._stock_class, call)
        device = self._execution_device  # type: ignore[attr-defined]

        def cost_at(size: float) -> CallCost | None:
            pipeline = self if self.supernet is None else self.extract(size)
            try:
                return remembered_cost(pipeline, arguments, Measurements(), measure_again)
            except torch.OutOfMemoryError:
                return None

        return largest_that_fits(self.sizes, cost_at, budget, device)

    def extract(self, size: float | str) -> DiffusionPipeline:
        """A plain diffusers pipeline around the extracted denoiser; it shares the other components.

        Its call refuses `size=`, which some classes of diffusers take and ignore. A new ControlNet is made of the
        supernet, at any size: `ControlNetModel.from_unet` needs the full encoder.

        Raises:
            ValueError: If there is no such size.
        """
        subnet = self.subnets.find(size)
        denoisers = {name: supernet.extract(subnet.size) for name, supernet in self.supernets.items()}
        extracted = self._rebuild(self._stock_class, **denoisers)
        extracted.__class__ = one_size_pipeline_class(self._stock_class)  # type: ignore[arg-type]
        extracted.ofa_size = subnet.size
        return extracted

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As in diffusers; the denoiser saves its sizes itself."""
        if not kwargs.get("safe_serialization", True):
            raise ValueError("safe_serialization=False: an OFA checkpoint is saved as safetensors only")
        for name, supernet in self.supernets.items():  # before any component is written
            supernet.model.check_can_be_saved(Path(save_directory) / name)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: IP-Adapter's projections have the original's full width and basis.

        Raises:
            ValueError: Always.
        """
        raise ValueError("an IP-Adapter works with the original model only, not with the sizes of an OFA checkpoint")

    def _rebuild(self, pipeline_class: type[DiffusionPipeline], **replaced: Any) -> DiffusionPipeline:
        """A pipeline of a class around the components and with the options that both know."""
        modules, options = pipeline_class._get_signature_keys(pipeline_class)  # type: ignore[attr-defined]
        shared = {name: part for name, part in self.components.items() if name in modules}  # type: ignore[attr-defined]
        shared |= {name: self.config[name] for name in options if name in self.config}  # type: ignore[attr-defined]
        return pipeline_class(**{**shared, **replaced})

    def __reduce__(self) -> tuple:
        # The class is made at run time: what unpickles or copies the pipeline has to make it again.
        return _new_pipeline, (self._stock_class,), self.__dict__


@functools.cache
def ofa_pipeline_class(stock: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A diffusers pipeline class with `size=` in its call.

    It carries the name of the stock class, which is what diffusers writes into `model_index.json`: the folder stays
    one that plain diffusers loads.
    """
    call = inspect.signature(stock.__call__)
    kinds = {
        "size": "float | str | SizeSchedule | None",
        "guidance_size": "float | str | SizeSchedule | None",
        "autoguidance_scale": "float | None",
    }
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in kinds.items()
    ]
    parameters = [p for p in call.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in call.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return OFAPipeline.__call__(self, *args, **kwargs)

    __call__.__signature__ = call.replace(parameters=[*parameters, *ours, *rest])  # type: ignore[attr-defined]
    added = (
        "For this call only: `size`, one of the pipeline's `sizes`, or a `SizeSchedule` of them; `guidance_size`, the "
        "same for the unconditional half of guidance, or, with `autoguidance_scale`, for autoguidance's bad model."
    )
    __call__.__doc__ = f"{stock.__call__.__doc__}\n\n{added}"
    namespace = {
        "__module__": stock.__module__,
        "__qualname__": f"OFAPipeline[{stock.__name__}]",
        "__doc__": stock.__doc__,
        "__call__": __call__,
        "_stock_class": stock,
    }
    return type(stock.__name__, (OFAPipeline, stock), namespace)


def _mix_in_sizes(pipeline: Any, names: tuple[str, ...], only_subnets: Mapping[str, SizeTable] | None) -> Any:
    """Makes a pipeline around a supernet, or around one size, an `OFAPipeline` of its own class."""
    pipeline.__class__ = ofa_pipeline_class(type(pipeline))  # type: ignore[arg-type]
    pipeline._denoiser_names, pipeline._only_subnets = names, only_subnets
    return pipeline


def _library_of(code: Any) -> str:
    """The package that a function, a class or an object's class is defined in."""
    defined = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    return (defined.__module__ or "").partition(".")[0]


def _new_pipeline(stock: type[DiffusionPipeline]) -> DiffusionPipeline:
    cls: Any = ofa_pipeline_class(stock)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _taken_dtypes(kwargs: dict[str, Any]) -> Any:
    """What `torch_dtype=` or `dtype=` says, which is left under the first name; raises ValueError if both are there."""
    if kwargs.get("dtype") is not None and kwargs.get("torch_dtype") is not None:
        raise ValueError(
            f"dtype is {kwargs['dtype']} and torch_dtype is {kwargs['torch_dtype']}; they are two names of one "
            "argument, so give one of them"
        )
    # Either name does, whichever the installed diffusers knows.
    dtypes = kwargs.pop("dtype", None) or kwargs.get("torch_dtype")
    kwargs |= {} if dtypes is None else {"torch_dtype": dtypes}
    return dtypes


def _check_denoisers_not_passed(names: Sequence[str], kwargs: dict[str, Any]) -> None:
    for name in set(names) & kwargs.keys():
        raise ValueError(f"{name} cannot be passed: the checkpoint's own {name} is what has the sizes")


def stock_pipeline_class(directory: Path, denoiser: ModelMixin) -> type[DiffusionPipeline]:
    """The class of a pipeline's folder; of a pixel model with classes the one that takes them.

    Raises:
        ValueError: If diffusers has none of that name, or it needs a package that is not installed.
    """
    index = directory / "model_index.json"
    name = read_index(directory)["_class_name"]
    stock = getattr(diffusers, name, None) if isinstance(name, str) else None
    if isinstance(stock, DummyObject):
        missing = [package for package in stock._backends if find_spec(package) is None]
        raise ValueError(
            f"{index} names a {name}, which needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    if not (isinstance(stock, type) and issubclass(stock, DiffusionPipeline)):
        raise ValueError(
            f"{index} names the pipeline class {name!r}, which diffusers does not have; if it is one of your own, say "
            "where it is with custom_pipeline="
        )
    if stock in (DDPMPipeline, DDIMPipeline) and class_count(denoiser) is not None:
        return ClassConditionalDDPMPipeline
    return stock
