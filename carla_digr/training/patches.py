"""What the first convolution sees of pictures that are put together from few patches, as those of rooms of tiles are.

Of 2,048 pictures of Red-Fetch-Green's rooms its windows have 131,072 contents, of which 9 differ. So each is convolved
once for a minibatch, and found by its number.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from carla_digr.policy import ActorCritic, to_input


class Patches(NamedTuple):
    """Pictures as numbers of patches.

    Attributes:
        each: different patches, uint8 (K, C, kernel, kernel), in the order in which they were met.
        numbers: int64 (..., rows, columns), which patch is in each window of the first convolution.
    """

    each: NDArray[np.uint8]
    numbers: NDArray[np.int64]


def find_patches(pictures: NDArray[np.uint8], kernel: int, stride: int, most: int) -> Patches | None:
    """The patches of pictures uint8 (T, N, C, H, W) in the windows of a convolution, or None if there are too many.

    Args:
        kernel, stride: of the windows, pixels; others than multiples of 4 are not looked for.
        most: how many different patches there may be.
    """
    channels, height, width = pictures.shape[-3:]
    if kernel % 4 or stride % 4 or width % 4 or pictures.dtype != np.uint8:
        return None
    size = 4 if kernel % 8 or stride % 8 or width % 8 else 8  # pixels that are compared at once
    words = np.ascontiguousarray(pictures).reshape(-1, channels, height, width).view(f"u{size}")
    numbers = np.empty((len(words), (height - kernel) // stride + 1, (width - kernel) // stride + 1), np.int64)
    places = np.empty((most, 3), np.int64)
    before = pictures.shape[1]
    found = _number(words, before, kernel, kernel // size, stride, stride // size, _FACTORS, numbers, places)
    if found < 0:
        return None
    patches = [
        pictures.reshape(-1, channels, height, width)[n, :, y : y + kernel, x * size : x * size + kernel]
        for n, y, x in places[:found]
    ]
    return Patches(np.stack(patches), numbers.reshape(*pictures.shape[:2], *numbers.shape[1:]))


def outputs_of(network: ActorCritic, patches: Patches, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Logits (B, A) and values (B,) of the pictures ``rows`` (B,)."""
    states = to_input(torch.from_numpy(patches.each).to(network.trunk.weight.device))
    known = network.activation(network.convolutions[0](states)).flatten(1)
    numbers = torch.from_numpy(patches.numbers[rows]).to(known.device)
    x = known.index_select(0, numbers.flatten()).view(*numbers.shape, -1).movedim(-1, 1)
    return network.after_first(x)


_FACTORS = np.random.default_rng(0).integers(0, 2**63, 4096, np.uint64) | np.uint64(1)


@njit(cache=True, nogil=True)
def _number(words, before, height, width, down, along, factors, numbers, places):
    """Number the windows of pictures (N, C, H, W in words): how many patches there are, -1 for over places (K, 3).

    A window that shows what it did in the picture ``before`` it needs no search; others are found by a hash.
    """
    most, channels = places.shape[0], words.shape[1]
    slots = 1
    while slots < 4 * most:
        slots *= 2
    held = np.full(slots, -1, np.int64)
    found = 0
    for n in range(words.shape[0]):
        for row in range(numbers.shape[1]):
            for column in range(numbers.shape[2]):
                y, x = row * down, column * along
                if n >= before and _same(words, n - before, y, x, n, y, x, height, width):
                    numbers[n, row, column] = numbers[n - before, row, column]
                    continue
                code, k = np.uint64(0), 0
                for c in range(channels):
                    for i in range(height):
                        for j in range(width):
                            code += np.uint64(words[n, c, y + i, x + j]) * factors[k % factors.shape[0]]
                            k += 1
                slot = (code >> np.uint64(32)) & np.uint64(slots - 1)
                while held[slot] >= 0:
                    at, top, left = places[held[slot]]
                    if _same(words, at, top, left, n, y, x, height, width):
                        break
                    slot = (slot + np.uint64(1)) & np.uint64(slots - 1)
                if held[slot] < 0:
                    if found == most:
                        return -1
                    places[found, 0], places[found, 1], places[found, 2] = n, y, x
                    held[slot] = found
                    found += 1
                numbers[n, row, column] = held[slot]
    return found


@njit(cache=True, nogil=True)
def _same(words, at, top, left, n, y, x, height, width):
    """Whether two windows show the same."""
    for c in range(words.shape[1]):
        for i in range(height):
            for j in range(width):
                if words[at, c, top + i, left + j] != words[n, c, y + i, x + j]:
                    return False
    return True
