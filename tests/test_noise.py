"""Noise: equal bits to a second implementation in plain Python, good statistics, and nothing depends on the batch."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from robustmoe.noise import Noise, permutation

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """One output of splitmix64 from ``state``, as its authors publish it in C, on unsigned 64-bit integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def stream(index: int, *key: int) -> int:
    state = splitmix64(splitmix64(index & MASK))
    for part in key:
        state = splitmix64(state ^ splitmix64(part & MASK))
    return state


def signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def test_the_second_implementation_gives_the_published_first_output() -> None:
    """splitmix64 seeded with 0 begins with 0xE220A8397B1DCDAF."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("key", [(), (0,), (7, 3), (-1, 2**62)])
def test_bits_equal_plain_python(key: tuple[int, ...]) -> None:
    index = torch.tensor([0, 1, 17, 123456789, -5, 2**62])
    noise = Noise.of(index, *key)
    assert noise.state.tolist() == [signed(stream(i, *key)) for i in index.tolist()]
    expected = [
        [signed(splitmix64((stream(i, *key) ^ MASK) ^ splitmix64(p))) for p in range(6)] for i in index.tolist()
    ]
    assert noise.bits(2, 3).flatten(1).tolist() == expected
    uniform = [[(z & MASK) >> 40 for z in row] for row in expected]
    assert (noise.uniform(6) * 2**24).tolist() == uniform


@pytest.mark.parametrize(("n", "shape"), [(5, (3, 7)), (9, (40, 40, 40)), (3, (200, 400)), (4, ())])
def test_many_numbers_are_drawn_as_few_are(n: int, shape: tuple[int, ...]) -> None:
    """More than are drawn at a time, by the formulas on whole tensors; what was drawn before is left alone."""
    noise = Noise.of(torch.arange(n) * 7919, 3)
    state, bits = noise.state.clone(), noise.bits(*shape)
    uniform = ((bits >> 40) & (2**24 - 1)).to(torch.float32) * 2.0**-24
    assert torch.equal(noise.uniform(*shape), uniform)
    radius = torch.sqrt(-2.0 * torch.log1p(-noise.fold(1).uniform(*shape)))
    assert torch.equal(noise.normal(*shape), radius * torch.cos(2.0 * torch.pi * noise.fold(2).uniform(*shape)))
    assert torch.equal(noise.state, state)
    assert torch.equal(noise.bits(*shape), bits)
    last = Noise.of(torch.tensor([7919 * (n - 1)]), 3)
    assert torch.equal(noise.normal(*shape)[-1:], last.normal(*shape))


def test_shapes_and_ranges() -> None:
    noise = Noise.of(torch.arange(5), 1)
    assert len(noise) == 5
    assert noise.uniform().shape == (5,)
    assert noise.uniform(2, 3).shape == noise.normal(2, 3).shape == (5, 2, 3)
    assert noise.uniform(2).dtype == noise.normal(2).dtype == torch.float32
    many = noise.uniform(100_000)
    assert many.min() >= 0
    assert many.max() < 1
    assert torch.isfinite(noise.normal(100_000)).all()
    assert Noise.of(torch.arange(0)).normal(3).shape == (0, 3)


def test_a_draw_belongs_to_the_image_not_to_the_batch() -> None:
    index = torch.tensor([4, 9, 2, 100, 7])
    whole = Noise.of(index, 3, 1).normal(3, 4)
    for i in range(5):
        assert torch.equal(Noise.of(index[i : i + 1], 3, 1).normal(3, 4), whole[i : i + 1])
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(Noise.of(index[order], 3, 1).normal(3, 4), whole[order])
    assert torch.equal(Noise.of(index, 3, 1)[order].normal(3, 4), whole[order])
    assert torch.equal(Noise.of(index, 3).fold(1).normal(3, 4), whole)


def test_drawing_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    Noise.of(torch.arange(3), 1).normal(5)
    permutation(10, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_differ_in_image_and_key() -> None:
    """A thousand images under twenty keys, both orders of two keys among them: no state occurs twice.

    The images are none of the keys: the stream of image i under key a is that of image a under key i.
    """
    index = torch.arange(1000, 2000)
    keys = [(a, b) for a in range(4) for b in range(4)] + [(a,) for a in range(4)]
    assert torch.cat([Noise.of(index, *key).state for key in keys]).unique().numel() == 20 * 1000


UNIFORMS = {
    "over places": lambda: Noise.of(torch.tensor([3]), 0).uniform(20_000)[0],
    "over images": lambda: Noise.of(torch.arange(20_000), 0).uniform(),
    "over keys": lambda: torch.cat([Noise.of(torch.tensor([3]), key).uniform() for key in range(500)]),
}


@pytest.mark.parametrize("case", UNIFORMS)
def test_uniform_is_uniform(case: str) -> None:
    draws = UNIFORMS[case]()
    assert stats.kstest(draws.double().numpy(), "uniform").pvalue > 0.01
    counts = torch.histc(draws, 20, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    n = len(draws)  # mean 1/2, variance 1/12, within four standard errors
    assert abs(float(draws.mean()) - 1 / 2) < 4 * (1 / 12 / n) ** 0.5
    assert abs(float(draws.var()) - 1 / 12) < 4 * (1 / 180 / n) ** 0.5


def test_normal_is_normal() -> None:
    draws = Noise.of(torch.arange(200), 5).normal(200).flatten().double()
    n = len(draws)
    assert stats.kstest(draws.numpy(), "norm").pvalue > 0.01
    # moments 0, 1, 0, 3 with standard errors sqrt(1, 2, 15, 96) / sqrt(n)
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float((draws**power).mean()) - moment) < 4 * deviation / n**0.5


def test_folds_are_independent() -> None:
    """Neighbouring keys, images and places, and a stream beside its own fold: correlations below four standard
    errors.
    """
    noise = Noise.of(torch.arange(5000), 1)
    place = noise.uniform(2)
    pairs = {
        "keys": (noise.fold(0).uniform(), noise.fold(1).uniform()),
        "images": (noise.uniform()[1:], noise.uniform()[:-1]),
        "places": (place[:, 0], place[:, 1]),
        "parent and child": (noise.uniform(), noise.fold(0).uniform()),
        "parent's place 1 and child 1": (place[:, 1], noise.fold(1).uniform()),
        "parts of a normal": (noise.fold(1).uniform(), noise.fold(2).uniform()),
    }
    for name, pair in pairs.items():
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 4 / 5000**0.5, name
        table = torch.histogramdd(torch.stack(pair, 1), [8, 8], range=[0, 1, 0, 1]).hist
        assert stats.chi2_contingency(table.numpy()).pvalue > 0.001, name


def test_a_permutation_is_one_and_depends_on_its_key_alone() -> None:
    for n in (0, 1, 2, 1000):
        assert permutation(n, 3, 1).sort().values.tolist() == list(range(n))
    order = permutation(1000, 3, 1)
    torch.manual_seed(99)
    assert torch.equal(permutation(1000, 3, 1), order)
    assert not torch.equal(permutation(1000, 3, 2), order)
    assert not torch.equal(permutation(1000, 1, 3), order)


def test_permutations_are_uniform() -> None:
    """All 24 orders of 4, over 1,200 keys, as often."""
    seen = torch.stack([permutation(4, key) for key in range(1200)]) @ torch.tensor([64, 16, 4, 1])
    counts = seen.unique(return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_image_and_key_do_not_change_places() -> None:
    index = torch.arange(50)
    states = torch.stack([Noise.of(index, seed).state for seed in range(50)])
    assert len(set(states.flatten().tolist())) == 2500, "image 3 of seed 5 must not draw what image 5 of seed 3 draws"


def test_a_fold_is_not_a_draw() -> None:
    noise = Noise.of(torch.arange(20), 7)
    assert not torch.equal(noise.fold(3).state, noise.bits(4)[:, 3])


def test_streams_fold_by_an_integer_of_their_own() -> None:
    noise = Noise.of(torch.tensor([3, 4, 5]))
    each = noise.fold(torch.tensor([7, -1, 0]))
    assert [each.state[i].item() for i in range(3)] == [noise.fold(k).state[i].item() for i, k in enumerate((7, -1, 0))]
