"""What the backend `winograd` promises beyond the right numbers: the same bits, however the work is divided."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tasks.media.colour import RgbToPlanes
from tasks.media.pixels import Colour, PictureFormat
from tasks.models.backends import winograd_network, winograd_program
from tasks.models.backends.winograd_network import WinogradNetwork
from tasks.models.cards import ModelCard
from tasks.models.state import load_state
from tests.models.conftest import MakeModel

pytestmark = pytest.mark.skipif(
    not winograd_program.is_available(), reason="needs llvmlite and a processor with AVX2 and FMA, or AVX-512"
)

COMPACT = {"architecture": "srvgg", "scale": 2, "num_feat": 24, "num_conv": 3}


def network_of(card: ModelCard, size: tuple[int, int], threads: int = 1, layout: str = "yuv420p") -> WinogradNetwork:
    return WinogradNetwork(card, load_state(card), threads, 1, planes_of(card, size, layout))


def planes_of(card: ModelCard, size: tuple[int, int], layout: str = "yuv420p") -> RgbToPlanes:
    picture = PictureFormat(card.scale * size[1], card.scale * size[0], layout, Colour("bt709", full_range=False))
    return RgbToPlanes(picture)


def images(size: tuple[int, int], count: int = 1) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def all_of(network: WinogradNetwork, card: ModelCard, x: Tensor) -> list[Tensor]:
    """All that it computes of images, in memory of its own."""
    size = (x.shape[2], x.shape[3])
    results = (network.run(x), *network.codes(x, planes_of(card, size).edge_gains(card.scale, *size)))
    return [result.clone() for result in results]


def assert_same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


@pytest.mark.parametrize("place", [(0, 0), (7, 8), (8, 7), (15, 20)])
def test_a_pixel_depends_on_its_neighbours_alone(place: tuple[int, int], make_model: MakeModel) -> None:
    card = make_model(architecture="srvgg", scale=2, num_feat=16, num_conv=1)
    x = images((16, 21))
    x[:, :, place[0], place[1]] = torch.nan
    seen = network_of(card, (16, 21)).run(x).isnan().any(1)[0]
    reach = card.receptive_field
    expected = torch.zeros(16, 21, dtype=torch.bool)
    expected[max(0, place[0] - reach) : place[0] + reach + 1, max(0, place[1] - reach) : place[1] + reach + 1] = True
    assert reach == 3
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("size", [(64, 20), (61, 33)])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_that_share_a_picture_change_no_bit(threads: int, size: tuple[int, int], make_model: MakeModel) -> None:
    card, x = make_model(**COMPACT), images(size, 2)
    assert_same_bits(
        all_of(network_of(card, size, threads), card, x),
        all_of(network_of(card, size), card, x),
    )


def test_rows_that_become_codes_at_a_time_change_no_bit(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    card, x = make_model(**COMPACT), images((31, 33))
    expected = all_of(network_of(card, (31, 33)), card, x)
    monkeypatch.setattr(winograd_network, "_STRIP_BYTES", 0)
    assert_same_bits(all_of(network_of(card, (31, 33)), card, x), expected)


def test_pictures_before_change_no_bit(make_model: MakeModel) -> None:
    card = make_model(**COMPACT)
    network = network_of(card, (20, 30))
    for size in ((40, 50), (7, 9), (21, 31), (20, 30), (1, 1)):
        x = images(size)
        assert_same_bits(all_of(network, card, x), all_of(network_of(card, size), card, x))


@pytest.mark.parametrize("scale", [2, 4])
def test_processors_with_shorter_vectors_give_the_same_bits(
    scale: int, make_model: MakeModel, request: pytest.FixtureRequest
) -> None:
    if winograd_program.vector_floats() < 16:
        pytest.skip("this processor has short vectors only")
    card, x = make_model(**{**COMPACT, "scale": scale, "num_feat": 64}), images((20, 27))
    expected = all_of(network_of(card, (20, 27)), card, x)
    request.getfixturevalue("haswell")
    assert winograd_program.vector_floats() == 8
    assert_same_bits(all_of(network_of(card, (20, 27)), card, x), expected)


@pytest.mark.parametrize(
    ("scale", "layout"),
    [(1, "yuv444p"), (2, "yuv422p"), (2, "yuv420p10le"), (3, "yuv444p12le"), (4, "yuv420p"), (4, "yuv411p")],
)
def test_code_values_of_any_layout(scale: int, layout: str, make_model: MakeModel) -> None:
    card, size = make_model(**{**COMPACT, "scale": scale}, gain=1.5), (23, 34)
    x, to_planes = images(size), planes_of(card, size, layout)
    network, gains = network_of(card, size, layout=layout), to_planes.edge_gains(scale, *size)
    luma, chroma, _ = network.codes(x, gains)
    for result, expected in zip((luma, chroma), to_planes.codes(network.run(x).clamp(0, 1), scale, gains), strict=True):
        assert result.dtype == expected.dtype
        assert result.shape == expected.shape
        difference = (result.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3
