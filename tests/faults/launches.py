"""The runs that are killed, one for each way in which a run can go."""

import os

from faults.harness import Launch

STEPS = 6
TINY = {
    "sizes": "0.6 1.0",
    "seed": 10,  # of which both sizes are drawn
    "max_train_steps": STEPS,
    "train_batch_size": 2,
    "importance_samples": 2,
    "correction_samples": 0,
    "validation_samples": 2,
    "validation_steps": 3,
    "lr_warmup_steps": 0,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "learning_rate": 1e-3,
    # Adam divides by the gradient's size; the epsilon keeps rounding from counting where there is next to no gradient.
    "adam_epsilon": 1e-4,
}


def words_of(options):
    return [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]


def pixels(originals, processes=1, sharded=False, **changes):
    """`compress_ddpm.py` on a folder of images."""
    data = {"pretrained_model_name_or_path": originals / "ddpm", "train_data_dir": originals / "images"}
    options = {**data, **TINY, "num_validation_images": 0, **changes}
    return Launch("compress_ddpm.py", words_of(options), processes, sharded)


def stream(originals):
    """`compress_sd.py` on shards."""
    data = {"pretrained_model_name_or_path": originals / "sd", "train_data_dir": originals / "shards"}
    data |= {"image_column": "png", "caption_column": "txt", "shuffle_buffer_size": 3, "resolution": 16}
    words = [*words_of({**data, **TINY, "validation_fraction": 0.1}), "--streaming"]
    return Launch("compress_sd.py", words)


def recordings(originals, **changes):
    """`compress_any.py` on what a pipeline's own calls gave."""
    data = {"pretrained_model_name_or_path": originals / "ddpm", "calls_file": originals / "calls.jsonl"}
    data |= {"recordings_dir": originals / f"recordings-{os.getpid()}", "steps_per_call": 2}
    return Launch("compress_any.py", words_of({**data, **TINY, **changes}))


# What is killed, and must end bit for bit as what was never killed.
LAUNCHES = {
    "float32": pixels,
    "bfloat16": lambda originals: pixels(originals, mixed_precision="bf16"),
    "images drawn": lambda originals: pixels(originals, num_validation_images=1, validation_inference_steps=2),
    "correction": lambda originals: pixels(originals, correction_samples=2),
    "AdamW": lambda originals: pixels(originals, optimizer="adamw"),
    "accumulation": lambda originals: pixels(originals, gradient_accumulation_steps=2),
    "workers": lambda originals: pixels(originals, dataloader_num_workers=1),
    "stream": stream,
    "recordings": recordings,
    "two processes": lambda originals: pixels(originals, processes=2),
    "FSDP": lambda originals: pixels(originals, processes=2, sharded=True, optimizer="adamw"),
}
