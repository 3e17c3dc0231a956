"""Records how a pipeline calls its denoiser, by letting it sample."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from ofadiff.adapters.size_adapter import SizeAdapter, tensors_of
from ofadiff.denoisers.pipelines import find_component
from ofadiff.pipelines.calls import check_calls, described, opened, without_bar
from ofadiff.reading.arguments import check_argument, check_dict, check_path, check_seed, check_whole
from ofadiff.reading.stumbles import in_one_sentence
from ofadiff.recordings.folder import (
    DESCRIPTION_NAME,
    Recordings,
    call_file,
    check_same,
    digest_in,
    read_description,
    recorded_calls,
    specs_of,
    write_call,
    write_description,
)
from ofadiff.recordings.nested import Tensors, to_spec
from ofadiff.recordings.recorded_call import answer_of, parameters_of, time_argument
from ofadiff.storage.finite import NotFiniteError
from ofadiff.storage.output import check_folder
from ofadiff.supernet import Supernet
from ofadiff.supernet_model import SupernetModel, unwrapped

# A call of the denoiser: its step, its arguments and its answer as specs, and their tensors.
_Kept = tuple[int, Any, Any, Any, Tensors]


def record(
    pipeline: DiffusionPipeline,
    calls: Sequence[str | Mapping[str, Any]],
    output_dir: str | Path,
    steps_per_call: int = 4,
    seed: int = 0,
    *,
    component: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    max_bytes: int | None = None,
    image_dir: str | Path = ".",
    progress: bool = True,
) -> Recordings:
    """Runs a pipeline as its user would, and keeps what its denoiser was called with and what it answered.

    Of every call some steps are kept, drawn alike from all of them, with all calls of the denoiser in them: both halves
    of guidance. A step is what has one timestep. Noise and draws depend on the seed and the number of the call alone.
    Several processes (of `accelerate launch`) share the calls. The same command goes on with a recording that was
    killed; nothing is recorded twice.

    Args:
        pipeline: The original, with whatever scheduler, device and dtype it is used.
        calls: Prompts, or dicts of arguments of the pipeline's own call. Strings in arguments of images are paths.
        output_dir: Folder of the recordings; new, or one of the same recording.
        steps_per_call: Steps kept of each call; all of a call that has fewer.
        seed: Of the noise and of the draws.
        component: What the pipeline calls its denoiser; needed where it has several.
        arguments: Arguments of all calls that do not have their own, such as `num_inference_steps`.
        max_bytes: Stop before the recordings take more than this on disk.
        image_dir: What paths of images are relative to.
        progress: Whether to show a bar.

    Returns:
        The recordings, of all processes.

    Warns:
        UserWarning: If the recording stopped at `max_bytes`; says how many calls it has.

    Raises:
        ValueError: If a call cannot be made (before the first one is), the folder holds another recording, `max_bytes`
            is less than one call takes, or an argument of the denoiser cannot be kept.
        NotFiniteError: If the denoiser answers with values that are not finite: names the call and the step, and keeps
            nothing of that call.

    Example:
        >>> recordings = record(pipeline, [{"num_inference_steps": 3}], "recordings", steps_per_call=2)
        >>> call = recordings[0]
        >>> call.replay(pipeline.unet)[0].equal(call.answer[0])
        True
    """
    _check_asked(pipeline, output_dir, image_dir, steps_per_call, seed, max_bytes)
    check_dict("arguments", arguments)
    checked = check_calls(type(pipeline), calls, arguments, image_dir)
    name = find_component(pipeline.components, component, type(pipeline).__name__)
    denoiser: Any = unwrapped(pipeline.components[name])
    check_largest(denoiser, name, checked)
    folder = Path(output_dir)
    description = {
        "pipeline": type(pipeline).__name__,
        "component": name,
        "denoiser": type(denoiser).__name__,
        "dtype": str(denoiser.dtype),
        "weights": digest_in(denoiser, denoiser.dtype, tensors_of(adapter_of(denoiser))),
        "parameters": list(parameters_of(denoiser)),
        "steps_per_call": steps_per_call,
        "seed": seed,
        "calls": [described(call) for call in checked],
    }
    check_recordings(folder, description)
    state = PartialState()
    _record_share(pipeline, pipeline.components[name], checked, folder, description, max_bytes, progress, state)
    state.wait_for_everyone()
    recordings = Recordings(folder)
    if recordings.missing:
        warnings.warn(
            f"{len(recordings.pipeline_calls)} of {len(checked)} calls are recorded: more would take over {max_bytes} "
            f"bytes in {folder}",
            stacklevel=2,
        )
    return recordings


def _check_asked(
    pipeline: Any, output_dir: Any, image_dir: Any, steps_per_call: Any, seed: Any, max_bytes: Any
) -> None:
    """Raises ValueError for an argument of `record` that cannot be, whatever the pipeline."""
    check_argument("pipeline", pipeline, isinstance(pipeline, DiffusionPipeline), "a pipeline of diffusers")
    check_path("output_dir", output_dir)
    check_path("image_dir", image_dir)
    check_whole("steps_per_call", steps_per_call, 1)
    check_seed("seed", seed)
    if max_bytes is not None:
        check_whole("max_bytes", max_bytes, 1)


def check_largest(denoiser: Any, component: str, calls: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if a denoiser with sizes would be recorded at a smaller one than its largest."""
    if not isinstance(denoiser, SupernetModel) or denoiser.ofa_state is None:
        return
    supernet = Supernet.of(denoiser)
    for size in {supernet.size, *(call["size"] for call in calls if call.get("size") is not None)}:
        if supernet.subnets.find(size).size != supernet.sizes[-1]:
            raise ValueError(
                f"the {component} would be recorded at size {size}; other sizes learn from its largest: leave out "
                "size, and set_size('largest')"
            )


def adapter_of(denoiser: Any) -> SizeAdapter | None:
    """The adapter that a denoiser has at the size that is recorded; None for one without sizes."""
    if not isinstance(denoiser, SupernetModel) or denoiser.ofa_state is None:
        return None
    supernet = Supernet.of(denoiser)
    return supernet.size_adapters.get(supernet.sizes[-1])


def check_recordings(folder: Path, description: Mapping[str, Any]) -> None:
    """Raises ValueError unless a folder can be that of a recording: is new, or holds the beginning of it."""
    check_folder("the folder of recordings", folder)
    # One that holds no call yet may become any.
    if (folder / DESCRIPTION_NAME).is_file() and recorded_calls(folder):
        check_same(folder, read_description(folder), description)
    elif folder.exists() and not (folder / DESCRIPTION_NAME).is_file() and any(folder.glob("[!.]*")):
        raise ValueError(f"{folder} is no folder of recordings, and not empty; give another one")


def _record_share(
    pipeline: Any,
    denoiser: nn.Module,
    calls: Sequence[dict[str, Any]],
    folder: Path,
    description: Mapping[str, Any],
    max_bytes: int | None,
    progress: bool,
    state: PartialState,
) -> None:
    """Records this process' calls: every so-manieth one."""
    done = set(recorded_calls(folder))
    spent = sum(
        call_file(folder, number).stat().st_size
        for number in done
        if number % state.num_processes == state.process_index
    )
    limit = None if max_bytes is None else max_bytes / state.num_processes
    mine = [number for number in range(len(calls))[state.process_index :: state.num_processes] if number not in done]
    show = progress and state.is_local_main_process
    with without_bar(pipeline), torch.random.fork_rng():
        for number in tqdm(mine, "Recording", disable=not show):
            kept = _record_call(pipeline, denoiser, calls[number], number, description)
            expected = sum(tensor.nbytes for tensor in {k: v for entry in kept for k, v in entry[4].items()}.values())
            if limit is not None and spent + expected > limit:
                if not spent:
                    raise ValueError(
                        f"one call takes {expected} bytes of recordings, more than the {max_bytes} allowed"
                    )
                return
            if number == mine[0]:  # none before there is a call that can be made; complete before any file of calls
                write_description(folder, description)
            spent += write_call(folder, number, kept)


def _record_call(
    pipeline: Any, denoiser: nn.Module, call: Mapping[str, Any], number: int, description: Mapping[str, Any]
) -> list[_Kept]:
    """What is kept of one call of the pipeline."""
    steps, seed = description["steps_per_call"], description["seed"]
    draw = random.Random(f"{seed} steps of call {number}")
    recorder = _Recorder(denoiser, f"call {number + 1}", description["parameters"], steps, draw)
    noise = random.Random(f"{seed} noise of call {number}").getrandbits(63)
    torch.manual_seed(noise)
    options = opened(call)
    if "generator" in inspect.signature(type(pipeline).__call__).parameters and "generator" not in options:
        options["generator"] = torch.Generator().manual_seed(noise)
    with (
        recorder,
        in_one_sentence(f"call {number + 1} cannot be made of the {type(pipeline).__name__}", NotFiniteError),
    ):
        pipeline(**options)
    if not recorder.kept:
        raise ValueError(
            f"call {number + 1} of the {type(pipeline).__name__} never called its {description['component']}, so there "
            "is nothing to record"
        )
    return [entry for slot in sorted(recorder.kept, key=lambda kept: kept[0][0]) for entry in slot]


class _Recorder:
    """Keeps the calls of a denoiser in some steps, drawn alike from all: the k-th step takes a place with n/k.

    How many steps there will be nobody has to know: schedulers, strengths and stages differ.
    """

    def __init__(
        self, denoiser: nn.Module, call: str, parameters: Sequence[str], steps: int, draw: random.Random
    ) -> None:
        self.denoiser, self.call = denoiser, call
        self.parameters, self.steps, self.draw = tuple(parameters), steps, draw
        self.time = time_argument(self.parameters)
        self.kept: list[list[_Kept]] = []
        self.step, self.last_time = -1, None
        self.slot: list[_Kept] | None = None
        self.taken: tuple[Any, Any, Tensors] | None = None
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        self.handles = [
            self.denoiser.register_forward_pre_hook(self._called, with_kwargs=True),
            self.denoiser.register_forward_hook(self._answered, with_kwargs=True),
        ]

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        time = {**dict(zip(self.parameters, args, strict=False)), **kwargs}.get(self.time or "")
        moment = time.detach().unique().tolist() if isinstance(time, Tensor) else time
        if moment is None or moment != self.last_time:
            self.step, self.last_time = self.step + 1, moment
            self._draw_slot()
        self.taken = None
        if self.slot is not None:
            # Now, since the forward or the pipeline may write into what it was given.
            tensors: Tensors = {}
            self.taken = (*specs_of(args, kwargs, self.parameters, tensors), tensors)

    def _draw_slot(self) -> None:
        """A place for the step that begins, if it is drawn."""
        self.slot = None
        place = self.step if self.step < self.steps else self.draw.randrange(self.step + 1)
        if place < self.steps:
            self.slot = []
            self.kept[place : place + 1] = [self.slot]

    def _answered(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        # In every step: what is made of such an answer is no input either.
        given = answer_of(output)
        for tensor in tree_leaves(given):
            if not torch.isfinite(tensor).all():
                raise NotFiniteError(
                    f"{self.call}: the {type(module).__name__} answers with values that are not finite at denoising "
                    f"step {self.step}, in {tensor.dtype}; expected numbers, that a model can learn from"
                )
        if self.slot is not None and self.taken is not None:
            arguments, by_name, tensors = self.taken
            answer = to_spec(given, tensors, "the denoiser's answer")
            self.slot.append((self.step, arguments, by_name, answer, tensors))
