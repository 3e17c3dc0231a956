import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ofadiff.evaluation.metrics.feature_statistics import FeatureStatistics
from ofadiff.evaluation.metrics.fid import frechet_distance

DESCRIBED = {"extractor": "tiny", "resize": "none", "resolution": "16x16"}


@pytest.fixture
def features():
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def test_statistics_are_those_of_numpy(features):
    found = FeatureStatistics.of(features)
    np.testing.assert_allclose(found.mean, features.double().numpy().mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False))
    assert FeatureStatistics.of(features[:, :1]).covariance.shape == (1, 1)
    with pytest.raises(ValueError, match="there are 1 samples; a covariance takes at least 2"):
        FeatureStatistics.of(features[:1])


def test_a_file_gives_the_distance_that_the_images_give(features, tmp_path):
    ours = features[:15] * 1.5 + 0.2
    expected = frechet_distance(ours, features)
    FeatureStatistics.of(features, **DESCRIBED).save(tmp_path / "new" / "real.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "new" / "real.safetensors")
    assert frechet_distance(ours, loaded) == expected and loaded.count == 40
    assert {name: getattr(loaded, name) for name in DESCRIBED} == DESCRIBED
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["real.safetensors"]

    # As pytorch-fid and clean-fid write them.
    np.savez(tmp_path / "real.npz", mu=features.numpy().mean(0), sigma=np.cov(features.numpy(), rowvar=False))
    loaded = FeatureStatistics.load(str(tmp_path / "real.npz"))
    assert frechet_distance(ours, loaded) == pytest.approx(expected, rel=1e-5)
    assert loaded.count is loaded.extractor is loaded.resolution is None


def test_what_does_not_fit_is_refused(features):
    statistics = FeatureStatistics.of(features, **DESCRIBED)
    statistics.check_extractor("tiny")
    statistics.check_shape(6, "16x16")
    with pytest.raises(ValueError, match="are those of the extractor 'tiny', not 'inception-v3-compat'"):
        statistics.check_extractor("inception-v3-compat")
    with pytest.raises(ValueError, match="are of 6 features, the extractor has 2048"):
        statistics.check_shape(2048, "16x16")
    with pytest.raises(ValueError, match="are of images of 16x16 pixels, and the samples have 32x32"):
        statistics.check_shape(6, "32x32")


def write_objects(file):
    np.savez(file, mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.npz", lambda file: file.write_bytes(b"no archive"), "holds no reference statistics"),
        ("a.npz", lambda file: np.savez(file, mu=np.zeros(3)), r"statistics \(mu and sigma\): .*sigma"),
        ("a.npz", write_objects, r"statistics \(mu and sigma\): its mu claims the shape \(1,\) and object"),
        ("a.npz", lambda file: np.savez(file, mu=np.zeros(3), sigma=np.zeros(3)), r"they must be \(D,\) and \(D, D\)"),
        ("a.safetensors", lambda file: file.write_bytes(b"none"), "holds no reference statistics"),
        ("a.safetensors", lambda file: save_file({"x": torch.zeros(1)}, file), r"statistics \(mean and covariance\)"),
        ("a.txt", lambda file: file.write_text("1"), r"is no file of reference statistics, a \.safetensors or \.npz"),
        ("a.npz", lambda file: None, "is no file of reference statistics"),
    ],
)
def test_other_files_are_errors(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.load(tmp_path / name)
