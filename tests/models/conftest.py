"""Small networks with random weights, and a server of weight files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.models import networks
from tasks.models.backends import winograd_program
from tasks.models.cards import ModelCard, find_model
from tests.models.samples import blank_card
from tests.models.servers import CONTENT, FileServer

MakeModel = Callable[..., ModelCard]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Writes random weights of a shape to a file, in the official layout, and returns the card read off that file."""

    def make(seed: int = 0, gain: float = 1.0, **shape: Any) -> ModelCard:
        torch.manual_seed(seed)
        network = networks.build(blank_card(**shape))  # torch's own initialisation
        state = {name: gain * weight for name, weight in network.state_dict().items()}
        path = tmp_path_factory.mktemp("weights") / f"{shape['architecture']}-x{shape['scale']}.pth"
        torch.save({"params": state}, path)
        return find_model(path)

    return make


@pytest.fixture(scope="session")
def srvgg_x2(make_model: MakeModel) -> ModelCard:
    """As deep as the bundled models and half as wide."""
    return make_model(architecture="srvgg", scale=2, num_feat=16, num_conv=8)


@pytest.fixture(scope="session")
def srvgg_x4(make_model: MakeModel) -> ModelCard:
    return make_model(architecture="srvgg", scale=4, num_feat=16, num_conv=3)


@pytest.fixture(scope="session")
def rrdb_x2(make_model: MakeModel) -> ModelCard:
    """RealESRGAN_x2plus with a single narrow block; scaled up so that its output spans the whole range."""
    return make_model(architecture="rrdb", scale=2, num_feat=8, num_block=1, num_grow=4, gain=1.5)


@pytest.fixture(scope="session")
def rrdb_x4(make_model: MakeModel) -> ModelCard:
    return make_model(architecture="rrdb", scale=4, num_feat=8, num_block=1, num_grow=4, gain=1.5)


@pytest.fixture(scope="session")
def rrdb_wide(make_model: MakeModel) -> ModelCard:
    """Wide enough for tensor cores."""
    return make_model(architecture="rrdb", scale=4, num_feat=16, num_block=1, num_grow=16, gain=1.5)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer().running() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `SUPERRES_MODEL_DIR` names; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("SUPERRES_MODEL_DIR", str(folder))
    return folder


@pytest.fixture
def remote_card(server: FileServer) -> ModelCard:
    shape = {"architecture": "srvgg", "scale": 2, "num_feat": 4, "num_conv": 1}
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    return blank_card(**shape, name="remote", url=server.url, bytes=len(CONTENT), sha256=sha256)


@pytest.fixture
def haswell(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs as they are compiled for a processor without AVX-512, which those with it run as well."""
    llvm = pytest.importorskip("llvmlite.binding")
    features = llvm.get_host_cpu_features()
    for name in features:
        features[name] &= not name.startswith("avx512")
    caches = winograd_program.vector_floats, winograd_program._compiled

    def forget() -> None:
        for cache in caches:
            cache.cache_clear()

    with monkeypatch.context() as patch:
        patch.setattr(llvm, "get_host_cpu_features", lambda: features)
        patch.setattr(llvm, "get_host_cpu_name", lambda: "haswell")
        forget()
        yield
    forget()
