"""Codes and scales: closed forms, bitsandbytes' numbers, and errors."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import dequantize, quantize
from lora_kernels.quant import QuantizedWeight, from_bitsandbytes
from lora_kernels.quant.codes import NF4_VALUES, dynamic_values

# Blocks of 64 run across rows, end in the middle of one, and there may be an odd number of elements.
SHAPES = ((64, 64), (33, 70), (7, 9), (1, 1), (5, 13), (40, 257))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_nf4_values_are_the_quantiles_of_the_paper():
    offset = 0.9677083  # the mean of 1 - 1/30 and 1 - 1/32
    upper = torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1]
    lower = torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1]
    zero = torch.zeros(1, dtype=torch.float64)
    values = torch.cat([torch.special.ndtri(upper), zero, -torch.special.ndtri(lower)])
    expected = values.sort().values / values.max()
    torch.testing.assert_close(torch.tensor(NF4_VALUES, dtype=torch.float64), expected, rtol=0, atol=1e-6)


def test_nf4_packs_the_first_of_two_elements_high():
    weight = torch.tensor([[-1.0, 1.0, 0.0, 0.0796 * 2]])
    weight[0, :2] *= 2  # the scale is 2
    q = quantize(weight)
    assert q.scales.tolist() == [2.0]
    assert q.codes.tolist() == [0x0F, 0x78]
    assert dequantize(q).tolist() == [[-2.0, 2.0, 0.0, pytest.approx(2 * NF4_VALUES[8])]]


def test_an_odd_number_of_elements_pads_with_the_code_of_zero():
    assert quantize(torch.ones(1, 3)).codes.tolist() == [0xFF, 0xF7]


def test_blocks_run_across_rows():
    weight = torch.ones(3, 40)
    weight[1, 24:] = 8.0  # element 64 starts the second block
    q = quantize(weight)
    assert q.scales.tolist() == [1.0, 8.0]
    assert dequantize(q)[1].tolist() == [1.0] * 24 + [8.0] * 16


def test_int8_and_fp8_are_exact_on_their_own_grids():
    grid = torch.arange(-127, 128.0).repeat(2, 1) * torch.tensor([[0.5], [2.0]])
    torch.testing.assert_close(dequantize(quantize(grid, "int8")), grid, rtol=1e-6, atol=0)
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn).float().view(2, -1)
    for per_tensor in (False, True):
        assert torch.equal(dequantize(quantize(numbers, "fp8", per_tensor=per_tensor)), numbers)


@pytest.mark.parametrize("format", ("nf4", "int8", "fp8"))
def test_a_weight_of_zeros_stays_one(format):
    assert not dequantize(quantize(torch.zeros(3, 70), format)).any()


@pytest.mark.parametrize(("format", "options", "bound"), (
    ("nf4", {}, 0.16), ("nf4", {"block_size": 128}, 0.16), ("nf4", {"double_quant": True}, 0.17),
    ("int8", {}, 0.5 / 127), ("fp8", {}, 1 / 16), ("fp8", {"per_tensor": True}, 1 / 16),
))  # fmt: skip
def test_error_is_at_most_half_a_step(format, options, bound):
    weight = torch.randn(40, 96)
    q = quantize(weight, format, **options)
    error = (dequantize(q) - weight).abs().max().item()
    assert error <= bound * weight.abs().max().item()


def test_bits_an_element():
    weight = torch.randn(256, 512)
    given = {"nf4": 4.5, "int8": 8 + 32 / 512, "fp8": 8 + 32 / 512}
    for format, bits in given.items():
        assert 8 * quantize(weight, format).nbytes / weight.numel() == bits
    assert 8 * quantize(weight, double_quant=True).nbytes / weight.numel() < 4.2


def test_dequantize_takes_any_floating_dtype():
    q = quantize(torch.randn(8, 64, dtype=torch.bfloat16))
    assert dequantize(q).dtype == torch.bfloat16
    exact = dequantize(q, torch.float64)
    for dtype in DTYPES:
        torch.testing.assert_close(dequantize(q, dtype).double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    with pytest.raises(TypeError, match="dtype: expected a floating dtype"):
        dequantize(q, torch.int8)


def test_dynamic_values_are_ascending_and_symmetric():
    values = dynamic_values()
    assert values.shape == (256,) and (values.diff() > 0).all()
    assert values[-1] == 1.0 and 0.0 in values


class TestBitsandbytes:
    """bitsandbytes' own CPU code is the oracle, where it is installed."""

    @pytest.fixture(autouse=True)
    def _library(self):
        self.bnb = pytest.importorskip("bitsandbytes")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("block", (64, 128))
    def test_nf4(self, shape, dtype, block):
        weight = torch.randn(shape, dtype=dtype)
        codes, state = self.bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=block)
        q = quantize(weight, block_size=block)
        assert torch.equal(codes.view(-1), q.codes) and torch.equal(state.absmax, q.scales)
        if shape[1] % block == 0:  # else its CPU code takes a block to end with the row
            assert torch.equal(self.bnb.functional.dequantize_4bit(codes, state), dequantize(q))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nf4_with_quantised_scales(self, dtype):
        weight = torch.randn(300, 200, dtype=dtype)
        codes, state = self.bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        q = quantize(weight, double_quant=True)
        theirs = torch.cat([state.offset.view(1), state.state2.code, state.state2.absmax])
        assert torch.equal(codes.view(-1), q.codes) and torch.equal(theirs, q.nested)
        # Its CPU code looks up a scale's code after rounding to 16 bits, which can miss the nearest by one.
        away = (state.absmax.int() - q.scales.int()).abs()
        assert away.max() <= 1 and away.float().mean() < 0.02

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_int8(self, shape, dtype):
        weight = torch.randn(shape, dtype=dtype)
        codes, stats, _ = self.bnb.functional.int8_vectorwise_quant(weight)
        q = quantize(weight, "int8")
        assert torch.equal(codes, q.codes) and torch.equal(stats, q.scales)
        theirs = self.bnb.functional.int8_vectorwise_dequant(codes, stats)
        torch.testing.assert_close(dequantize(q, torch.float32), theirs, rtol=3e-7, atol=0)

    @pytest.mark.parametrize("nested", (False, True))
    def test_linear4bit_is_taken_over(self, nested):
        options = {"quant_type": "nf4", "compress_statistics": nested, "compute_dtype": torch.float32}
        layer = self.bnb.nn.Linear4bit(128, 20, **options).to("cpu")
        q = from_bitsandbytes(layer)
        theirs = self.bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(dequantize(q), theirs)
        assert q.codes.data_ptr() == layer.weight.data.data_ptr()

    def test_linear8bit_is_taken_over(self):
        layer = self.bnb.nn.Linear8bitLt(96, 20, has_fp16_weights=False)
        dense = layer.weight.data.clone()
        layer.to("cpu")
        q = from_bitsandbytes(layer)
        assert torch.equal(q.codes, layer.weight.data) and torch.equal(q.scales, layer.weight.SCB)
        assert (dequantize(q, torch.float32) - dense).abs().max() < dense.abs().max() / 100

    def test_what_has_no_counterpart_is_refused(self):
        layer = self.bnb.nn.Linear4bit(64, 8, quant_type="fp4").to("cpu")
        with pytest.raises(ValueError, match="quant_type is 'fp4'"):
            from_bitsandbytes(layer)
        with pytest.raises(ValueError, match="not quantised"):
            from_bitsandbytes(self.bnb.nn.Linear8bitLt(64, 8))


def test_from_bitsandbytes_refuses_other_layers():
    with pytest.raises(TypeError, match="Linear4bit or Linear8bitLt, got Linear"):
        from_bitsandbytes(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("weight", "options", "error", "match"), (
    ([1.0], {}, TypeError, "weight: expected a Tensor"),
    (torch.ones(2, 2, dtype=torch.int64), {}, TypeError, "weight: expected a floating dtype"),
    (torch.ones(2), {}, ValueError, "weight: expected 2 dimensions, got 1"),
    (torch.ones(0, 2), {}, ValueError, "weight: expected at least one element"),
    (torch.ones(2, 2), {"format": "int4"}, ValueError, "format: expected one of nf4, int8, fp8"),
    (torch.ones(2, 2), {"block_size": 48}, ValueError, "block_size: expected a power of two"),
    (torch.ones(2, 2), {"format": "int8", "double_quant": True}, ValueError, "double_quant: .* nf4's"),
    (torch.ones(2, 2), {"per_tensor": True}, ValueError, "per_tensor: .* fp8's"),
))  # fmt: skip
def test_bad_input(weight, options, error, match):
    with pytest.raises(error, match=match):
        quantize(weight, **options)


def parts(**changes):
    q = quantize(torch.randn(4, 64))
    names = ("codes", "scales", "nested", "format", "shape", "block", "dtype")
    return {name: getattr(q, name) for name in names} | changes


@pytest.mark.parametrize(("changes", "error", "match"), (
    ({"format": "fp4"}, ValueError, "format"),
    ({"shape": (0, 64)}, ValueError, "shape"),
    ({"block": 65}, ValueError, "block: expected a power of two"),
    ({"codes": torch.zeros(5, dtype=torch.uint8)}, ValueError, r"codes: .*\(128,\), got \(5,\)"),
    ({"codes": torch.zeros(128)}, TypeError, "codes: expected torch.uint8"),
    ({"scales": torch.zeros(4, dtype=torch.float16)}, TypeError, "scales: expected torch.float32"),
    ({"scales": torch.zeros(4, requires_grad=True)}, TypeError, "scales: .* frozen"),
    ({"nested": torch.zeros(3)}, TypeError, "scales: expected torch.uint8"),
    ({"dtype": torch.int8}, TypeError, "dtype"),
    ({"format": "int8", "block": 128}, ValueError, "block: expected 64 for int8"),
))  # fmt: skip
def test_parts_that_do_not_fit(changes, error, match):
    QuantizedWeight.checked(**parts())
    with pytest.raises(error, match=match):
        QuantizedWeight.checked(**parts(**changes))


def test_repr_and_device_move():
    q = quantize(torch.randn(4, 64), double_quant=True)
    assert repr(q) == "QuantizedWeight(nf4, shape=(4, 64), block=64, double-quantised, cpu)"
    assert q.to("meta").device.type == "meta" and q.to("meta").nested.device.type == "meta"
