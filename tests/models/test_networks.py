"""The official networks, imported without the packages around them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tasks.errors import ModelError
from tasks.models import networks
from tasks.models.cards import find_model
from tests.models.samples import blank_card

ROOT = Path(__file__).parents[2]


def test_import_leaves_no_stand_ins_behind() -> None:
    code = """
import sys
from tasks.errors import ModelError
from tasks.models import networks
from tasks.models.cards import find_model
networks.official("realesrgan.archs.srvgg_arch", "SRVGGNetCompact")
networks.official("basicsr.archs.rrdbnet_arch", "RRDBNet")
for name in ("SwinIR", "Swin2SR"):
    networks.official(f"spandrel.architectures.{name}.__arch.{name}", name)
packages = ("basicsr", "realesrgan", "spandrel", "torchvision", "distutils", "einops")
left = [name for name in sys.modules if name.partition(".")[0] in packages]
assert not left, left
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_packages_that_are_imported_already_are_used_as_they_are() -> None:
    code = """
import sys, types
sys.modules["torchvision"] = real = types.ModuleType("torchvision")
complete = types.ModuleType("realesrgan.archs.srvgg_arch")
complete.SRVGGNetCompact = object
sys.modules["realesrgan.archs.srvgg_arch"] = complete
from tasks.errors import ModelError
from tasks.models import networks
from tasks.models.cards import find_model
assert networks.official("realesrgan.archs.srvgg_arch", "SRVGGNetCompact") is object
assert networks.official("basicsr.archs.rrdbnet_arch", "RRDBNet").__name__ == "RRDBNet"
assert sys.modules["torchvision"] is real
assert sys.modules["realesrgan.archs.srvgg_arch"] is complete
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda _: None)
    networks.official.cache_clear()
    with pytest.raises(ModelError, match=r"spandrel is not installed. pip install --no-deps spandrel"):
        networks.build(find_model("swin2sr-real-x4"))
    monkeypatch.undo()
    assert networks.official("spandrel.architectures.Swin2SR.__arch.Swin2SR", "Swin2SR").__name__ == "Swin2SR"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("num_conv", [1, 8])
@pytest.mark.parametrize("size", [(1, 5), (7, 33), (64, 150)])
@torch.inference_mode()
def test_strips_change_no_bit(num_conv: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = networks.build(blank_card(architecture="srvgg", scale=2, num_feat=16, num_conv=num_conv))
    network.to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, *size).contiguous(memory_format=torch.channels_last)
    whole = networks.low_resolution_output(network, x)
    for rows in (1, 2, 3, 8, 40):
        assert torch.equal(networks.low_resolution_output(network, x, rows), whole), rows
    torch.testing.assert_close(F.pixel_shuffle(whole, 2), network(x), rtol=0, atol=1e-5)
