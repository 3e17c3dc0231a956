"""The short form of benchmarks/soak.py: changes of size leave nothing behind, and a copy is as good as its original."""

import pytest
import soak


@pytest.fixture(scope="module", params=soak.DENOISERS)
def folder(request, tmp_path_factory):
    """Where the checkpoint of a tiny pipeline lies."""
    place = tmp_path_factory.mktemp("soak")
    soak.make_pipeline(request.param, place)
    return place


def test_changes_of_size_leave_nothing_behind_and_every_size_as_it_was(folder):
    pipeline = soak.load(folder)
    assert any(0 in subnet.widths.values() for subnet in pipeline.subnets)  # branches come and go
    soaked = soak.soak(pipeline, switches=300, image_every=15)
    assert (soaked.images, soaked.differing) == (20, 0)
    assert soaked.after.tensors <= soaked.before.tensors
    assert soaked.after.objects - soaked.before.objects < 27  # a tenth of the changes that were counted


def test_two_threads_at_different_sizes_get_what_one_gets(folder):
    assert soak.sampled_in_threads(soak.load(folder), rounds=10)


@pytest.mark.parametrize("way", soak.ways())
def test_a_copy_gives_the_same_at_every_size_and_leaves_the_original_alone(folder, tmp_path, way):
    assert soak.is_faithful(soak.load(folder), tmp_path, way)


def test_a_cast_does_not_depend_on_the_size_that_is_set(folder):
    assert soak.is_cast_as_a_whole(soak.load(folder))
