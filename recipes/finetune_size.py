"""Heals one size of an OFA checkpoint: trains a LoRA for it, or all weights of its extracted subnet.

    accelerate launch recipes/finetune_size.py --pretrained_model_name_or_path OFA_DIR --size 0.5 --lora_rank 16 \
        --train_data_dir IMAGES --output_dir OFA_DIR

puts the LoRA into `OFA_DIR/unet/ofa_adapters/0.5`, beside weights that stay what they are: setting that size activates
it, extracting that size merges it, no other size sees it. Without `--lora_rank`, `--output_dir` becomes a plain
pipeline folder of the subnet, as `recipes/extract.py` makes one, trained further. The checkpoint at full size teaches.
Takes what `compress_ddpm.py` and `compress_sd.py` make.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import compress_ddpm
import compress_sd
import torch
from accelerate import Accelerator, DistributedType
from compression_run import (
    POSITIVE,
    PRECISIONS,
    AddTo,
    Setup,
    begin,
    cannot_load,
    common_parser,
    count,
    joint_run,
    loss_table,
    run_recipe,
    save_around,
    size,
    size_table,
    upload,
)
from diffusers import ModelMixin

from ofadiff import find_channel_groups
from ofadiff.adapters.size_adapter import SizeAdapter, adapter_folder, load_size_adapter, save_size_adapter
from ofadiff.basis.change import load_basis
from ofadiff.channels import ChannelGroup
from ofadiff.denoisers.families import FAMILIES
from ofadiff.denoisers.prepare import Prepare
from ofadiff.evaluation.image_protocol import digest_of_weights
from ofadiff.extraction.subnet import extract
from ofadiff.layers import is_adaptable
from ofadiff.sizes import CONFIG_NAME, SizeTable
from ofadiff.storage.ofa_config import denoiser_class, read_ofa_config
from ofadiff.storage.pipeline_folder import find_denoiser, local_folder
from ofadiff.training.checkpoint import DENOISER, check_same_run, find_checkpoint
from ofadiff.training.single_size import SingleSize
from ofadiff.training.train import TrainingResult, run_values

# The flags that only one kind of checkpoint has.
PIXELS, TEXT_TO_IMAGE = "pixel checkpoints only", "text-to-image checkpoints only"
FLAGS: dict[str, Callable[[AddTo], None]] = {PIXELS: compress_ddpm.add_flags, TEXT_TO_IMAGE: compress_sd.add_flags}


def finetune(args: argparse.Namespace) -> TrainingResult:
    """Trains one size of `args.pretrained_model_name_or_path`, into `args.output_dir`.

    Raises:
        ValueError: If something the user gave cannot work; before any training.
    """
    return train_and_save(args, set_up(args))


def set_up(args: argparse.Namespace) -> Setup:
    """Everything before training. Raises ValueError if something the user gave cannot work."""
    where = {"cache_dir": args.cache_dir, "revision": args.revision, "variant": args.variant}
    folder = local_folder(args.pretrained_model_name_or_path, where)
    args.pretrained_model_name_or_path = str(folder)
    if find_denoiser(folder) != "unet":
        raise ValueError(f"the denoiser of {folder} is its {find_denoiser(folder)}; this recipe takes a unet")
    args.size = SizeTable.from_dict(read_ofa_config(folder / "unet")).find(args.size).size
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.lora_rank else 2e-5
    check_output(args)
    check_teacher(args)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    text_to_image = index["_class_name"] in FAMILIES
    if args.validation_fraction is None:
        # What the recipe that made the checkpoint holds out by default: other images were trained on.
        recipe = compress_sd if text_to_image else compress_ddpm
        args.validation_fraction = recipe.make_parser().get_default("validation_fraction")
    if text_to_image:
        args.resolution = args.resolution or own_resolution(folder)
    accelerator = begin(run_arguments(args))
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}; one size is trained whole on every "
            "device: choose plain multi-GPU in `accelerate config`"
        )

    if text_to_image:
        check_flags_of(PIXELS, args, folder)
        plan = compress_sd.read_pipeline(args)
        setup = compress_sd.build(run_arguments(args), accelerator, plan, make_single_size)
    else:
        check_flags_of(TEXT_TO_IMAGE, args, folder)
        pipeline = compress_ddpm.load_pipeline(str(folder), args.cache_dir)
        setup = compress_ddpm.build(run_arguments(args), accelerator, pipeline, make_single_size)
    if args.teacher_model_name_or_path is None:
        return setup
    return replace(setup, teacher=load_teacher(args, denoiser_class(folder / "unet"), accelerator))


def train_and_save(args: argparse.Namespace, setup: Setup) -> TrainingResult:
    """Training, and the adapter or the pipeline folder that comes out of it."""
    text_to_image = type(setup.pipeline).__name__ in FAMILIES
    columns = len(args.validation_prompts or []) if text_to_image else args.num_validation_images
    result = joint_run(run_arguments(args), setup, columns)
    accelerator, model = setup.accelerator, setup.supernet.model
    folder, out = Path(args.pretrained_model_name_or_path), Path(args.output_dir)
    if accelerator.is_main_process:
        if args.lora_rank:
            if out.resolve() != folder.resolve():
                copy_pipeline(folder, out)
            save_size_adapter(SizeAdapter.from_model(model), out / "unet", args.size)
        else:
            save_around("unet", model, folder, out, args.variant)
        upload(args)
    accelerator.print(loss_table(result))
    what = f"has an adapter of size {args.size:g}" if args.lora_rank else f"is size {args.size:g}, a plain pipeline"
    accelerator.print(f"{out} {what}")
    accelerator.end_training()
    return result


def run_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of the training run: a LoRA's checkpoints, logs and samples go into a folder of their own."""
    folder = Path(args.output_dir) / f"finetune-{args.size:g}" if args.lora_rank else args.output_dir
    return argparse.Namespace(**{**vars(args), "output_dir": folder})


# Checks, before anything is loaded


def check_output(args: argparse.Namespace) -> None:
    """Raises ValueError unless what is to be trained can be made, and put where it shall be."""
    folder, out, run = Path(args.pretrained_model_name_or_path), Path(args.output_dir), run_arguments(args).output_dir
    if not args.lora_rank:
        if args.lora_alpha is not None or args.lora_target_modules is not None:
            raise ValueError("--lora_alpha and --lora_target_modules are for a LoRA; give its --lora_rank")
        if (out / "unet" / CONFIG_NAME).exists():
            raise ValueError(f"--output_dir {out} holds all sizes; give another folder for this one, or a --lora_rank")
        return
    if importlib.util.find_spec("peft") is None:
        raise ValueError("--lora_rank needs peft, which is not installed: pip install peft")
    resumed = find_checkpoint(run, args.resume_from_checkpoint) is not None
    if out.is_dir() and out.resolve() != folder.resolve() and not resumed and set(out.iterdir()) - {run}:
        raise ValueError(
            f"--output_dir {out} is not empty; give {folder} itself for the adapter, or a new folder for a copy "
            "with it; to add an adapter to a copy that has some, give the copy as --pretrained_model_name_or_path too"
        )
    existing = adapter_folder(folder / "unet", args.size)
    if existing.exists() and not (resumed or args.overwrite_output_dir):
        raise ValueError(f"size {args.size:g} has an adapter already, {existing}; replace it with --overwrite")


def check_teacher(args: argparse.Namespace) -> None:
    """Raises ValueError unless the teacher's UNet takes and gives what the checkpoint's does."""
    name = args.teacher_model_name_or_path
    if name is None:
        return
    stock = denoiser_class(Path(args.pretrained_model_name_or_path) / "unet")
    ours = stock.load_config(args.pretrained_model_name_or_path, subfolder="unet")
    try:
        theirs = stock.load_config(name, subfolder="unet", cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise cannot_load(name, f"a pipeline with a {stock.__name__}", error) from error
    for key in ("_class_name", "in_channels", "out_channels", "num_class_embeds", "cross_attention_dim"):
        if theirs.get(key) != ours.get(key):
            raise ValueError(f"the teacher's unet has {key} {theirs.get(key)}, the checkpoint's has {ours.get(key)}")


def check_flags_of(kind: str, args: argparse.Namespace, folder: Path) -> None:
    """Raises ValueError if flags of a kind of checkpoint were given that this one is not."""
    parser = argparse.ArgumentParser()
    FLAGS[kind](dict.fromkeys(("data", "training", "watching"), parser.add_argument))
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name) != default and name != "revision":  # of any checkpoint
            raise ValueError(f"--{name} is for {kind}; {folder} is none")


def own_resolution(folder: Path) -> int:
    """Side of the images that a text-to-image pipeline was made for, in pixels."""
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


# What is trained, and its teacher


def make_single_size(
    args: argparse.Namespace, unet: ModelMixin, train_data: object, prepare: Prepare, accelerator: Accelerator
) -> tuple[SingleSize, Path | None]:
    """The extracted size, with a LoRA in it if asked for; and the checkpoint to resume from."""
    directory = Path(args.pretrained_model_name_or_path) / "unet"
    table = SizeTable.from_dict(read_ofa_config(directory)).only(args.size)
    widths = table[0].widths
    groups = [group for group in find_channel_groups(unet) if group.name in widths]
    model = extract(unet, groups, widths, load_basis(directory))
    start = digest_of_weights(model)
    healed = None if args.lora_rank else load_size_adapter(directory, args.size)
    if healed is not None:
        healed.merge_into(model)
    if args.lora_rank:
        add_lora(args, model, groups)
    keys = ("size", "lora_rank", "lora_alpha", "lora_target_modules")
    single = SingleSize(model, table, groups, {"start": start, **{key: getattr(args, key) for key in keys}})

    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_same_run(checkpoint, run_values(accelerator, train_data, args.train_batch_size, args.seed, args.reweight))
        single.check(checkpoint / DENOISER)
        accelerator.print(f"Resuming from {checkpoint}")
    accelerator.print(size_table(single))
    return single, checkpoint


def add_lora(args: argparse.Namespace, model: ModelMixin, groups: Sequence[ChannelGroup]) -> None:
    """Freezes the extracted model and puts a LoRA into it, by default into every layer that the size has cut."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = args.lora_target_modules or cut_layers(model, groups)
    torch.manual_seed(args.seed)
    model.requires_grad_(False)
    empty = [name.rpartition(".")[0] for name, parameter in model.named_parameters() if not parameter.numel()]
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or args.lora_rank,
        target_modules=targets,
        exclude_modules=empty or None,  # dropped branches
    )
    inject_adapter_in_model(config, model)


def cut_layers(model: ModelMixin, groups: Sequence[ChannelGroup]) -> list[str]:
    """Names, within their blocks, of the linear maps and convolutions that lose channels: `conv1`, `to_q`, ….

    They are where a size differs from the full model, so where its loss can be made up for.
    """
    slices = ((group, part) for group in groups for part in group.slices)
    names = {
        part.module.removeprefix(f"{group.block}.")
        for group, part in slices
        if is_adaptable(model.get_submodule(part.module))
    }
    return sorted(names)


def load_teacher(args: argparse.Namespace, stock: type[ModelMixin], accelerator: Accelerator) -> ModelMixin:
    """The UNet of another pipeline, frozen, in the run's precision."""
    name = args.teacher_model_name_or_path
    try:
        precision = PRECISIONS[accelerator.mixed_precision]
        teacher = stock.from_pretrained(name, subfolder="unet", cache_dir=args.cache_dir, torch_dtype=precision)
    except (OSError, ValueError) as error:
        raise cannot_load(name, f"a pipeline with a {stock.__name__}", error) from error
    return teacher.requires_grad_(False)


def copy_pipeline(folder: Path, out: Path) -> None:
    """Copies a pipeline's components; `model_index.json` comes last, so a killed copy is none."""
    components = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for component in components:
        if (folder / component).is_dir():
            shutil.copytree(folder / component, out / component, dirs_exist_ok=True)
    shutil.copy2(folder / "model_index.json", out / "model_index.json")


def make_parser() -> argparse.ArgumentParser:
    """The command line; names as in diffusers' training examples where these have one."""
    parser, add_to = common_parser(
        "Heal one size of an OFA checkpoint with a LoRA, or fine-tune its extracted subnet.",
        "OFA checkpoint, as compress_ddpm.py and compress_sd.py make one: a folder or a hub name",
        "with --lora_rank the checkpoint itself, which gets the adapter, or a copy to make; without it the plain "
        "pipeline folder to make; what is made must be new or empty",
    )
    add = add_to["data"]
    add("--teacher_model_name_or_path", help="pipeline whose unet teaches; the checkpoint at full size by default")
    add("--train_data_dir", help="folder of images, as the recipe that made the checkpoint takes one")
    add("--resolution", type=count(1), help="side of the images in pixels; the model's own by default")
    add(
        "--overwrite",
        "--overwrite_output_dir",
        dest="overwrite_output_dir",
        action="store_true",
        help="replace the adapter of this size, or the result of an earlier run",
    )
    add = parser.add_argument_group("what is trained").add_argument
    add("--size", type=size_or_name, required=True, help="one of the checkpoint's sizes, or smallest, largest")
    add("--lora_rank", type=count(1), help="train a LoRA of this rank; by default all weights of the extracted subnet")
    add("--lora_alpha", type=POSITIVE, help="its scale times its rank; --lora_rank by default")
    add(
        "--lora_target_modules",
        nargs="+",
        help="ends of the names of the layers that get it; by default every linear map and convolution that sizes "
        "cut, which is where they differ from the full model",
    )
    add_to["training"](
        "--learning_rate",
        type=POSITIVE,
        help="of AdamW, after warm-up; by default 1e-4 for a LoRA, whose few weights begin without effect, and 2e-5 "
        "for a whole subnet, which joint training has left close to where it shall go",
    )
    for title, add_flags in FLAGS.items():
        add_flags(dict.fromkeys(("data", "training", "watching"), parser.add_argument_group(title).add_argument))
    parser.set_defaults(
        tracker_project_name="ofadiff-finetune",
        max_train_steps=20_000,
        reweight="uniform",  # of one size
        reweight_m=None,
        validation_fraction=None,
    )
    return parser


def size_or_name(text: str) -> float | str:
    """An argument type: a fraction in (0, 1], `smallest` or `largest`."""
    return text if text in ("smallest", "largest") else size(text)


if __name__ == "__main__":
    run_recipe(make_parser(), set_up, train_and_save)
