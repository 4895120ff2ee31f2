"""Draws: the published Philox vectors, a scalar NumPy re-implementation, and what a draw may not depend on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from diffprune.draws import draw_noise, draw_pair, draw_times, hash_keys, key_hash, uniform
from diffprune.kernels.philox import _box_muller, philox_4x32

KEYS = [f"mnist/{i:05d}" for i in range(37)] + ["", "ключ", "a" * 500]

# Random123 1.14, tests/kat_vectors: counter, key, output.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al., section 3.3, with Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def scalar_bits(seed: int, key: str, stream: str, draw: int, block: int) -> list[int]:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    stream_word = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest()[:4], "little")
    return scalar_philox([block, draw, low, high], [seed, stream_word])


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_gives_the_published_answers(counter, key, output):
    got = philox_4x32([torch.tensor([word, word]) for word in words(counter)], tuple(words(key)))
    assert [word.tolist() for word in got] == [[word, word] for word in words(output)]
    assert scalar_philox(words(counter), words(key)) == words(output)


def test_noise_is_box_muller_of_the_documented_counters():
    seed, draw, shape = 0xDEADBEEF, 3, (3, 5, 7)  # 105 elements: the last block is cut
    expected = np.empty((len(KEYS), 108))
    for row, key in enumerate(KEYS):
        for block in range(27):
            for pair in (0, 2):
                a, b = scalar_bits(seed, key, "noise", draw, block)[pair : pair + 2]
                radius = np.sqrt(-2 * np.log((a + 1) / 2**32))
                expected[row, 4 * block + pair] = radius * np.cos(2 * np.pi * b / 2**32)
                expected[row, 4 * block + pair + 1] = radius * np.sin(2 * np.pi * b / 2**32)
    noise = draw_noise(seed, KEYS, draw, shape)
    assert noise.shape == (len(KEYS), *shape) and noise.dtype == torch.float32
    expected = expected[:, :105].reshape(noise.shape)
    # float32 rounding is all that separates them (the sine near 0 has an absolute error of a few 1e-16)
    assert np.all(np.abs(noise.numpy() - expected) <= 2.0**-24 * np.abs(expected) + 1e-15)


def test_times_are_the_documented_uniforms():
    for draw, draws in ((0, 1), (2, 8), (7, 8), (13, 8)):
        expected = []
        for key in KEYS:
            high, low = scalar_bits(5, key, "time", draw, 0)[:2]
            u = ((high << 21) | (low >> 11)) / 2**53
            expected.append((draw % draws + u) / draws)
        assert draw_times(5, KEYS, draw, draws).tolist() == np.float32(expected).tolist()


def test_noise_is_standard_normal_and_times_uniform():
    hashes = hash_keys([str(i) for i in range(4000)])
    noise = draw_noise(1, hashes, 0, (50,)).double().flatten()
    n = len(noise)
    assert abs(noise.mean()) < 4 / n**0.5 and abs(noise.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / n) ** 0.5
    times = draw_times(1, hashes, 0).sort().values
    assert (times - torch.linspace(0, 1, 4000)).abs().max() < 1.63 / 4000**0.5  # Kolmogorov-Smirnov, 1%


def test_streams_draws_seeds_and_keys_are_uncorrelated():
    hashes = hash_keys([str(i) for i in range(4000)])
    columns = [draw_noise(seed, hashes, draw, (2,)) for seed, draw in ((0, 0), (0, 1), (1, 0))]
    columns += [uniform(seed, hashes, name, draw)[:, None] for seed, name, draw in ((0, "time", 0), (0, "time", 1))]
    columns += [uniform(0, hashes, "noise")[:, None], uniform(0, hashes, "noise").roll(1)[:, None]]
    table = torch.cat([column.double() for column in columns], dim=1)
    correlation = torch.corrcoef(table.T)
    correlation[6 + 2, 0] = correlation[0, 6 + 2] = 0  # the radius of the first normal is made of that uniform
    assert (correlation - torch.eye(len(correlation))).abs().max() < 5 / 4000**0.5


def test_a_draw_does_not_depend_on_batch_or_order():
    shape = (4, 9)
    times, noise = draw_pair(7, KEYS, 2, 4, shape)
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = draw_pair(7, [KEYS[i] for i in order], 2, 4, shape)
    assert torch.equal(times[order], shuffled[0]) and torch.equal(noise[order], shuffled[1])
    for i, key in enumerate(KEYS):
        one = draw_pair(7, [key], 2, 4, shape)
        assert torch.equal(times[i : i + 1], one[0]) and torch.equal(noise[i : i + 1], one[1])
    assert torch.equal(noise, draw_noise(7, hash_keys(KEYS), 2, shape))


def test_chunks_change_no_bit(monkeypatch):
    whole = draw_noise(7, KEYS, 0, (11,))
    monkeypatch.setattr("diffprune.kernels.philox._CHUNK", 1)
    assert torch.equal(whole, draw_noise(7, KEYS, 0, (11,)))


def test_a_longer_sample_starts_with_the_same_noise():
    assert torch.equal(draw_noise(7, KEYS, 0, (64,))[:, :7], draw_noise(7, KEYS, 0, (7,)))


def test_draws_are_stratified():
    times = torch.stack([draw_times(3, KEYS, draw, 8) for draw in range(16)])
    strata = (times * 8).floor().long()
    assert strata.tolist() == [[draw % 8] * len(KEYS) for draw in range(16)]
    assert not torch.equal(times[:8], times[8:])


def test_extreme_bits_stay_in_range():
    largest = torch.tensor([0xFFFFFFFF, 0, 0xFFFFFFFF, 0, 0x7FFFFFFF])
    angles = torch.tensor([0, 0, 0xFFFFFFFF, 0x40000000, 0xE0000000])
    first, second = _box_muller(largest, angles)
    assert first[0] == 0 and second[0] == 0  # u = 1
    assert first[1] == pytest.approx(np.sqrt(64 * np.log(2)), rel=1e-15) and second[1] == 0
    assert abs(first[3]) < 1e-15 and second[3] == pytest.approx(np.sqrt(64 * np.log(2)), rel=1e-15)
    assert first[4] == pytest.approx(np.sqrt(np.log(2)), rel=1e-12)
    assert second[4] == pytest.approx(-np.sqrt(np.log(2)), rel=1e-12)


def test_time_never_reaches_one(monkeypatch):
    nearly_one = lambda *args, **kwargs: torch.tensor([1 - 2.0**-53], dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr("diffprune.draws.uniform", nearly_one)
    assert 0.9999 < draw_times(0, ["a"], 0).item() < 1


def test_hashes():
    assert key_hash("") == int.from_bytes(hashlib.blake2b(b"", digest_size=8).digest(), "little")
    assert [value % 2**64 for value in hash_keys(KEYS).tolist()] == [key_hash(key) for key in KEYS]
    assert hash_keys([]).shape == (0,) and draw_noise(0, [], 0, (4, 2)).shape == (0, 4, 2)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    for call in (lambda: draw_times(seed, KEYS, 0), lambda: draw_noise(seed, KEYS, 0, (2,))):
        with pytest.raises(ValueError, match=f"seed in .*got {seed}"):
            call()
    assert draw_times(2**32 - 1, KEYS, 0).shape == (len(KEYS),)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="draw in"):
        draw_times(0, KEYS, -1)
    with pytest.raises(ValueError, match="draws >= 1"):
        draw_times(0, KEYS, 0, 0)
    with pytest.raises(ValueError, match="single string"):
        draw_times(0, "mnist", 0)
    with pytest.raises(ValueError, match=r"key hashes \[B\] int64"):
        draw_times(0, torch.zeros(3), 0)
