from pathlib import Path

import diffusers
import pytest
from versions import since

from ofadiff.architectures import PROVEN_BY_RECORDING, Architecture, architectures
from ofadiff.commands.architectures import page
from ofadiff.denoisers.table import trainable_kinds

# diffusers warns of its own classes.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]


@pytest.fixture(scope="module")
def rows() -> dict[str, Architecture]:
    return {row.name: row for row in architectures()}


def test_most_denoisers_are_mostly_elastic(rows):
    assert sum(row.elastic_share >= 0.6 for row in rows.values()) >= 0.85 * len(rows)


def test_every_row_is_explained(rows):
    for row in rows.values():
        assert row.params > 0, row.skipped
        assert 0 < row.smallest_size <= 1 and row.smallest_size >= 1 - row.elastic_share
        # What is not elastic is named, but for kinds of blocks under 2 %.
        assert sum(row.rigid.values()) <= 1 - row.elastic_share + 1e-9
        assert row.elastic_share > 0.85 or row.rigid


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("FluxTransformer2DModel", 0.72),
        ("Flux2Transformer2DModel", 0.97),
        ("PixArtTransformer2DModel", 0.98),
        ("SD3Transformer2DModel", 0.66),
        ("SanaTransformer2DModel", 0.97),
        ("UNet2DConditionModel", 0.88),
        ("WanTransformer3DModel", 0.98),
    ],
)
def test_shares_of_the_well_known(rows, name, share):
    since(f"diffusers.{name}")
    assert rows[name].elastic_share == pytest.approx(share, abs=0.01)


def test_what_cannot_be_cut_says_why(rows):
    assert "has no block that can be cut" in rows["UNet1DModel"].skipped
    assert "routed expert" in rows["HiDreamImageTransformer2DModel"].skipped
    since("diffusers.NucleusMoEImageTransformer2DModel")
    assert "NucleusMoELayer" in rows["NucleusMoEImageTransformer2DModel"].rigid


def test_the_page_has_a_line_for_every_class(rows):
    lines = [line for line in page(list(rows.values())).splitlines() if line.startswith("| ")]
    assert len(lines) == len(rows) + 2
    assert any(line.startswith("| SD3Transformer2DModel | 856.2 M | 66% |") for line in lines)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FluxTransformer2DModel", "by a family"),
        ("WanTransformer3DModel", "by recording"),
        ("UNet2DConditionModel", "by a family and by recording"),
        ("MochiTransformer3DModel", ""),
    ],
)
def test_the_page_says_how_a_class_is_proven(rows, name, words):
    (line,) = page([rows[name]]).split(f"| {name} |")[1:]
    assert line.split("|")[3].strip() == words


def test_every_class_that_is_proven_is_in_the_table(rows):
    families = {kind.model for kind in trainable_kinds()}
    for name in families | set(PROVEN_BY_RECORDING):
        since(f"diffusers.{name}")
    assert {name for name, row in rows.items() if row.proven} == families | set(PROVEN_BY_RECORDING)


def test_the_page_in_docs_is_up_to_date(rows):
    written = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    if f"Denoisers of diffusers {diffusers.__version__} " not in written:
        pytest.skip("it is of another diffusers")
    assert written == page(list(rows.values())), "ofadiff architectures --output docs/architectures.md writes it"
