"""T2: the noise is N(0, (sigma C)^2), independent across steps, tensors and coordinates."""

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats
from torch import nn

from dpsgd import PrivateStep, clipping, engines
from dpsgd.noise import Gaussian
from dpsgd.normals import Normals


def normals(key, start, count):
    out = torch.empty(count)
    for place, piece in Normals().pieces(key, start, count):
        out[place : place + len(piece)] = piece
    return out


def released(steps=3, sigma=1.7, bound=0.3, dtype=torch.float32, key=None):
    """Releases of a model whose gradients are zero, standardised; one dict per step."""
    model = nn.Sequential(nn.Linear(100, 150), nn.Linear(150, 50)).to(dtype)
    step = PrivateStep(
        engines.Vmap(model, lambda m, b: m(b).sum(1) * 0),
        torch.optim.SGD(model.parameters(), lr=0.0),
        clipping=clipping.Flat(bound),
        noise=Gaussian(key),
        noise_multiplier=sigma,
        expected_batch_size=2.0,
    )
    out = []
    for number in range(steps):
        if number != 1:  # the second batch is empty: it is released all the same
            step.accumulate(torch.randn(4, 100, dtype=dtype))
        step.release()
        out.append(
            {n: (p.grad * 2.0 / (sigma * bound)).double() for n, p in model.named_parameters()}
        )
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tensor_of_every_step_has_the_planned_variance(dtype):
    for step in released(dtype=dtype):
        everything = torch.cat([z.flatten() for z in step.values()])
        assert len(everything) > 20_000
        low, high = stats.chi2.interval(1 - 1e-6, len(everything))
        assert low < everything.square().sum() < high
        # a deficit of 5 % in the noise would be far outside
        assert 0.95**2 * len(everything) < low
        for z in step.values():
            low, high = stats.chi2.interval(1 - 1e-6, z.numel())
            assert low < z.square().sum() < high


def test_the_noise_is_normal():
    z = torch.cat([z.flatten() for step in released() for z in step.values()])
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-6
    assert abs(z.mean()) < 6 / math.sqrt(len(z))
    assert abs(stats.kurtosis(z.numpy())) < 6 * math.sqrt(24 / len(z))


def test_steps_tensors_and_neighbours_are_uncorrelated():
    first, second, third = (torch.cat([z.flatten() for z in s.values()]) for s in released())
    pairs = [(first, second), (second, third), (first, third), (first[1:], first[:-1])]
    half = len(first) // 2
    pairs += [(first[:half], first[half : 2 * half]), (first[1024:], first[:-1024])]
    for a, b in pairs:
        assert abs(torch.dot(a, b)) < 6 * math.sqrt(len(a))
    assert len(torch.cat([first, second, third]).float().unique()) > 0.95 * 3 * len(first) * 0.99


def test_fresh_keys_give_fresh_noise():
    a, b = (Gaussian() for _ in range(2))
    first, second = ({"w": torch.zeros(1000)} for _ in range(2))
    a.add_(first, 1.0, 0)
    b.add_(second, 1.0, 0)
    assert abs(torch.dot(first["w"], second["w"])) < 6 * math.sqrt(1000)


def test_noise_depends_on_the_flat_position_only(key):
    whole = {"a": torch.zeros(3000), "b": torch.zeros(40, 50)}
    Gaussian(key).add_(whole, 2.0, step=7)
    shards = {"b": torch.zeros(15, 50), "a": torch.zeros(999)}
    Gaussian(key).add_(shards, 2.0, step=7, offsets={"b": 3000 + 5 * 50, "a": 1001})
    assert torch.equal(shards["b"], whole["b"][5:20])
    assert torch.equal(shards["a"], whole["a"][1001:2000])


BLOCK = 1 << 19


@pytest.mark.parametrize(
    ("start", "count"),
    [(0, 1), (1, 1), (17, 5000), (BLOCK // 2 - 3, 7), (BLOCK - 1, 2), (BLOCK + 5, 2 * BLOCK)],
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_part_of_the_stream_is_the_same_bits(key, start, count, threads):
    """Whatever comes before it, how long it is, and however many threads draw it."""
    whole = normals(key, 0, 4 * BLOCK)
    used = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        part = normals(key, start, count)
    finally:
        torch.set_num_threads(used)
    assert torch.equal(part, whole[start : start + count])


def test_the_radii_and_angles_are_those_of_the_stream(key):
    """An independent Box-Muller on the AES words, in double precision."""
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(cipher.update(bytes(4 * BLOCK)), dtype=np.int32).astype(np.float64)
    radius = np.sqrt(-2 * np.log((np.abs(words[: BLOCK // 2]) + 0.5) / 2**31))
    angle = words[BLOCK // 2 :] * np.pi / 2**31
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    found = normals(key, 0, BLOCK).numpy()
    np.testing.assert_allclose(found, expected, atol=4e-4)  # radii near 0: float32 near u = 1
    large = np.abs(expected) > 0.1
    np.testing.assert_allclose(found[large], expected[large], rtol=1e-5)


def test_one_flat_buffer_gets_the_noise_of_its_parts(key):
    """Tensors that lie in one buffer are filled at once; one that lies apart is not mistaken."""
    shapes = {"a": (30, 40), "b": (7,), "c": (), "d": (3, 5, 2)}
    apart = {name: torch.zeros(shape) for name, shape in shapes.items()}
    flat = torch.zeros(sum(total.numel() for total in apart.values()))
    views, at = {}, 0
    for name, total in apart.items():
        views[name] = flat[at : at + total.numel()].view(total.shape)
        at += total.numel()
    reverse = dict(reversed(views.items()))
    Gaussian(key).add_(apart, 1.5, 3)
    Gaussian(key).add_(views, 1.5, 3)
    assert all(torch.equal(views[name], total) for name, total in apart.items())
    flat.zero_()
    Gaussian(key).add_(reverse, 1.5, 3)
    other = {name: torch.zeros(shapes[name]) for name in reverse}
    Gaussian(key).add_(other, 1.5, 3)
    assert all(torch.equal(reverse[name], total) for name, total in other.items())


def test_noise_is_added_to_strided_tensors_in_logical_order(key):
    plain, strided = torch.zeros(30, 40), torch.zeros(40, 30).t()
    Gaussian(key).add_({"w": plain}, 1.0, 0)
    Gaussian(key).add_({"w": strided}, 1.0, 0)
    assert torch.equal(plain, strided)


def test_a_step_used_twice_is_refused():
    noise = Gaussian()
    for step in (0, 1, 5):
        noise.add_({"w": torch.zeros(2)}, 1.0, step)
    for step in (0, 1, 5):
        with pytest.raises(ValueError, match="has been used"):
            noise.add_({"w": torch.zeros(2)}, 1.0, step)
    noise.add_({"w": torch.zeros(2)}, 1.0, 3)


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_a_senseless_std_is_refused_before_the_step_is_used(std):
    noise = Gaussian()
    with pytest.raises(ValueError, match="noise std"):
        noise.add_({"w": torch.zeros(2)}, std, 0)
    noise.add_({"w": torch.zeros(2)}, 1.0, 0)


def test_coarse_sums_are_refused():
    with pytest.raises(ValueError, match="float32 or float64"):
        Gaussian().add_({"w": torch.zeros(2, dtype=torch.bfloat16)}, 1.0, 0)


def test_keys_are_checked_and_not_shown(key):
    with pytest.raises(ValueError, match="32 bytes, got 3 bytes"):
        Gaussian(b"abc")
    assert key.hex() not in repr(Gaussian(key))
    assert repr(key) not in repr(vars(Gaussian)) + repr(Gaussian(key))


def test_torch_seeds_do_not_move_the_noise():
    torch.manual_seed(0)
    a = released(1)
    torch.manual_seed(0)
    b = released(1)
    assert not torch.equal(a[0]["0.weight"], b[0]["0.weight"])


def test_the_tail_reaches_past_four_sigma(key):
    z = normals(key, 0, 1_000_000)
    expected = 1_000_000 * 2 * stats.norm.sf(4)
    assert abs(int((z.abs() > 4).sum()) - expected) < 6 * math.sqrt(expected)


@pytest.mark.slow
def test_the_tail_is_normal_past_six_sigma(key):
    """2^30 normals: about two lie past six sigma, about 616 past five."""
    past = {5: 0, 6: 0}
    total, chunk = 1 << 30, 1 << 24
    for start in range(0, total, chunk):
        z = normals(key, start, chunk).abs()
        past = {bound: count + int((z > bound).sum()) for bound, count in past.items()}
    for bound, count in past.items():
        expected = total * 2 * stats.norm.sf(bound)
        assert abs(count - expected) < 6 * math.sqrt(expected)
    assert past[6] > 0


@pytest.mark.slow
def test_many_normals_are_normal(key):
    """2^26 of them: chi-square over 1000 equally likely cells, and Kolmogorov-Smirnov."""
    edges = torch.tensor(stats.norm.ppf(np.arange(1, 1000) / 1000), dtype=torch.float32)
    total, chunk = 1 << 26, 1 << 22
    counts, largest = torch.zeros(1000), 0.0
    for start in range(0, total, chunk):
        z = normals(key, start, chunk)
        counts += torch.bincount(torch.bucketize(z, edges), minlength=1000)
        if start == 0:
            largest = stats.kstest(z.double().numpy(), "norm").pvalue
    assert stats.chisquare(counts.double().numpy()).pvalue > 1e-6
    assert largest > 1e-6


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_change_the_noise(default, key):
    expected = {"w": torch.zeros(3000)}
    Gaussian(key).add_(expected, 1.0, 0)
    found = {"w": torch.zeros(3000)}
    torch.set_default_dtype(default)
    try:
        Gaussian(key).add_(found, 1.0, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found["w"], expected["w"])


def test_the_default_device_does_not_change_the_noise(key):
    with torch.device("meta"):
        found = {"w": torch.zeros(3000, device="cpu")}
        Gaussian(key).add_(found, 1.0, 0)
    expected = {"w": torch.zeros(3000)}
    Gaussian(key).add_(expected, 1.0, 0)
    assert torch.equal(found["w"], expected["w"])


@pytest.mark.parametrize("std", [1e-30, 1e-20, 1e20, 1e30])
def test_the_noise_has_any_size_that_is_asked_for(std, key):
    """std^2 would vanish or overflow in float32 here."""
    one, scaled = {"w": torch.zeros(5000)}, {"w": torch.zeros(5000)}
    Gaussian(key).add_(one, 1.0, 0)
    Gaussian(key).add_(scaled, std, 0)
    torch.testing.assert_close(scaled["w"].double() / std, one["w"].double(), rtol=1e-6, atol=0)


def test_empty_tensors_take_no_noise_and_no_place(key):
    empty = torch.zeros(0, dtype=torch.float64)
    some = {"a": torch.zeros(5), "none": empty, "b": torch.zeros(7)}
    Gaussian(key).add_(some, 1.0, 0)
    whole = {"w": torch.zeros(12)}
    Gaussian(key).add_(whole, 1.0, 0)
    assert torch.equal(torch.cat([some["a"], some["b"]]), whole["w"])
    shards = {"none": torch.zeros(0), "b": torch.zeros(5)}
    Gaussian(key).add_(shards, 1.0, 0, offsets={"none": 2, "b": 0})
    assert torch.equal(shards["b"], whole["w"][:5])
