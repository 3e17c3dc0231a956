"""What a pipeline's folder from a stranger must be, before anything of it is loaded.

diffusers and transformers load what a folder names. Here it is made sure that this is code of installed libraries,
weights in safetensors and no pickle, and no more memory than these weights have themselves.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ofadiff.reading.files import check_files
from ofadiff.reading.json_file import check_object, is_kind, read_object, shown
from ofadiff.reading.names import check_variant
from ofadiff.reading.stumbles import in_one_sentence
from ofadiff.reading.tensors import Stored, read_header
from ofadiff.storage.files import weight_files
from ofadiff.storage.pipeline_index import INDEX_NAME, components_in, read_index

# What is imported because a folder names it; anything else has to be imported already.
LIBRARIES = ("diffusers", "transformers", "ofadiff")

# Weights that would be unpickled, or are of other frameworks.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")

# How transformers calls the file of weights.
TRANSFORMERS_WEIGHTS = "model.safetensors"

# Configuration files that libraries read in a component's folder.
CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")

# Keys there that name an implementation; transformers fetches one that is the name of a repository, and runs it.
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")

MOST_TIMESTEPS = 1_000_000

# What a model may have beside its weights: values that a class has and older files have not, and, in bytes, tables
# that are computed, such as those of positions.
NEW_VALUES, TABLES = 2**20, 2**28

# Modules and parameters that a model may have for one stored tensor, and for none.
MODULES_PER_TENSOR, MODULES, MOST_MODULES = 16, 20_000, 200_000

# Weights that are tied are stored once; quantized ones hold up to two values a byte.
TIED, QUANTIZED = 2, 8


def check_pipeline(
    folder: str | Path, variant: str | None = None, passed: Collection[str] = (), own_class: bool = False
) -> None:
    """Checks a pipeline's folder before it is loaded.

    Args:
        folder: The pipeline's.
        variant: Variant of the weight files that is going to be loaded.
        passed: Components that are not loaded from it.
        own_class: The user has said where the pipeline's class is; the folder may name any.

    Raises:
        FileNotFoundError: If a model has no weights.
        ValueError: If a class is no installed library's, weights are no safetensors, are damaged or do not fit their
            configuration, a configuration is none or asks for more than the weights hold, or what would be read is a
            pipe or a device.
        ImportError: If a library that it needs is not installed.
    """
    check_variant(variant)
    folder = Path(folder)
    index = read_index(folder)
    check_no_code(folder, own_class)
    for name, (library, class_name) in components_in(index).items():
        if name in passed:
            continue
        cls = _class_of(folder, name, library, class_name)
        own = folder / name if (folder / name).is_dir() else folder
        if own != folder:
            check_files(own)
        _check_configs(own, class_name)
        if cls is None:
            continue
        if issubclass(cls, diffusers.DiffusionPipeline):
            if own == folder:
                raise ValueError(f"{folder} names the pipeline {class_name} for its {name}, and has no such folder")
            check_pipeline(own, variant)
        elif issubclass(cls, diffusers.SchedulerMixin):
            _check_scheduler(own, cls)
        elif issubclass(cls, nn.Module):
            check_model(own, cls, variant)


def check_no_code(folder: str | Path, own_class: bool = False) -> None:
    """Checks that a pipeline folder names classes of libraries alone, so that loading it runs no code of it.

    Args:
        folder: The pipeline's.
        own_class: The user has said where the pipeline's class is; the folder may name any.

    Raises:
        ValueError: If its class, or a component's, is in a Python file of the folder, or in a module that nobody has
            imported.
    """
    folder = Path(folder)
    index = read_index(folder)
    if not own_class:
        named = index["_class_name"]
        module = named[0] if isinstance(named, list) and named else named
        if not isinstance(named, str) or (folder / f"{module}.py").is_file():
            raise ValueError(
                f"the pipeline of {folder} is in {folder / str(module)}.py; code of a checkpoint is not run"
            )
    for name, (library, _) in components_in(index).items():
        if (folder / name / f"{library}.py").is_file():
            raise ValueError(
                f"the {name} of {folder} is in {folder / name / library}.py; code of a checkpoint is not run"
            )
        if library not in LIBRARIES and not _is_pipeline_module(library) and library not in sys.modules:
            raise ValueError(
                f"{folder / INDEX_NAME} names the module {library!r} for its {name}, which is not imported; "
                f"{', '.join(LIBRARIES)} and diffusers' pipelines are, import another one first if you trust it"
            )


def _is_pipeline_module(library: str) -> bool:
    return library.isidentifier() and find_spec(f"diffusers.pipelines.{library}") is not None


def _class_of(folder: Path, name: str, library: str, class_name: str) -> Any:
    """The class of a component; None where it is no class that holds weights or timesteps."""
    module = f"diffusers.pipelines.{library}" if _is_pipeline_module(library) else library
    try:
        found = getattr(importlib.import_module(module), class_name, None)
    except ModuleNotFoundError as error:
        raise ImportError(f"the {name} of {folder} needs {error.name}: pip install {error.name}") from error
    if found is None and not class_name.endswith("FeatureExtractor"):  # those got other names in transformers
        raise ValueError(
            f"{folder / INDEX_NAME} names {class_name} of {library} for its {name}, which it does not have"
        )
    if found is not None and not inspect.isclass(found) and library in LIBRARIES:
        raise ValueError(f"{folder / INDEX_NAME} names {class_name} of {library} for its {name}, which is no class")
    cls = found if inspect.isclass(found) else None
    own = library not in LIBRARIES and not _is_pipeline_module(library)
    if own and (cls is None or not issubclass(cls, (nn.Module, diffusers.ConfigMixin))):
        raise ValueError(
            f"{folder / INDEX_NAME} names {class_name} of {library} for its {name}, which is no model and nothing of "
            "diffusers' kind"
        )
    return cls


def _check_configs(folder: Path, class_name: str) -> None:
    """Raises ValueError if a component's configuration is no JSON object, or names code."""
    for name in CONFIGS:
        if not (folder / name).is_file():
            continue
        values = read_object(folder / name)
        if class_name.startswith("Auto") and "auto_map" in values:
            raise ValueError(
                f"{folder / name} has an auto_map, code for a {class_name}; code of a checkpoint is not run"
            )
        for entry in _objects(values):
            for key in IMPLEMENTATIONS:
                if "/" in str(entry.get(key)):
                    raise ValueError(
                        f"{folder / name} has the {key} {shown(entry[key])}, code of a repository; it is not run"
                    )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter_config.json, which names another model; merge the adapter first")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value, itself included."""
    if isinstance(value, dict):
        yield value
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(entry)


def _check_scheduler(folder: Path, cls: Any) -> None:
    """Raises ValueError if a scheduler's tables would be longer than any are, or its configuration makes none."""
    path = folder / "scheduler_config.json"
    if not path.is_file():
        return
    values = read_object(path)
    steps = values.get("num_train_timesteps", 1)
    if not (is_kind(steps, int) and 1 <= steps <= MOST_TIMESTEPS):
        raise ValueError(
            f"{path} has the num_train_timesteps {shown(steps)}; it must be a whole number from 1 to {MOST_TIMESTEPS}"
        )
    for name, value in values.items():  # lengths of other lists, such as the order of a solver
        if is_kind(value, int) and abs(value) > MOST_TIMESTEPS:
            raise ValueError(f"{path} has the {name} {shown(value)}; numbers there are at most {MOST_TIMESTEPS}")
    with in_one_sentence(f"{path} does not make a {cls.__name__}"):
        cls.from_config(values)


def check_model(folder: str | Path, cls: Any, variant: str | None = None) -> None:
    """Checks a model's folder before it is loaded: its weights are safetensors, whole, and what its configuration says.

    The model is built on the meta device, where it takes no memory, and compared with the files' headers.

    Args:
        folder: The model's.
        cls: Its class, of diffusers or transformers.
        variant: Variant of the weight files, such as `"fp16"`; without files of it there, the plain ones count.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If they are no safetensors, one is damaged, or the configuration is none, or asks for other shapes
            or more than the weights hold.
    """
    folder = Path(folder)
    stored = stored_tensors(folder, cls, variant)
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    check_object(config, str(folder / "config.json"), {}, {"quantization_config": dict})
    model = empty_model(folder, cls, MODULES_PER_TENSOR * len(stored) + MODULES)
    named = dict(model.state_dict())
    held = sum(math.prod(each.shape) for each in stored.values())
    quantized = config.get("quantization_config") is not None
    if not quantized:
        for name, tensor in named.items():
            if name in stored and tuple(tensor.shape) != stored[name].shape:
                raise ValueError(
                    f"{folder / 'config.json'} asks for a {name} of shape {tuple(tensor.shape)}; in the weights it has "
                    f"{stored[name].shape}"
                )
            if name in stored and stored[name].is_whole and tensor.is_floating_point():
                raise ValueError(
                    f"the weights in {folder} have a {name} of {stored[name].dtype}; it must be of floating-point "
                    "numbers, such as F32"
                )
    asked = sum(parameter.numel() for parameter in model.parameters())
    share = QUANTIZED if quantized else 1 if issubclass(cls, diffusers.ModelMixin) else TIED
    if asked > share * held + NEW_VALUES:
        raise ValueError(
            f"{folder / 'config.json'} asks for {asked:,} parameters; the weights beside it hold {held:,}, so it is "
            "not theirs"
        )
    tables = sum(buffer.nbytes for buffer in model.buffers())
    if tables > 4 * held + TABLES:
        raise ValueError(
            f"{folder / 'config.json'} asks for tables of {tables:,} bytes; with weights of {held:,} values they may "
            f"have {4 * held + TABLES:,}"
        )


def stored_tensors(folder: Path, cls: Any, variant: str | None = None) -> dict[str, Stored]:
    """What the headers say of a model's stored tensors, by name; see `check_model`."""
    check_variant(variant)
    single = SAFETENSORS_WEIGHTS_NAME if issubclass(cls, diffusers.ModelMixin) else TRANSFORMERS_WEIGHTS
    own = variant if variant and any(folder.glob(f"*.{variant}*.safetensors")) else None
    try:
        files = weight_files(folder, own, single)
    except FileNotFoundError as error:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if not (pickles or others):
            raise
        reason = f"; {pickles[0]} is not opened: pickles run what is in them" if pickles else ""
        reason += f"; there is {others[0]}: is its variant meant?" if others and not own else ""
        raise ValueError(f"{error}{reason}") from error
    tensors: dict[str, Stored] = {}
    for file, keys in files.items():
        found = read_header(file)
        absent = [key for key in keys if key not in found]
        if absent:
            raise ValueError(f"{file} lacks {absent[0]}, which the index beside it names")
        tensors |= {key: found[key] for key in keys}
    return tensors


def empty_model(folder: Path, cls: Any, most: int = MOST_MODULES) -> Any:
    """A model of a folder's configuration on the meta device, without weights.

    Args:
        folder: The model's.
        cls: Its class, of diffusers or transformers.
        most: Modules and parameters that it may have; no more are made.

    Raises:
        ValueError: If the configuration makes no such model.
    """
    try:
        with torch.device("meta"), _at_most(most):
            if issubclass(cls, diffusers.ModelMixin):
                model: Any = cls
                return model.from_config(model.load_config(folder))
            return cls(cls.config_class.from_pretrained(folder))
    except Exception as error:  # constructors raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder / 'config.json'} does not make a {cls.__name__}: {reason}") from error


@contextmanager
def _at_most(parts: int) -> Iterator[None]:
    """A block in which models of more modules and parameters than this are an error as soon as they have them."""
    count = 0

    def counted(module: nn.Module, name: str, part: Any) -> None:
        nonlocal count
        count += 1
        if count > parts:
            raise ValueError(f"it asks for more than {parts} modules and parameters")

    hooks = [
        register(counted)
        for register in (register_module_module_registration_hook, register_module_parameter_registration_hook)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forbid_pickles(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if somebody asks for weights that are pickled."""
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False: pickles are not opened, weights have to be safetensors")
