"""What recordings of Flux take on disk, and what training on them holds in memory; no weights of Flux are needed.

    python benchmarks/recording_sizes.py

First a Flux of 9 million parameters: what is computed from shapes, beside what is measured on files and on a training
step. Then what the same computations say of FLUX.1-dev, whose tensors are fake: they have shapes and no content.
"""

from __future__ import annotations

import math
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from denoisers import make_supernet
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from side_by_side import Comparison
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ofadiff.commands.command import main, script
from ofadiff.denoisers.flux import GUIDANCE_SCALE
from ofadiff.denoisers.prepare import prepare_recorded
from ofadiff.denoisers.recorded import answered_channels
from ofadiff.recordings.folder import DESCRIBED, Recordings, specs_of, write_call, write_description
from ofadiff.recordings.nested import Tensors, to_spec
from ofadiff.recordings.recorded_call import RecordedCall, parameters_of
from ofadiff.training.losses import predict, prediction_loss
from ofadiff.values import COUNT, Bundle, Range, one_of

# Pixels that a token of Flux has on a side: the VAE's 8, and 2 latents.
TOKEN = 16
SCALED_CALLS = 20
# Times that bfloat16 tells apart.
MOST_STEPS = 256
DTYPE = torch.bfloat16

# Of a recorded call, what differs from step to step; the rest is kept once for a call of the pipeline.
OF_A_STEP = ("hidden_states", "timestep", "answer")

# How forwards compute; weights are float32 in either.
PRECISIONS = {"no": "float32", "bf16": "bfloat16"}
# What no way of counting from outside sees: buffers that kernels have for themselves.
KERNELS = 0.05


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Recording(Bundle):
    """What is recorded of FLUX.1-dev."""

    calls: Annotated[int, COUNT] = 10_000
    """of the pipeline, one image each"""
    steps_per_call: Annotated[int, Parameter(validator=Range(1, MOST_STEPS, what="whole number"))] = 4
    """steps kept of each"""
    resolution: Annotated[int, Parameter(validator=Range(TOKEN, what="whole number"))] = 1024
    """height and width of the images in pixels, rounded down to a multiple of 16"""
    mixed_precision: Annotated[str, one_of(PRECISIONS)] = "bf16"
    """of the training's forwards: no or bf16"""


@dataclass(frozen=True)
class Row:
    """What is predicted and what is measured, in bytes.

    Attributes:
        what: The quantity.
        predicted: Out of shapes.
        measured: On files, or on a training step.
        within: How far they may be apart, relative to what is predicted.
    """

    what: str
    predicted: float
    measured: float
    within: float = 0.0

    @property
    def met(self) -> bool:
        """Whether they are as near as they have to be."""
        return abs(self.measured - self.predicted) <= self.within * self.predicted

    def __str__(self) -> str:
        ratio, bound = self.measured / self.predicted, f"within {self.within:.1%}" if self.within else "equal"
        sizes = f"{shown(self.predicted)} | {shown(self.measured)}"
        return f"| {self.what} | {sizes} | {ratio:.4f} | {bound}, {'met' if self.met else 'MISSED'} |"


@dataclass(frozen=True)
class Case:
    """A Flux and how it is called.

    Attributes:
        config: Of its `FluxTransformer2DModel`.
        text_tokens: Of a prompt, for T5.
        resolution: Height and width of the images, in pixels.
    """

    config: Mapping[str, Any]
    text_tokens: int
    resolution: int


# What a training has in memory, beside activations.
WEIGHTS, EMA, MOMENTS, GRADIENTS = "weights", "their average (EMA)", "AdamW's two moments", "gradients"
TEMPORARY = "AdamW's temporary, of all weights at once as on GPUs"

FLUX = {"guidance_embeds": True}
SCALED = {
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "axes_dims_rope": (4, 14, 14),
    "joint_attention_dim": 512,
    "pooled_projection_dim": 96,
    "guidance_embeds": True,
}


def compare(*, recording: Recording = Recording()) -> int:
    """Print both tables; the exit status is 1 if a prediction is not what was measured."""
    # The model warns of kernels that it cannot use in mixed precision.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    torch.manual_seed(0)
    scaled = Case(SCALED, 128, 256)
    rows = disk_rows(scaled, recording.steps_per_call) + memory_rows(scaled)
    print(f"The scaled model, {SCALED_CALLS} recorded calls of the pipeline, batch size 1:\n")
    print("| quantity | predicted | measured | ratio | bound |\n|---|---|---|---|---|", *rows, sep="\n")
    flux = Case(FLUX, 512, recording.resolution)
    print(f"\nFLUX.1-dev, {recording.resolution} pixels, batch size 1:\n\n| quantity | predicted |\n|---|---|")
    for what, size in flux_rows(flux, recording):
        print(f"| {what} | {shown(size)} |")
    return int(not all(row.met for row in rows))


def shown(count: float) -> str:
    """Bytes in decimal units."""
    power = min(int(math.log10(max(count, 1))) // 3, 3)
    return f"{count / 1000**power:.4g} {('B', 'kB', 'MB', 'GB')[power]}"


def tensors_of_call(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """What `FluxPipeline` in bfloat16 calls its transformer with, and the answer, drawn anew; of one image."""
    config: Any = model.config
    side = case.resolution // TOKEN
    latents = 1, side * side, config.in_channels
    return {
        "hidden_states": torch.randn(latents, dtype=DTYPE),
        "timestep": torch.rand(1).to(DTYPE),
        "guidance": torch.full([1], GUIDANCE_SCALE),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=DTYPE),
        "encoder_hidden_states": torch.randn(1, case.text_tokens, config.joint_attention_dim, dtype=DTYPE),
        "txt_ids": torch.zeros(case.text_tokens, 3, dtype=DTYPE),
        "img_ids": torch.randint(side, (side * side, 3)).to(DTYPE),
        "answer": torch.randn(latents, dtype=DTYPE),
    }


def write_recording(folder: Path, case: Case, calls: int, steps: int) -> Recordings:
    """Recorded calls of random content, written as `ofadiff.record` does."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**case.config)
    parameters = parameters_of(model)
    description = {**dict.fromkeys(DESCRIBED), "parameters": list(parameters), "dtype": str(DTYPE)}
    write_description(folder, {**description, "calls": [None] * calls})
    for number in range(calls):
        call, entries = tensors_of_call(case, model), []
        for step in range(steps):
            again = tensors_of_call(case, model)
            call |= {name: again[name] for name in OF_A_STEP}
            # Drawn ones may be equal, and would be kept once.
            call["timestep"] = torch.full([1], 1 - step / steps, dtype=DTYPE)
            named = {name: value for name, value in call.items() if name != "answer"}
            named |= {"joint_attention_kwargs": {}, "return_dict": False}
            tensors: Tensors = {}
            specs = specs_of((), named, parameters, tensors)
            entries.append((step, *specs, to_spec((call["answer"],), tensors, "the answer"), tensors))
        write_call(folder, number, entries)
    return Recordings(folder)


def bytes_of_call(case: Case, steps: int) -> tuple[int, int]:
    """Bytes of the tensors of one call of the pipeline, out of their shapes: those of all its steps, and the others."""
    with torch.device("meta"):
        tensors = tensors_of_call(case, FluxTransformer2DModel(**case.config))
    of_steps = steps * sum(tensors[name].nbytes for name in OF_A_STEP)
    return of_steps, sum(tensor.nbytes for name, tensor in tensors.items() if name not in OF_A_STEP)


def disk_rows(case: Case, steps: int) -> list[Row]:
    """Predicted and measured bytes on disk."""
    of_call = sum(bytes_of_call(case, steps))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as many:
        header = write_recording(Path(one), case, 1, steps).bytes - of_call
        recordings = write_recording(Path(many), case, SCALED_CALLS, steps)
        read = 0
        for number in range(SCALED_CALLS):
            calls = recordings[number * steps : (number + 1) * steps]
            found = tree_leaves([[call.kwargs, list(call.answer)] for call in calls])
            contents = {(t.dtype, t.shape, bytes(t.view(torch.uint8).numpy())) for t in found if isinstance(t, Tensor)}
            read += sum(len(content) for _, _, content in contents)
        predicted = SCALED_CALLS * of_call
        return [
            Row("disk: tensors", predicted, read),
            # Names of tensors are digests; their order decides how many digits the offsets have.
            Row("disk: files, headers too", predicted + SCALED_CALLS * header, recordings.bytes, within=0.001),
        ]


class Ledger(TorchDispatchMode):
    """Counts the bytes of what is made in a block, of real or fake tensors; a storage counts once.

    Attributes:
        now: Bytes of what was made and is still there.
        most: The most that `now` was.
        saved: Bytes by storage that a forward keeps for its backward, of what was made in the block.
        copies: Which of these are copies of the weights in another precision.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {storage_of(parameter) for parameter in model.parameters()}
        self.now = self.most = 0
        self.there: set[int] = set()
        self.saved: dict[int, int] = {}
        self.copies: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a fake tensor is asked for its device
            return out
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor, func is torch.ops.aten._to_copy.default and storage_of(args[0]) in self.weights)
        return out

    def _see(self, tensor: Tensor, is_copy: bool) -> None:
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key in self.there or key in self.weights:
            return
        self.there.add(key)
        if is_copy:
            self.copies.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.there.discard(key)
        self.copies.discard(key)
        self.now -= size

    def keep(self, tensor: Tensor) -> Tensor:
        """Notes a tensor that autograd keeps, which so stays until the backward."""
        if storage_of(tensor) in self.there:
            self.saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor


def storage_of(tensor: Tensor) -> int:
    """The same for tensors that share their memory, as long as it is there."""
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Held:
    """Bytes that a forward and backward hold beside what stays from step to step.

    Attributes:
        activations: Kept by the forward for the backward.
        copies: Of the weights, in the precision of the forward, kept too.
        most: Most that was held at once in both, gradients included.
    """

    activations: int
    copies: int
    most: int


def make_call(case: Case, model: nn.Module) -> RecordedCall:
    """One recorded call, as a batch of one has it."""
    tensors = tensors_of_call(case, model)
    answer = (tensors.pop("answer"),)
    kwargs = {**tensors, "joint_attention_kwargs": {}, "return_dict": False}
    return RecordedCall((), kwargs, answer, parameters_of(model), DTYPE)


def loss_of(model: nn.Module, call: RecordedCall, autocast: bool) -> Tensor:
    """The loss of a step of `ofadiff.training.train` on recordings."""
    (inputs,) = prepare_recorded({"parts": [call]}, answered_channels(model.config))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = predict(model, inputs)
    return prediction_loss(prediction, inputs).mean()


def held(model: nn.Module, call: RecordedCall, autocast: bool) -> Held:
    """What a forward and a backward hold."""
    with Ledger(model) as ledger:
        with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor):
            loss = loss_of(model, call, autocast)
        copies = sum(size for key, size in ledger.saved.items() if key in ledger.copies)
        loss.backward()
    model.zero_grad()
    return Held(sum(ledger.saved.values()) - copies, copies, ledger.most)


@contextmanager
def checkpointed(model: Any, on: bool) -> Iterator[None]:
    """A block in which a model saves memory, or not."""
    if on:
        model.enable_gradient_checkpointing()
    yield
    model.disable_gradient_checkpointing()


def each_way(model: nn.Module, precisions: Iterable[str], measure: Callable[[bool], Any]) -> dict[str, Any]:
    """Something by precision and gradient checkpointing; it is told whether autocast is on."""
    found = {}
    for precision in precisions:
        for checkpointing in (False, True):
            with checkpointed(model, checkpointing):
                way = f"{PRECISIONS[precision]}{', gradient checkpointing' if checkpointing else ''}"
                found[way] = measure(precision == "bf16")
    return found


def predict_memory(case: Case, precisions: Iterable[str]) -> tuple[dict[str, int], dict[str, Held]]:
    """Bytes of weights and what has their shape, and what a forward and backward hold, out of shapes alone."""
    with FakeTensorMode():
        model = FluxTransformer2DModel(**case.config).train()
        call = make_call(case, model)
        ways = each_way(model, precisions, lambda autocast: held(model, call, autocast))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # AdamW counts the steps of each parameter in 4 bytes.
    moments = 2 * weights + 4 * len(list(model.parameters()))
    return {WEIGHTS: weights, EMA: weights, MOMENTS: moments, GRADIENTS: weights, TEMPORARY: weights}, ways


def memory_rows(case: Case) -> list[Row]:
    """Predicted and measured bytes in memory; the steps are those of a supernet at its largest size."""
    supernet = make_supernet(FluxTransformer2DModel(**case.config), (0.5, 1.0))
    supernet.set_size(1.0)
    model = supernet.model.train()
    call = make_call(case, model)
    stays, ways = predict_memory(case, PRECISIONS)
    rows = [Row(f"memory: {name}", stays[name], size) for name, size in measured_step(model, call).items()]
    comparison = Comparison(torch.device("cpu"), quick=True, rounds=1)

    def step(autocast: bool) -> None:
        loss_of(model, call, autocast).backward()
        model.zero_grad()

    found = each_way(model, PRECISIONS, lambda autocast: held(model, call, autocast))
    peaks = each_way(model, PRECISIONS, lambda autocast: comparison.peak_memory([model], lambda: step(autocast)))
    for way, expected in ways.items():
        rows.append(Row(f"activations: {way}", expected.activations, found[way].activations))
        if expected.copies:
            rows.append(Row(f"bfloat16 copies of weights: {way}", expected.copies, found[way].copies))
        # The profiler counts all that the allocator gives.
        at_once = peaks[way] - stays[WEIGHTS]
        rows.append(Row(f"at most in forward and backward: {way}", expected.most, at_once, KERNELS))
    return rows


def measured_step(model: nn.Module, call: RecordedCall) -> dict[str, int]:
    """Bytes of what a real training step on the CPU leaves and needs, by name."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, foreach=True)
    average = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, power=3 / 4, foreach=True)
    for _ in range(2):
        loss_of(model, call, autocast=False).backward()
        gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        with Ledger(model) as ledger:
            optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
    return {
        WEIGHTS: sum(parameter.nbytes for parameter in parameters),
        EMA: sum(weight.nbytes for weight in average.shadow_params),
        MOMENTS: sum(tensor.nbytes for each in optimizer.state.values() for tensor in each.values()),
        GRADIENTS: gradients,
        TEMPORARY: ledger.most,
    }


def flux_rows(case: Case, recording: Recording) -> list[tuple[str, float]]:
    """Predicted bytes for the real model."""
    of_steps, of_call = bytes_of_call(case, recording.steps_per_call)
    with tempfile.TemporaryDirectory() as folder:
        file = write_recording(Path(folder), case, 1, recording.steps_per_call).bytes
    rows: list[tuple[str, float]] = [
        (f"disk: one call of the pipeline, {recording.steps_per_call} steps", file),
        ("disk: of it latents, answers and times", of_steps),
        ("disk: of it text, guidance and places, once for all steps", of_call),
        (f"disk: {recording.calls} calls", recording.calls * file),
    ]
    stays, ways = predict_memory(case, [recording.mixed_precision])
    rows += [(f"memory: {name}", size) for name, size in stays.items()]
    kept = stays[WEIGHTS] + stays[EMA] + stays[MOMENTS]
    for way, expected in ways.items():
        rows.append((f"activations: {way}", expected.activations))
        if expected.copies:
            rows.append((f"bfloat16 copies of weights: {way}", expected.copies))
        rows.append((f"at most in forward and backward: {way}", expected.most))
        rows.append((f"a step in all: {way}", kept + max(expected.most, stays[GRADIENTS] + stays[TEMPORARY])))
    return rows + [(f"not held with recordings: {name}", size) for name, size in spared(case).items()]


def spared(case: Case) -> dict[str, int]:
    """Bytes in bfloat16 of what training on images holds besides: the teacher, the text encoders and the VAE."""
    t5 = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        models = {
            "the teacher in bfloat16": FluxTransformer2DModel(**case.config),
            "T5 in bfloat16": T5EncoderModel(t5),
            "CLIP in bfloat16": CLIPTextModel(clip),
            "the VAE in bfloat16": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        }
    return {name: 2 * sum(each.numel() for each in model.parameters()) for name, model in models.items()}


if __name__ == "__main__":
    sys.exit(main(script(compare, __file__)))
