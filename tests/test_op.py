"""How results are compared and inputs drawn: hand-worked cases.

Run: .venv/bin/python -m pytest tests/test_op.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from op import TOLERANCE, Op, cast, compare, describe, dyadic, normal


def difference(actual, expected, truth=None, **options):
    """compare, with the truth equal to what is expected unless said otherwise."""
    truth = expected if truth is None else truth
    return compare("y", actual, expected, truth.double() if isinstance(truth, torch.Tensor) else truth, **options)


def test_equal_results_agree_and_empty_ones_too():
    for value in (torch.ones(2, 3), torch.ones(0, 3), torch.tensor(1.5), torch.tensor([1, 2]), "text", [1, 2], None, 2.5, True):
        assert difference(value, value) is None


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_is_relative_to_the_row_but_at_least_a_tenth_of_the_whole(dtype):
    expected = torch.tensor([[8.0, 0.0], [0.25, 0.0], [0.001, 0.0]], dtype=dtype)
    limit = torch.tensor([8.0, 0.8, 0.8], dtype=torch.float64) * TOLERANCE[dtype]  # 0.8 is a tenth of the largest
    for row, allowed in enumerate(limit):
        for factor, found in ((0.9, False), (1.2, True)):
            actual = expected.double().clone()
            actual[row, 1] += factor * allowed
            assert bool(difference(actual.to(dtype), expected)) == found, (row, factor)


def test_one_wrong_token_of_a_thousand_is_found_and_located():
    expected = torch.ones(1000, 4)
    actual = expected.clone()
    actual[617, 2] = 1.01
    found = difference(actual, expected)
    assert found.index == (617, 2) and found.kind == "value" and "(617, 2): got 1.00999" in found.words
    assert found.max_abs == pytest.approx(0.01, rel=1e-4) and found.relative == pytest.approx(0.01, rel=1e-4)


def test_rounding_that_the_reference_suffers_too_is_forgiven():
    truth = torch.tensor([1e-4])
    expected = truth + 1e-5  # the reference itself lost that much
    assert difference(truth + 7e-5, expected, truth) is None
    assert difference(truth + 9e-5, expected, truth)


def test_the_floor_forgives_what_cancellation_left():
    assert difference(torch.tensor([1e-7]), torch.tensor([0.0]))
    assert difference(torch.tensor([1e-7]), torch.tensor([0.0]), floor=0.1) is None
    assert difference(torch.tensor([1e-5]), torch.tensor([0.0]), floor=0.1)


def test_nan_and_infinity():
    inf, nan = float("inf"), float("nan")
    assert difference(torch.tensor([-inf, 1.0]), torch.tensor([-inf, 1.0])) is None
    assert difference(torch.tensor([nan]), torch.tensor([nan])) is None
    assert difference(torch.tensor([nan, 1.0]), torch.tensor([1.0, 1.0])).kind == "nan"
    assert difference(torch.tensor([1.0]), torch.tensor([nan])).kind == "value"
    assert difference(torch.tensor([inf, 1.0]), torch.tensor([-inf, 1.0]))


def test_shapes_are_not_broadcast_and_dtypes_not_promoted():
    assert difference(torch.ones(1, 3), torch.ones(3)).kind == "shape"
    assert difference(torch.tensor(1.0), torch.ones(3)).kind == "shape"
    assert difference(torch.ones(3).double(), torch.ones(3)).kind == "dtype"
    assert difference(torch.ones(3, dtype=torch.int32), torch.ones(3)).kind == "dtype"
    assert difference(torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.int64)) is None
    assert difference(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)).kind == "dtype"


def test_integers_and_exact_outputs_are_compared_bitwise():
    assert difference(torch.tensor([1, 3]), torch.tensor([1, 2])).index == (1,)
    close = torch.tensor([1.0]), torch.tensor([1.0 + 2**-20])
    assert difference(*close) is None and difference(*close, exact=True)


def test_numbers_strings_and_lists():
    assert difference(0.5, 0.5 + 1e-8) is None and difference(0.5, 0.51).relative == pytest.approx(0.0196, rel=1e-2)
    assert difference(torch.tensor(0.5), 0.5) is None and difference([1, 2], torch.tensor([1, 2])) is None
    assert difference(torch.tensor([1, 2]), [1, 2]) is None
    assert difference("ab", "abc").index == (2,) and "from character 2" in difference("ab", "abc").words
    for actual, expected in (([1], [1, 2]), ("1", 1), (True, 1), (None, 1), (1, None), (object(), torch.ones(1))):
        assert difference(actual, expected), (actual, expected)


def test_cast_moves_what_is_not_fixed_and_float64_moves_all():
    op = Op("f", "", "", lambda x, s, i, n: x, st.none(), ("y",), fixed=("s",))
    arguments = {"x": torch.ones(1), "s": torch.ones(1), "i": torch.ones(1, dtype=torch.int64), "n": 3}
    kinds = lambda dtype: [getattr(v, "dtype", None) for v in cast(op, arguments, dtype).values()]  # noqa: E731
    assert kinds(torch.bfloat16) == [torch.bfloat16, torch.float32, torch.int64, None]
    assert kinds(torch.float64) == [torch.float64, torch.float64, torch.int64, None]


def test_cast_puts_the_arguments_in_the_order_of_the_op():
    op = Op("f", "", "", lambda x, n: x, st.none(), ("y",))
    assert list(cast(op, {"n": 3, "x": torch.ones(1)}, torch.float32)) == ["x", "n"]


@given(st.data())
def test_dyadic_sums_are_exact_in_any_order(data):
    x = dyadic(data.draw, 64)
    total = torch.tensor(0.0)
    for value in x[torch.randperm(64)]:
        total = total + value
    assert total == x.double().sum()


@given(st.integers(0, 2**16 - 1))
def test_a_seed_gives_one_tensor(seed):
    draw = lambda strategy: seed  # noqa: E731
    assert torch.equal(normal(draw, 2, 3), normal(draw, 2, 3))
    assert torch.equal(normal(draw, 2, 3, scale=2.0), 2 * normal(draw, 2, 3))


def test_describe_shows_small_tensors_whole_and_large_ones_by_their_beginning():
    lines = describe({"x": torch.arange(3.0), "big": torch.zeros(5, 5), "eps": 1e-5})
    assert "(3) float32" in lines[0] and "[0.0, 1.0, 2.0]" in lines[0] and "…" in lines[1] and "1e-05" in lines[2]


def test_plain_numbers_that_are_no_number_or_endless_equal_themselves_alone():
    nan, endless = float("nan"), float("inf")
    assert difference(nan, nan) is None and difference(endless, endless) is None and difference(1.0, 1.0) is None
    for actual, expected in ((1.0, nan), (nan, 1.0), (endless, -endless), (1.0, endless), (nan, endless)):
        assert difference(actual, expected) is not None, (actual, expected)
