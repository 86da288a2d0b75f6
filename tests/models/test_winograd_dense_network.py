"""`rrdb` networks by the backend `winograd`: the same bits, however the work is divided."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tasks.models.backends import winograd_dense_network, winograd_program
from tasks.models.backends.winograd_dense_network import WinogradDenseNetwork
from tasks.models.cards import ModelCard
from tasks.models.state import load_state
from tests.models.conftest import MakeModel

pytestmark = pytest.mark.skipif(
    not winograd_program.is_available(), reason="needs llvmlite and a processor with AVX2 and FMA, or AVX-512"
)

#: Its channels do not fill vectors.
DENSE = {"architecture": "rrdb", "scale": 4, "num_feat": 24, "num_block": 2, "num_grow": 8}


@pytest.fixture
def card(make_model: MakeModel) -> ModelCard:
    return make_model(**DENSE, gain=1.5)


def network_of(card: ModelCard, threads: int = 1) -> WinogradDenseNetwork:
    return WinogradDenseNetwork(card, load_state(card), threads, 1)


def images(size: tuple[int, int], count: int = 1) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(1, 1), (34, 70), (33, 21)])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_that_share_a_picture_change_no_bit(threads: int, size: tuple[int, int], card: ModelCard) -> None:
    x = images(size, 2)
    assert torch.equal(network_of(card, threads).run(x), network_of(card).run(x))


@pytest.mark.parametrize("tile", [2, 10, 100])
def test_tiles_after_the_body_change_no_bit(tile: int, card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images((37, 70))
    expected = network_of(card).run(x)
    monkeypatch.setattr(winograd_dense_network, "_TILE", tile)
    assert torch.equal(network_of(card).run(x), expected)


def test_pictures_before_change_no_bit(card: ModelCard) -> None:
    network = network_of(card)
    for size in ((20, 31), (9, 40), (31, 20), (20, 31)):
        x = images(size)
        assert torch.equal(network.run(x), network_of(card).run(x))


def test_processors_with_shorter_vectors_give_the_same_bits(card: ModelCard, request: pytest.FixtureRequest) -> None:
    if winograd_program.vector_floats() < 16:
        pytest.skip("this processor has short vectors only")
    x = images((20, 27))
    expected = network_of(card).run(x)
    request.getfixturevalue("haswell")
    assert winograd_program.vector_floats() == 8
    assert torch.equal(network_of(card).run(x), expected)
