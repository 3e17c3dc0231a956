"""What the training tests share."""

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler

from training.tiny_run import make_data, make_supernet, make_teacher


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps process-wide state, such as the precision; no test may inherit it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def make_accelerator(tmp_path):
    def make(**options):
        return Accelerator(cpu=True, project_dir=tmp_path, **options)

    return make


@pytest.fixture
def teacher():
    return make_teacher()


@pytest.fixture
def supernet():
    return make_supernet()


@pytest.fixture
def noise_scheduler():
    return DDPMScheduler(num_train_timesteps=100)


@pytest.fixture
def data():
    return make_data()
