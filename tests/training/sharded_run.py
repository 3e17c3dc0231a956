"""A short training run under FSDP, and once more from its checkpoint: `sharded_run.py FOLDER` on several processes."""

import functools
import json
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor

from ofadiff.denoisers.prepare import prepare_pixels
from ofadiff.training.sharding import is_sharded, shard
from ofadiff.training.validation import averaged_weights
from training.fsdp_on_cpu import make_sharded_accelerator
from training.larger_than_a_card import MODELS, go_through
from training.tiny_run import make_data, make_supernet, make_teacher, train_with

OPTIONS = {"max_train_steps": 3, "checkpointing_steps": 2, "validation_steps": 1, "validation_samples": 8}


def run(accelerator, output_dir, **options):
    """A supernet trained for a few steps, and what `train` says of it."""
    supernet = make_supernet()
    supernet.model.enable_gradient_checkpointing()
    # Adam divides by the gradient's size; the epsilon keeps rounding from counting where there is next to no gradient.
    optimizer = torch.optim.AdamW(supernet.model.parameters(), lr=1e-3, eps=1e-4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=10)
    prepare = functools.partial(prepare_pixels, noise_scheduler=DDPMScheduler(num_train_timesteps=100))

    settings = {
        **OPTIONS,
        "feature_distill_weight": 0.1,
        "output_dir": output_dir,
        "teacher": make_teacher(),
        **options,
    }
    return supernet, train_with(supernet, make_data(), prepare, optimizer, lr_scheduler, accelerator, **settings)


def check_averages_are_taken_and_given_back(accelerator):
    """No forward may go on with weights that were put together before the shards were written to."""
    supernet = make_supernet()
    optimizer = torch.optim.SGD(supernet.model.parameters())
    model, _ = accelerator.prepare(supernet.model, optimizer)
    weights = list(model.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)
    ema = EMAModel([0.5 * shard(weight).detach() for weight in weights])
    image, step = torch.ones(1, 1, 8, 8), torch.tensor([3])

    @torch.no_grad()
    def predict(model):
        return model(image, step, class_labels=torch.tensor([1])).sample

    expected = predict(make_supernet().model)
    with averaged_weights(ema, weights, model):
        assert (predict(model) - expected).abs().max() > 0.01
    torch.testing.assert_close(predict(model), expected)
    with averaged_weights(ema, weights, model):
        assert (predict(model) - expected).abs().max() > 0.01


def main(folder):
    for name, resume_from in {"whole": None, "resumed": folder / "whole" / "checkpoint-2"}.items():
        # The second run shards no weights between forward and backward, only gradients and moments: as ZeRO 2 does.
        accelerator = make_sharded_accelerator(resume_from is None, gradient_accumulation_steps=2)
        options = {"train_batch_size": 2, "resume_from": resume_from, "offload_ema": resume_from is not None}
        supernet, result = run(accelerator, folder / name, **options)
        assert is_sharded(accelerator)
        supernet.save_pretrained(folder / name / "unet", is_main_process=accelerator.is_main_process)
        if accelerator.is_main_process:
            (folder / name / "history.json").write_text(json.dumps(result.history))
        accelerator.free_memory()
    check_averages_are_taken_and_given_back(accelerator)
    for name, (_, blocks) in MODELS.items():
        accelerator.free_memory()
        accelerator = make_sharded_accelerator(blocks=blocks)
        found = go_through(accelerator, name, folder / name)
        (folder / f"{name}-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
