import pytest
import torch

from training.test_train import run  # noqa: F401
from training.tiny_run import make_supernet, make_teacher


def spoil(model, rows=slice(-1, None)):
    with torch.no_grad():
        model.down_blocks[0].resnets[0].conv1.weight[rows] = float("nan")
    return model


def test_a_validation_loss_that_is_no_number_stops_and_names_the_size(run, tmp_path):  # noqa: F811
    supernet = make_supernet()
    spoil(supernet.model)  # what the smaller sizes do not use
    with pytest.raises(RuntimeError, match="the validation loss of size 1 at step 0 is nan"):
        run(supernet)
    with pytest.raises(RuntimeError, match="the teacher's validation loss is nan"):
        run(teacher=spoil(make_teacher()))
