"""Weight files: found, downloaded, checked, and refused where they are not what they should be."""

from __future__ import annotations

import hashlib
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tasks.errors import ModelError
from tasks.models import networks, weights
from tasks.models.cards import ModelCard, find_model
from tasks.models.state import load_state
from tests.models.samples import blank_card
from tests.models.servers import CONTENT, FileServer


def test_download(folder: Path, server: FileServer, remote_card: ModelCard) -> None:
    assert not weights.is_present(remote_card)
    seen: list[tuple[int, int]] = []
    path = weights.fetch(remote_card, lambda done, total: seen.append((done, total)))
    assert path == folder / "weights.pth"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert weights.is_present(remote_card)
    assert weights.fetch(remote_card) == weights.locate(remote_card) == path
    assert len(server.requested) == 1
    assert not list(folder.glob("*.part"))


def test_download_goes_on_where_it_broke_off(folder: Path, server: FileServer, remote_card: ModelCard) -> None:
    server.break_off_after = [300_000, 500_000]
    assert weights.fetch(remote_card).read_bytes() == CONTENT
    assert server.requested == [None, "bytes=300000-", "bytes=500000-"]


def test_download_left_by_an_earlier_process_is_continued(
    folder: Path, server: FileServer, remote_card: ModelCard
) -> None:
    (folder / "weights.pth.part").write_bytes(CONTENT[:1000])
    assert weights.fetch(remote_card).read_bytes() == CONTENT
    assert server.requested == ["bytes=1000-"]


def test_server_without_ranges(folder: Path, server: FileServer, remote_card: ModelCard) -> None:
    server.ranges = False
    server.break_off_after = [300_000]
    assert weights.fetch(remote_card).read_bytes() == CONTENT


def test_wrong_size_is_not_downloaded(folder: Path, server: FileServer, remote_card: ModelCard) -> None:
    server.content = CONTENT + b"more"
    with pytest.raises(ModelError, match=f"offers {len(CONTENT) + 4} bytes"):
        weights.fetch(remote_card)
    assert not (folder / "weights.pth").exists()


def test_wrong_content_is_not_kept(folder: Path, server: FileServer, remote_card: ModelCard) -> None:
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(ModelError, match="SHA-256"):
        weights.fetch(remote_card)
    assert not list(folder.glob("weights.pth*"))


def test_refusing_and_missing_servers(folder: Path, server: FileServer, remote_card: ModelCard) -> None:
    server.status = 404
    with pytest.raises(ModelError, match="404"):
        weights.fetch(remote_card)
    assert len(server.requested) == 1  # there is no point in asking again
    server.status = 503
    with pytest.raises(ModelError, match=f"put the file by other means here: {folder / 'weights.pth'}"):
        weights.fetch(remote_card)
    assert len(server.requested) == 4


def test_two_downloads_at_once(folder: Path, server: FileServer, remote_card: ModelCard) -> None:
    threads = [threading.Thread(target=weights.fetch, args=(remote_card,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (folder / "weights.pth").read_bytes() == CONTENT
    assert len(server.requested) == 1


def test_download_goes_to_the_cache_without_a_named_folder(
    folder: Path, remote_card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUPERRES_MODEL_DIR")
    path = weights.fetch(remote_card)
    assert path == weights.cache_folder() / "weights.pth"
    assert weights.locate(remote_card) == path


def test_missing_weights_say_what_to_do(folder: Path) -> None:
    card = find_model("realesr-animevideov3")
    with pytest.raises(ModelError) as caught:
        load_state(card)
    message = str(caught.value)
    for fact in ("realesr-animevideov3.pth", "2504012 bytes", str(card.url), str(weights.cache_folder()), "superres"):
        assert fact in message
    with pytest.raises(ModelError, match=r"realesr-animevideov3\.pth"):
        weights.locate(card)


def test_bundled_weights_load(folder: Path) -> None:
    for name in ("compact-x2", "compact-x4"):
        card = find_model(name)
        state = load_state(card)
        assert sum(tensor.numel() for tensor in state.values()) == card.parameters
        assert weights.content_hash(card) == hashlib.sha256(weights.locate(card).read_bytes()).hexdigest()


def test_changed_file_is_refused(srvgg_x2: ModelCard) -> None:
    assert load_state(srvgg_x2)
    path = Path(str(srvgg_x2.path))
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-100])
        with pytest.raises(ModelError, match="bytes"):
            load_state(srvgg_x2)
        path.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
        with pytest.raises(ModelError, match="SHA-256"):
            weights.locate(srvgg_x2)
        path.unlink()
        with pytest.raises(ModelError, match="does not exist"):
            load_state(srvgg_x2)
    finally:
        path.write_bytes(good)


class Malicious:
    """What a hostile weight file can hold: an object whose loading calls a function."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, legacy: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    torch.save({"params": Malicious(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="wants to run code"):
        find_model(path)
    path.write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(ModelError):
        find_model(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    state = networks.build(blank_card(architecture="srvgg", scale=2, num_feat=4, num_conv=1)).state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    good = path.read_bytes()
    for bad in (b"", b"not weights at all", good[: len(good) // 2], good[:-7]):
        path.write_bytes(bad)
        with pytest.raises(ModelError, match="damaged"):
            find_model(path)


def test_contents_that_are_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for content in ([1, 2, 3], {"params": {"a": 1}}, torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(ModelError, match="no state dict"):
            find_model(path)


def test_weights_that_do_not_fit_the_network(tmp_path: Path) -> None:
    state = networks.build(blank_card(architecture="srvgg", scale=2, num_feat=4, num_conv=1)).state_dict()

    def load(changed: dict[str, torch.Tensor]) -> None:
        path = tmp_path / "weights.safetensors"
        save_file(changed, path)
        find_model(path)

    load(state)
    with pytest.raises(ModelError, match="lacks 1 weights"):
        load({name: tensor for name, tensor in state.items() if name != "body.2.bias"})
    with pytest.raises(ModelError, match="no use for, something first"):
        load({**state, "something": torch.zeros(1)})
    with pytest.raises(ModelError, match="has shape"):
        load({**state, "body.2.bias": torch.zeros(5)})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="not finite"):
            load({**state, "body.2.bias": torch.full((4,), bad)})


def test_smoothed_weights_come_first(tmp_path: Path) -> None:
    state = networks.build(blank_card(architecture="srvgg", scale=2, num_feat=4, num_conv=1)).state_dict()
    smoothed = {name: tensor + 1 for name, tensor in state.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"params": state, "params_ema": smoothed}, path)
    loaded = load_state(find_model(path))
    assert all(torch.equal(loaded[name], smoothed[name]) for name in smoothed)


def test_half_precision_files_become_single(tmp_path: Path) -> None:
    state = networks.build(blank_card(architecture="srvgg", scale=2, num_feat=4, num_conv=1)).state_dict()
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in state.items()}, path)
    assert {tensor.dtype for tensor in load_state(find_model(path)).values()} == {torch.float32}


def test_card_that_is_moved_still_needs_its_own_file(srvgg_x2: ModelCard, srvgg_x4: ModelCard) -> None:
    with pytest.raises(ModelError):
        load_state(replace(srvgg_x2, path=srvgg_x4.path))
