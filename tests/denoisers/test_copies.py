import pytest
import torch
from conftest import make_unet
from tiny_transformers import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from ofadiff.denoisers.copies import copy_in


class Allocated(TorchDispatchMode):
    """Bytes of float32 that operations make."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        fresh = isinstance(made, torch.Tensor) and "detach" not in str(function) and "alias" not in str(function)
        if fresh and made.dtype is torch.float32:
            self.bytes += made.nbytes
        return made


@pytest.mark.parametrize("name", ["sd15", "WanTransformer3DModel", "FluxTransformer2DModel"])
def test_a_copy_is_never_made_in_full_precision(name):
    model = make_unet(name) if name == "sd15" else tiny(name)
    kept = set(model._keep_in_fp32_modules or [])
    with Allocated() as allocated:
        copy = copy_in(model, torch.bfloat16)
    in_float32 = [name for name, parameter in copy.named_parameters() if parameter.dtype is torch.float32]
    assert all(set(name.split(".")) & kept for name in in_float32) and bool(in_float32) == bool(kept)
    assert allocated.bytes <= sum(copy.get_parameter(name).nbytes for name in in_float32)
    for (name, parameter), ours in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert parameter.dtype is torch.float32 and torch.equal(parameter.to(ours.dtype), ours), name
        assert parameter.data_ptr() != ours.data_ptr()
    assert type(copy) is type(model) and copy.config == model.config
