"""Bad input: the error is of the right type and names the argument, what it should be and what came."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import lora_linear

M, K, N, R = 5, 8, 6, 2


def good():
    return {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "lora_a": torch.randn(R, K),
        "lora_b": torch.randn(N, R),
    }


SHAPES = {
    "x": [(M, K + 1), ()],
    "weight": [(N, K + 1), (N + 1, K), (N,), (1, N, K)],
    "lora_a": [(K,), (1, R, K), (1, 1, R, K)],
    "lora_b": [(N, R + 1), (N,), (1, N, R)],
    "bias": [(N + 1,), (1, N), ()],
    "gate": [(R + 1,), (M + 1, R), (M + 1, 1), (1, 1), ()],
    "x_lora": [(M, K + 1), (M + 1, K), (K,)],
}
DTYPES = {
    "x": [torch.int64, torch.bool],
    "weight": [torch.int8, torch.float64, torch.bfloat16],
    "lora_a": [torch.int64],
    "lora_b": [torch.int32, torch.bool],
    "bias": [torch.float16],
    "gate": [torch.int64],
    "x_lora": [torch.float16, torch.int64],
}
OPTIONAL = {"bias": (N,), "gate": (R,), "x_lora": (M, K)}


@pytest.mark.parametrize(("name", "shape"), [(n, s) for n, many in SHAPES.items() for s in many], ids=str)
def test_shape(name, shape):
    with pytest.raises(ValueError, match=rf"^{name}: expected .* got ") as error:
        lora_linear(**good() | {name: torch.randn(shape)})
    assert str(shape) in str(error.value) or f"got {len(shape)}" in str(error.value)


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n, many in DTYPES.items() for d in many], ids=str)
def test_dtype(name, dtype):
    args = good() | {name: torch.ones(OPTIONAL[name]) for name in OPTIONAL}
    args[name] = args[name].to(dtype)
    with pytest.raises(TypeError, match=rf"^{name}: expected .* got {dtype}"):
        lora_linear(**args)


@pytest.mark.parametrize("name", ("x", "lora_a", "lora_b"))
def test_none(name):
    with pytest.raises(TypeError, match=f"^{name}: expected a Tensor, got NoneType"):
        lora_linear(**good() | {name: None})


@pytest.mark.parametrize("value", ([[1.0] * K], 3.0, "x"), ids=("list", "float", "str"))
@pytest.mark.parametrize("name", ("x", "weight", "lora_a", "lora_b", "bias", "gate", "x_lora"))
def test_not_a_tensor(name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected a Tensor, got {type(value).__name__}"):
        lora_linear(**good() | {name: value})


@pytest.mark.parametrize("name", ("weight", "lora_a", "lora_b", "bias", "gate", "x_lora"))
def test_device(name):
    args = good() | {name: torch.ones(shape) for name, shape in OPTIONAL.items()}
    args[name] = args[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name}: expected device cpu .* got meta"):
        lora_linear(**args)


@pytest.mark.parametrize("p", (-0.1, 1.0, 1.5, float("nan"), float("inf")))
def test_dropout_out_of_range(p):
    with pytest.raises(ValueError, match=r"^dropout_p: expected 0 <= dropout_p < 1, got "):
        lora_linear(**good(), dropout_p=p)


@pytest.mark.parametrize("p", ("0.1", None, torch.tensor(0.1)), ids=("str", "none", "tensor"))
def test_dropout_not_a_number(p):
    with pytest.raises(TypeError, match=r"^dropout_p: expected a number, got "):
        lora_linear(**good(), dropout_p=p)


@pytest.mark.parametrize("scaling", ("2", None, [1.0]), ids=("str", "none", "list"))
def test_scaling_not_a_number(scaling):
    with pytest.raises(TypeError, match=r"^scaling: expected a number or a Tensor, got "):
        lora_linear(**good(), scaling=scaling)


def test_scaling_of_two_elements():
    with pytest.raises(ValueError, match=r"^scaling: expected one element, got shape \(2,\)"):
        lora_linear(**good(), scaling=torch.ones(2))


def test_scaling_of_another_device():
    with pytest.raises(ValueError, match=r"^scaling: expected device cpu .* got meta"):
        lora_linear(**good(), scaling=torch.ones(1, device="meta"))


def test_integer_scaling_tensor():
    with pytest.raises(TypeError, match=r"^scaling: expected a floating dtype, got torch.int64"):
        lora_linear(**good(), scaling=torch.ones(1, dtype=torch.int64))


def test_errors_leave_the_generator_alone():
    args, before = good(), torch.get_rng_state()
    with pytest.raises(ValueError, match="gate"):
        lora_linear(**args, gate=torch.ones(R + 1), dropout_p=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_integer_scaling_is_a_number():
    assert torch.equal(lora_linear(**(args := good()), scaling=2), lora_linear(**args, scaling=2.0))


def test_rank_zero_is_the_base():
    args = good() | {"lora_a": torch.empty(0, K), "lora_b": torch.empty(N, 0)}
    torch.testing.assert_close(lora_linear(**args), args["x"] @ args["weight"].T)


def test_without_a_the_branch_is_h():
    args = good() | {"lora_a": None}
    with pytest.raises(TypeError, match=r"^lora_a: expected a Tensor, got NoneType"):
        lora_linear(**args)
    with pytest.raises(ValueError, match=r"^x_lora: expected .* to be \(5, 2\), got shape \(5, 8\)"):
        lora_linear(**args, x_lora=torch.randn(M, K))
    with pytest.raises(ValueError, match=r"^dropout_p: expected 0 without lora_a, got 0.5"):
        lora_linear(**args, x_lora=torch.randn(M, R), dropout_p=0.5)
    with pytest.raises(ValueError, match=r"^x: expected"):
        lora_linear(**args | {"x": torch.randn(M, K + 1)}, x_lora=torch.randn(M, R))


def test_factors_for_each_sample_are_as_many():
    args = good() | {"lora_a": torch.randn(3, R, K), "x": torch.randn(M, 4, K)}
    with pytest.raises(ValueError, match=rf"^lora_a: expected one for each of {M} samples"):
        lora_linear(**args)
    with pytest.raises(ValueError, match=r"^lora_b: expected 2 dimensions"):
        lora_linear(**good() | {"lora_b": torch.randn(M, N, R)})
