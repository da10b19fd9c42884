"""Linears in 8-bit floats compute with exactly the matrix that `weight` gives, whatever the tiles; what they take is counted.

T rows, N output features, K input features.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.kernels import float8
from coserve.model import fp8 as module
from coserve.model.checkpoint import Checkpoint
from coserve.model.decoder import MERGED, MODULE_PATHS
from coserve.model.fp8 import DecodeBuffer, Fp8Linear, Fp8Rows, linear_bytes
from coserve.model.memory import packed_bytes, weight_bytes
from coserve.model.rankcheckpoint import RankCheckpoint
from coserve.model.weights import LayerWeights, load_weights
from tests.fake_cuda import fake_cuda, needs_fake_cuda
from tests.tiny_models import FAMILIES, build_tiny_model

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def coded(weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Fp8Linear:
    rows = Fp8Rows(*weight.shape, bias, DecodeBuffer(weight.numel(), dtype, CPU), CPU)
    rows.encode(slice(0, weight.shape[0]), weight, None)
    return rows.linear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [True, False])
def test_every_code_is_decoded_as_pytorch_does(
    dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(float8, "kernels_for", lambda x: None)
    codes = torch.arange(256, dtype=torch.uint8).expand(3, 256).contiguous()
    scales = torch.tensor([[0.5], [2.0**-14], [math.nan]])
    memory = torch.full((3, 300), 7, dtype=dtype)
    float8.decode_rows(memory[:, 3:259], codes, scales)
    wanted = codes.view(torch.float8_e4m3fn).to(torch.float64) * scales.double()
    real = ~codes.view(torch.float8_e4m3fn)[0].float().isnan()
    assert torch.equal(memory[:2, 3:259][:, real].double(), wanted[:2][:, real])
    assert memory[2, 3:259].isnan().all()
    assert (memory[:, :3] == 7).all() and (memory[:, 259:] == 7).all(), "wrote beside its columns"


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), num_rows=st.sampled_from([1, 3, 17]), num_out=st.integers(1, 90),
    num_in=st.integers(1, 90), biased=st.booleans(), accumulate=st.booleans(), tile=st.sampled_from([1, 100, 1 << 20]),
    seed=st.integers(0, 10**6),
)
def test_both_products(
    dtype: torch.dtype, num_rows: int, num_out: int, num_in: int, biased: bool, accumulate: bool, tile: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_ELEMENTS", tile)
        patch.setattr(module, "_STEP", 8)
        weight, bias = noise(num_out, num_in, seed=seed), noise(num_out, seed=seed + 1, dtype=dtype) if biased else None
        linear = coded(weight, dtype, bias)
        decoded = linear.weight.double()
        assert linear.weight.dtype == dtype
        assert ((decoded - weight).abs() <= torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) / 2**17)).all()
        x, grad = noise(num_rows, num_in + 2, dtype=dtype)[:, 2:], noise(num_rows, num_out, seed=1, dtype=dtype)
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
        for have, want in (
            (linear.forward, x.double() @ decoded.T + (0 if bias is None else bias.double())),
            (linear.input_grad, grad.double() @ decoded),
        ):
            out = torch.full((num_rows, want.shape[1] + 3), 3, dtype=dtype)
            have(out[:, 1:-2], x if have == linear.forward else grad, accumulate)
            error = (out[:, 1:-2].double() - want - (3 if accumulate else 0)).abs().max()
            assert error <= tolerance * (3 + float(want.abs().max()))
            assert (out[:, :1] == 3).all() and (out[:, -2:] == 3).all()


def test_rows_share_memory() -> None:
    linear = coded(noise(20, 8), torch.float32, noise(20))
    part = linear.rows(4, 9)
    assert torch.equal(part.weight, linear.weight[4:9])
    assert part.elements.untyped_storage().data_ptr() == linear.elements.untyped_storage().data_ptr()
    out, x = torch.empty(3, 5), noise(3, 8)
    part.forward(out, x)
    assert linear.bias is not None
    torch.testing.assert_close(out, x @ linear.weight[4:9].T + linear.bias[4:9])


def test_the_decoded_matrix_is_the_same_in_every_dtype() -> None:
    """Scales are powers of two, so nothing is rounded again; very large and small rows, zeros, and elements far apart."""
    weight = noise(64, 40, seed=3) * torch.exp2(torch.arange(-100.0, 28.0, 2.0))[:, None]
    weight[5], weight[7, ::2] = 0, weight[7, ::2] * 2.0**-14
    found = [coded(weight, dtype).weight.double() for dtype in DTYPES]
    assert all(torch.equal(each, found[0]) for each in found[1:])
    assert torch.equal(coded(found[0].float(), torch.float32).weight.double(), found[0]), "a decoded matrix stays as it is"


def test_a_row_that_is_not_finite_becomes_nan_and_spoils_no_other() -> None:
    weight = noise(4, 20)
    weight[2, 3] = math.inf
    decoded = coded(weight, torch.float32).weight
    assert decoded[2].isnan().all() and decoded[[0, 1, 3]].isfinite().all()


def stored(layer: LayerWeights) -> dict[str, Tensor]:
    return {name: linear.weight for name, linear in layer.linears.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_has_the_checkpoints_matrices_rounded(tmp_path: Path, family: str) -> None:
    checkpoint = Checkpoint(build_tiny_model(family, tmp_path, bias=family not in ("mistral", "qwen2")))
    weights = load_weights(checkpoint, dtype=torch.float32, device=CPU, quantization="fp8")
    plain = load_weights(checkpoint, dtype=torch.float32, device=CPU, packed=False)
    assert weights.quantization == "fp8" and "fp8" in weights.layout
    for number, (layer, other) in enumerate(zip(weights.layers, plain.layers, strict=True)):
        found = stored(layer)
        for name, sites in MERGED.items():
            assert torch.equal(found[name], torch.cat([found[site] for site in sites]))
        for site, path in MODULE_PATHS.items():
            weight = checkpoint.read(f"model.layers.{number}.{path}.weight", torch.float32)
            assert torch.equal(found[site], coded(weight, torch.float32).weight) and not torch.equal(found[site], weight)
        assert all(torch.equal(layer.norms[name], other.norms[name]) for name in other.norms)
        for name, linear in other.linears.items():
            bias = layer.linears[name].bias
            assert (bias is None) == (linear.bias is None)
            assert bias is None or linear.bias is None or torch.equal(bias, linear.bias)
    assert torch.equal(weights.embedding, plain.embedding) and torch.equal(weights.head.table, plain.head.table)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_parts_of_the_same_matrices(tmp_path: Path, size: int) -> None:
    """A part of a row is rounded with the whole row's scale, where it would otherwise keep smaller elements."""
    checkpoint = Checkpoint(build_tiny_model("llama", tmp_path))
    name = "model.layers.1.mlp.down_proj.weight"
    weight = checkpoint.read(name, torch.float32)
    weight[:, : weight.shape[1] // size] *= 2.0**-16
    whole = coded(weight, torch.float32).weight
    largest = weight.abs().amax(1, keepdim=True)
    for rank in range(size):
        columns = slice(rank * weight.shape[1] // size, (rank + 1) * weight.shape[1] // size)
        rows = Fp8Rows(weight.shape[0], weight.shape[1] // size, None, DecodeBuffer(1, torch.float32, CPU), CPU)
        rows.encode(slice(0, weight.shape[0]), weight[:, columns].contiguous(), largest)
        assert torch.equal(rows.linear().weight, whole[:, columns])
        part = RankCheckpoint(checkpoint, rank, size)
        magnitudes = part.row_magnitudes(name)
        assert magnitudes is not None
        assert torch.equal(magnitudes, checkpoint.read(name, torch.float32).abs().amax(1, keepdim=True))
        assert part.row_magnitudes("model.layers.1.mlp.up_proj.weight") is None


def test_what_the_weights_take_is_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(build_tiny_model("llama", tmp_path))
    arch = checkpoint.architecture
    weights = load_weights(checkpoint, dtype=torch.bfloat16, device=CPU, quantization="fp8")
    sites = [layer.linears[name] for layer in weights.layers for name in (*MERGED, "o_proj", "down_proj")]
    assert all(isinstance(site, Fp8Linear) for site in sites)
    held = sum(site.elements.nbytes + site.scales.nbytes for site in sites if isinstance(site, Fp8Linear))
    buffer = 2 * max(site.elements.numel() for site in sites if isinstance(site, Fp8Linear))
    rest = sum(norm.nbytes for layer in weights.layers for norm in layer.norms.values())
    rest += weights.embedding.nbytes + weights.head.table.nbytes + weights.norm.nbytes
    assert weight_bytes(arch, 2, "fp8") == held + buffer + rest
    assert linear_bytes(replace(arch, num_layers=32), 2, "fp8") < 0.6 * linear_bytes(replace(arch, num_layers=32), 2, "none")
    assert packed_bytes(arch, 2, quantization="fp8") == 2 * 2 * arch.vocab_size * arch.hidden_size


def test_a_device_decodes_a_whole_matrix_and_a_cpu_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", 1 << 16)
    buffer = DecodeBuffer(1 << 20, torch.bfloat16, torch.device("meta"))
    assert list(buffer.steps(1024, 1024)) == [slice(0, 1024)]
    tiles = list(DecodeBuffer(1 << 20, torch.bfloat16, CPU).steps(1000, 300))
    assert [part.start for part in tiles[1:]] == [part.stop for part in tiles[:-1]]
    assert tiles[0] == slice(0, 192) and tiles[-1].stop == 1000


@needs_fake_cuda
@pytest.mark.parametrize("kernel", ["_decode_kernel", "copy_"])
def test_on_cuda_a_product_is_one_decoding_and_one_product(kernel: str) -> None:
    """Llama-3.1-8B's gate_up_proj; where the kernel can't read the matrix, the library takes two launches."""
    odd = 0 if kernel == "_decode_kernel" else 8
    with fake_cuda() as cuda:
        place, shape = torch.device("cuda"), (28672, 4096 + odd)
        bits = torch.empty(shape, dtype=torch.uint8, device=place).view(float8.E4M3)
        scales = torch.empty(shape[0], 1, device=place)
        linear = Fp8Linear(bits, scales, None, DecodeBuffer(math.prod(shape), torch.bfloat16, place))
        x, y = (torch.empty(64, width, dtype=torch.bfloat16, device=place) for width in reversed(shape))
        for run in (lambda: linear.forward(y, x), lambda: linear.input_grad(x, y)):
            with cuda.counting() as found:
                run()
            assert found[kernel] == 1 and found["mm"] == 1 and found.total() == (2 if not odd else 3), found
