"""`coserve profile` on a tiny model: what it shows and writes, the cache, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coserve.cli import profile as command
from coserve.core import Contents, PassCost, UnitCost
from coserve.devices.refit import ALL
from coserve.devices.table import find_device
from coserve.profiling import measure
from coserve.profiling.roofline import MANY_ROWS, measured_device
from coserve.runtime.loaded import LoadedModel
from tests.commands import Run
from tests.tiny_directory import build_tiny_directory

MEMORY = ("--memory-bytes", 1 << 24, "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_directory(tmp_path_factory.mktemp("profile") / "model")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Profiles are kept in a directory of their own, and hold only the points that a fit needs."""
    monkeypatch.setattr(measure, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(measure.Profiler.measure, "__defaults__", (0.0,))


def test_points_laws_and_devices(run: Run, directory: Path, tmp_path: Path) -> None:
    done = run("profile", directory, *MEMORY, "--json", tmp_path / "profile.json")
    assert done.code == 0 and "measuring what rows and units cost here" in done.err
    written = json.loads((tmp_path / "profile.json").read_text())
    assert (written["model"], written["dtype"], written["threads"]) == (str(directory), "float32", 1)
    assert len(written["points"]) > 10
    for point in written["points"]:
        assert point["what"].split()[0] in done.out and point["measured"] > 0
        assert all(point[law] > 0 for law in command.LAWS)
    kinds = {point["kind"] for point in written["points"]}
    for law in command.LAWS:
        found = written["agreement"][law]
        assert found.keys() == kinds | {ALL} and found[ALL]["points"] == len(written["points"])
        assert all(0 <= kind["median"] <= kind["p95"] for kind in found.values())
    for device in written["devices"].values():
        assert find_device(device["text"]).bandwidth == pytest.approx(device["bandwidth"], rel=1e-3)
    for line in written["roofline_fails"]:
        assert line in done.out


def test_the_cache_is_read_unless_told_otherwise(run: Run, directory: Path) -> None:
    assert "measuring" in run("profile", directory, *MEMORY).err
    assert "measuring" in run("profile", directory, *MEMORY, "--again").err
    kept = run("profile", directory, *MEMORY, "--json")
    assert json.loads(kept.out)["points"] and "what an iteration holds" not in kept.out
    assert ("measuring" in kept.err) == ("busy machine" in kept.err), "other work may have slowed the first measurement down"


def test_a_busy_machine_is_named(run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.os, "getloadavg", lambda: (64.0, 0.0, 0.0))
    monkeypatch.setattr(command.os, "cpu_count", lambda: 2)
    assert "The machine was busy (load average 64.0 on 2 cores)" in run("profile", directory, *MEMORY).out
    monkeypatch.setattr(command.os, "getloadavg", lambda: (0.3, 0.0, 0.0))
    assert "busy (load" not in run("profile", directory, *MEMORY).out


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("--json", "/nowhere/x.json"), "json: /nowhere/x.json can't be made"),
    (("--memory-bytes", 7, "--dtype", "float32"), "memory_bytes: one block of the key-value cache takes"),
    (("--device", "toaster"), "device: must be auto, cpu or cuda"),
    (("--dtype", "int3"), "dtype: must be auto or one of"),
])
def test_what_is_refused(run: Run, directory: Path, arguments: tuple[object, ...], complaint: str) -> None:
    done = run("profile", directory, *arguments)
    assert done.code == 2 and complaint in done.err and len(done.err.splitlines()) == 1 and not done.out


def test_a_model_that_is_not_there(run: Run) -> None:
    done = run("profile", "./nowhere")
    assert done.code == 2 and "no such directory" in done.err


@pytest.mark.parametrize(("contents", "words"), [
    (Contents(PassCost(8, 8, 8, 4096, 0, 0, 0, 0, 0), (), 0), "8 decoded after 512"),
    (Contents(PassCost(256, 16, 0, 0, 16 * 136, 0, 0, 0, 0, 16), (), 0), "16 x 16 prefilled"),
    (Contents(PassCost(64, 64, 0, 0, 2080, 0, 0, 0, 0, 1), (), 0), "64 prefilled with logits"),
    (Contents(PassCost(40, 8, 8, 512, 0, 32, 528, 32, 1), (), 0), "8 decoded after 64, 32 fused with labels"),
    (Contents(None, (UnitCost(False, 64, 1, 2080, 0), UnitCost(True, 512, 4, 8 * 2080, 0)), 0),
     "1 layer forward over 64, 4 layers back over 8 x 64"),
    (Contents(None, (UnitCost(False, 128, 4, 8256, 128),), 0), "4 layers forward over 128 with labels"),
    (Contents(None, (), 5000), "5000 elements updated"),
])
def test_points_in_words(contents: Contents, words: str) -> None:
    assert command.describe(contents) == words


def test_the_roofline_is_measured_on_the_models_matrices(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock under which one product takes 1 ms, whatever its size."""
    now, rows = [0.0], []
    linear = type(model.weights.layers[0].linears["o_proj"])
    product = linear.product

    def slow(self: object, x: torch.Tensor) -> torch.Tensor | None:
        now[0] += 1e-3
        rows.append(len(x))
        return product(self, x)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "product", slow)
    monkeypatch.setattr("coserve.profiling.roofline.time.perf_counter", lambda: now[0])
    device, arch = measured_device(model.weights), model.architecture
    width, inner, keys = arch.hidden_size, arch.intermediate_size, arch.num_kv_heads * arch.head_dim
    layer = width * (2 * arch.num_heads * arch.head_dim + 2 * keys) + 3 * width * inner
    assert device.bandwidth == pytest.approx(4 * layer / 4e-3), "four matrices per layer, in float32"
    assert device.flops == pytest.approx(2 * MANY_ROWS * layer / 4e-3)
    assert set(rows) == {1, MANY_ROWS} and device.memory_bytes > 1e8
    assert device.overlap == pytest.approx(1), "the ridge is at MANY_ROWS, whose products take no longer than one row's"
