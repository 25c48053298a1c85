import subprocess
import sys

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data.ids import check_ids, content_ids, digest, fractions, mix, seeds, text_ids

DTYPES = [torch.uint8, torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 8, 13])
def test_equal_rows_have_equal_ids_and_others_do_not(dtype, width):
    x = torch.randint(0, 2, (40, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    unique = x.unique(dim=0)
    ids = content_ids(unique)
    assert ids.unique().numel() == len(unique)
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(1))
    assert torch.equal(content_ids(unique[order]), ids[order])
    assert torch.equal(content_ids(unique[:1]), ids[:1])


def test_whole_numbers_as_floats_do_not_collide():
    assert content_ids(torch.arange(200_000).float()).unique().numel() == 200_000


def test_copies_get_ids_of_their_own_and_the_first_keeps_its_id():
    a, b = text_ids(["x", "y", "x", "x"]), text_ids(["x", "y"])
    assert torch.equal(a[:2], b)
    assert a.unique().numel() == 4
    x = torch.tensor([[1.0], [1.0], [1.0]])
    assert content_ids(x).unique().numel() == 3


def test_rows_of_mappings_and_tuples_are_told_apart_by_every_part():
    a, b = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0])
    assert content_ids({"a": a, "b": b}).unique().numel() == 2
    assert int(content_ids((a, b))[0]) != int(content_ids((b, a))[0])


def test_large_rows_are_hashed_in_parts_to_the_same_ids():
    x = torch.arange(3 * 700_000, dtype=torch.float32).view(3, -1)
    assert torch.equal(content_ids(x)[1:], content_ids(x[1:]))


def test_ids_are_the_same_in_another_process():
    code = (
        "import torch; from limbeck.data.ids import *; "
        "print(text_ids(['a']).item(), content_ids(torch.ones(1, 5)).item(), digest('a', torch.ones(2)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == text_ids(["a"]).item()
    assert int(out[1]) == content_ids(torch.ones(1, 5)).item()
    assert out[2] == digest("a", torch.ones(2))


def test_mix_is_splitmix64():
    # The first outputs of the generator of Steele, Lea and Flood for seed 0.
    step, wrap = 0x9E3779B97F4A7C15, 1 << 64
    states = torch.tensor([0, step - wrap])
    assert [v % wrap for v in mix(states).tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_fractions_are_uniform_and_depend_on_the_seed():
    ids = torch.arange(100_000)
    u = fractions(ids)
    counts = (u * 10).long().bincount(minlength=10)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 27.9  # chi-square with 9 degrees at 0.1 %
    correlation = torch.corrcoef(torch.stack([u, fractions(ids, seed=1)]))[0, 1]
    assert abs(float(correlation)) < 0.02


def test_seeds_differ_by_sample_view_and_seed():
    ids = torch.arange(1000)
    all_seeds = torch.cat([seeds(ids, view, seed) for view in range(5) for seed in range(5)])
    assert all_seeds.unique().numel() == 25_000


@pytest.mark.parametrize(
    ("ids", "length", "found"),
    [
        (torch.tensor([1, 2, 2]), 3, "more than once, such as 2"),
        (torch.tensor([1, 2]), 3, r"shape \(2,\)"),
        (torch.tensor([0.5, 1.5]), 2, "float32"),
    ],
)
def test_bad_ids_are_refused(ids, length, found):
    with pytest.raises(UsageError, match=found):
        check_ids(ids, length, "ids")
