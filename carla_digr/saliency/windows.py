"""Many perturbed copies of one state through an ActorCritic, each computed only where it differs.

A bump changes a window of the picture, so of every layer's output there is a window that may differ from what the
undisturbed state gives; all else is taken from there. The first convolution is linear in its input and the bump is a
product of a function of the row and one of the column, so what the bump does to its output is two small matrix
products a position, with no perturbed picture made at all. Of pictures that differ from the state in pixels of their
own, the outputs that see one of those are computed, in one matrix product a layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from carla_digr.policy import SOFTPLUS_BETA, ActorCritic

STATES = 4  # at most in a batch
NEGLIGIBLE = 8  # times the dtype's resolution: a bump that low changes no value near 1


class _Span(NamedTuple):
    """Positions first <= i < end along one axis of a layer's output."""

    first: int
    end: int

    def seen_by(self, layer: nn.Conv2d, axis: int, size: int) -> _Span:
        """Outputs of a convolution, of ``size`` along the axis, that depend on these inputs."""
        kernel, stride = layer.kernel_size[axis], layer.stride[axis]
        first = max(0, -(-(self.first - kernel + 1) // stride))
        return _Span(first, (self.end - 1) // stride + 1).within(_Span(0, size))

    def within(self, other: _Span) -> _Span:
        """What lies in another one; at least one position of that, for a window must not be empty."""
        first = min(max(self.first, other.first), other.end - 1)
        return _Span(first, max(first + 1, min(self.end, other.end)))

    def needed_by(self, layer: nn.Conv2d, axis: int) -> _Span:
        """Inputs of a convolution that these outputs depend on."""
        kernel, stride = layer.kernel_size[axis], layer.stride[axis]
        return _Span(self.first * stride, (self.end - 1) * stride + kernel)


def blended_logits(
    policy: ActorCritic, states: Tensor, differences: Tensor, bumps_y: Tensor, bumps_x: Tensor, batch: int
) -> Tensor:
    """Logits of the states s + k_i(y) l_j(x) d for all rows i and columns j of bumps.

    Args:
        policy: the network, with at least one convolution.
        states: s, float (B, C, H, W).
        differences: d, float (B, C, H, W).
        bumps_y: k, float (R, H), each with one maximum, on the CPU.
        bumps_x: l, float (S, W), likewise.
        batch: about how many perturbed states are computed at a time.

    Returns:
        float (B, R, S, A).
    """
    placed, moved = (values.to(policy.trunk.weight.device) for values in (states, differences))
    result = placed.new_empty(len(states), len(bumps_y), len(bumps_x), policy.actions)
    for first in range(0, len(states), STATES):
        some = slice(first, min(first + STATES, len(states)))
        _Windows(policy, placed[some], moved[some], bumps_y, bumps_x).fill(result[some], batch)
    return result.to(states.device)


class Changes(NamedTuple):
    """Pixels in which some states differ from an undisturbed one, each at most once.

    Attributes:
        state, row, column: int64 (N,), number of the state, and where the pixel is.
        values: float (N, C), what it has there.
    """

    state: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    values: NDArray[np.floating]

    def made(self, undisturbed: NDArray[np.floating], count: int) -> NDArray[np.floating]:
        """The states, (count, C, H, W), of an undisturbed one (C, H, W)."""
        states = np.repeat(undisturbed[None], count, axis=0)
        states[self.state, :, self.row, self.column] = self.values
        return states


def kernels(policy: ActorCritic) -> list[Tensor]:
    """Each convolution's weights as `changed_features` multiplies by them: (inputs of a window, channels)."""
    first, *others = (cast(nn.Conv2d, layer).weight for layer in policy.convolutions)
    return [first.flatten(1).t(), *(weight.permute(0, 2, 3, 1).flatten(1).t() for weight in others)]


def changed_features(
    policy: ActorCritic,
    undisturbed: Tensor,
    activated: Sequence[Tensor],
    changes: Changes,
    count: int,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """What the policy's trunk takes of states that differ from an undisturbed one in some pixels.

    Args:
        policy: the network, with at least one convolution.
        undisturbed: float (1, C, H, W).
        activated: from ``policy.trace`` of that.
        changes: to the states 0 to ``count`` - 1.
        count: B.
        weights: of who keeps them, from ``kernels``.

    Returns:
        float (B, F), where the weights are.
    """
    device = policy.trunk.weight.device
    places = _Places(*changes[:3])
    outputs = torch.zeros(0)  # of the layer below, a row each: those of the undisturbed state, then the others
    index: NDArray[np.int64] = np.zeros((0, 0, 0), np.int64)  # (B, rows, columns) of the layer below: which of them
    layers = cast(list[nn.Conv2d], [*policy.convolutions])
    for layer, weight, there in zip(layers, weights or kernels(policy), activated, strict=True):
        rows, columns = there.shape[2:]
        places = places.seen_by(layer, (count, rows, columns))
        if there is activated[0]:
            seen = torch.from_numpy(_patches(layer, undisturbed[0].cpu().numpy(), changes, places, count)).to(device)
        else:
            windows = index.ravel()[places.windows(layer, (1, *index.shape[1:]))]
            seen = outputs.index_select(0, torch.from_numpy(windows.ravel()).to(device))
            seen = seen.view(len(windows), windows.shape[1] * outputs.shape[1])
        others = _of_few(policy, torch.addmm(cast(Tensor, layer.bias), seen, weight))
        outputs = torch.cat([there[0].flatten(1).t(), others])
        index = np.empty((count, rows, columns), np.int64)
        index[:] = np.arange(rows * columns).reshape(rows, columns)
        index[places] = np.arange(rows * columns, len(outputs))
    features = outputs.index_select(0, torch.from_numpy(index.ravel()).to(device)).view(count, -1, outputs.shape[1])
    return features.transpose(1, 2).flatten(1)


def _patches(
    layer: nn.Conv2d, undisturbed: NDArray[np.floating], changes: Changes, places: _Places, count: int
) -> NDArray[np.floating]:
    """What the first convolution's outputs at ``places`` see: (N, inputs). Only the rows that they see are made."""
    down, height = layer.stride[0], layer.kernel_size[0]
    top, bottom = (int(places.row.min()), int(places.row.max())) if len(places.row) else (0, 0)
    first, end = top * down, bottom * down + height
    inside = (changes.row >= first) & (changes.row < end)
    state, row, column, values = changes
    of_band = Changes(state[inside], row[inside] - first, column[inside], values[inside])
    band = of_band.made(undisturbed[:, first:end], count)
    return band.ravel()[places._replace(row=places.row - top).windows(layer, band.shape[1:])]


def trunk_passes(rows: int, states: int, batch: int) -> int:
    """How often `blended_logits` calls the policy's trunk for so many rows of bumps, for who tells its progress."""
    groups = [min(STATES, states - first) for first in range(0, states, STATES)]
    return sum(math.ceil(rows / _together(batch, group)) for group in groups)


def _together(batch: int, states: int) -> int:
    """Neighbouring bumps along an axis that share their windows."""
    return max(1, round(math.sqrt(batch / states)))


class _Places(NamedTuple):
    """Of some states pixels, or outputs of a layer: number of the state, row and column, int64 (N,) each."""

    state: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]

    def seen_by(self, layer: nn.Conv2d, shape: tuple[int, int, int]) -> _Places:
        """Outputs of a convolution, of (states, rows, columns) in all, that may see one of them."""
        (down, across), (count, rows, columns) = layer.stride, shape
        # Blocks of stride x stride inputs, with room for the last inputs, which no output may see.
        height, width = rows + _reach(layer, 0), columns + _reach(layer, 1)
        blocks = np.zeros(count * height * width, np.bool_)
        blocks[(self.state * height + self.row // down) * width + self.column // across] = True
        # Where one of the blocks from a place on is, over the end of a row and a state too, where no output is.
        for reach, step in ((_reach(layer, 1), 1), (_reach(layer, 0), width)):
            for _ in range(reach - 1):
                blocks[:-step] |= blocks[step:]
        line, column = np.divmod(np.flatnonzero(blocks), width)
        state, row = np.divmod(line, height)
        inside = (row < rows) & (column < columns)
        return _Places(state[inside], row[inside], column[inside])

    def windows(self, layer: nn.Conv2d, shape: Sequence[int]) -> NDArray[np.int64]:
        """Flat numbers, in (states, channels, height, width), of the inputs that these outputs see: (N, inputs).

        Args:
            shape: channels, height, width.
        """
        (rows, columns), (down, across), (channels, height, width) = layer.kernel_size, layer.stride, shape
        first = (self.state * (channels * height) + self.row * down) * width + self.column * across
        return first[:, None] + _window(channels, rows, columns, height, width)


@functools.lru_cache
def _window(channels: int, rows: int, columns: int, height: int, width: int) -> NDArray[np.int64]:
    """Flat numbers, in (channels, height, width), of a window's inputs from its first one on."""
    lines = (np.arange(channels)[:, None] * height + np.arange(rows)) * width
    return (lines[..., None] + np.arange(columns)).ravel()


def _reach(layer: nn.Conv2d, axis: int) -> int:
    """Blocks of as many inputs as the stride that an output sees, along an axis."""
    return -(-layer.kernel_size[axis] // layer.stride[axis])


class _Windows:
    """The passes of a few states."""

    def __init__(self, policy: ActorCritic, states: Tensor, differences: Tensor, bumps_y: Tensor, bumps_x: Tensor):
        self._policy = policy
        self._layers = [cast(nn.Conv2d, layer) for layer in policy.convolutions]
        hidden = [values.permute(0, 2, 3, 1) for values in policy.trace(states)[2][:-1]]
        self._sizes = [values.shape[1:3] for values in hidden]
        self._first = hidden[0].transpose(1, 2).transpose(0, 1)  # (columns, B, rows, channels)
        self._usual = [policy.activation(values) for values in hidden]  # each (B, rows, columns, channels)
        self._parts = _parts(self._layers[0], differences)
        self._bumps = bumps_y, bumps_x
        kernel, stride = self._layers[0].kernel_size[0], self._layers[0].stride[0]
        at_rows, at_columns = (
            bumps.to(states.device).unfold(1, kernel, stride).transpose(0, 1) for bumps in self._bumps
        )
        self._at_rows = at_rows
        self._at_columns = torch.cat([at_columns, torch.ones_like(at_columns[..., :1])], dim=2)  # what is there anyway

    def fill(self, result: Tensor, batch: int) -> None:
        """The logits of all centres, (B, R, S, A)."""
        together = _together(batch, len(result))
        rows, columns = (
            [slice(first, min(first + together, count)) for first in range(0, count, together)]
            for count in result.shape[1:3]
        )
        spans_x = [self._spans(self._bumps[1][some], 1) for some in columns]
        for some in rows:
            spans_y = self._spans(self._bumps[0][some], 0)
            changes = self._changes(some, spans_y[0])
            usual = self._usual[-1].permute(0, 3, 1, 2)[:, None, None]
            features = usual.repeat(1, _length(some), result.shape[2], 1, 1, 1)
            for others, across in zip(columns, spans_x, strict=True):
                window = self._last(changes, others, (spans_y, across)).permute(0, 1, 2, 5, 3, 4)
                features[:, :, others, :, slice(*spans_y[-1]), slice(*across[-1])] = window
            trunk = self._policy.activation(self._policy.trunk(features.flatten(3)))
            result[:, some] = self._policy.policy_head(trunk)

    def _changes(self, rows: slice, span: _Span) -> Tensor:
        """What each column of the first kernel gives at some rows of bumps, and what the undisturbed state gives.

        Returns:
            float (columns, kx + 1, B, bumps, rows, channels).
        """
        ys = slice(*span)
        count, _, states, columns, kernel, channels = self._parts[ys].shape
        found = torch.bmm(self._at_rows[ys, rows], self._parts[ys].flatten(2))
        changes = found.new_empty(columns, kernel + 1, states, _length(rows), count, channels)
        changes[:, :-1] = found.view(count, -1, states, columns, kernel, channels).permute(3, 4, 2, 1, 0, 5)
        changes[:, -1] = self._first[:, :, None, ys]
        return changes

    def _last(self, changes: Tensor, centres: slice, spans: tuple[list[_Span], list[_Span]]) -> Tensor:
        """The window of the last convolution's activation: (B, bumps in y, bumps in x, rows, columns, channels)."""
        rows, columns = spans
        xs = slice(*columns[0])
        states, some, count, channels = changes.shape[2:]
        found = torch.bmm(self._at_columns[xs, centres], changes[xs].flatten(2))
        found = found.view(-1, _length(centres), states, some, count, channels).permute(2, 3, 1, 4, 0, 5)
        values = _activated(self._policy, found)
        of_centres = values.shape[:3]
        values = values.flatten(0, 2)
        for index, layer in enumerate(self._layers[1:]):
            needed = rows[index + 1].needed_by(layer, 0), columns[index + 1].needed_by(layer, 1)
            inputs = _in_place(values, self._usual[index], (rows[index], columns[index]), needed)
            values = _activated(self._policy, layer(inputs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return values.unflatten(0, of_centres)

    def _spans(self, bumps: Tensor, axis: int) -> list[_Span]:
        """Along an axis, where each layer's output is computed: where it may differ, if the next layer looks there."""
        there = (bumps > NEGLIGIBLE * torch.finfo(bumps.dtype).eps).any(dim=0).nonzero()
        span, spans = _Span(int(there[0]), int(there[-1]) + 1), []
        for layer, size in zip(self._layers, self._sizes, strict=True):
            span = span.seen_by(layer, axis, size[axis])
            spans.append(span)
        for index in range(len(self._layers) - 1, 0, -1):  # a stride may leave out the last positions
            needed, below = spans[index].needed_by(self._layers[index], axis), spans[index - 1]
            # The first layer costs little, so it gives all that the second one looks at.
            spans[index - 1] = needed if index == 1 else below.within(needed)
        return spans


def _activated(policy: ActorCritic, values: Tensor) -> Tensor:
    """The activation, dense in the order of the axes."""
    if policy.config.activation == "relu":
        return torch.clamp_min(values, 0, out=values.new_empty(values.shape))
    return policy.activation(values.contiguous())


def _of_few(policy: ActorCritic, values: Tensor) -> Tensor:
    """The activation in one operation: of a few thousand values that takes less time than several fast ones."""
    return F.relu(values) if policy.config.activation == "relu" else F.softplus(values, beta=SOFTPLUS_BETA)


def _parts(layer: nn.Conv2d, differences: Tensor) -> Tensor:
    """What each row and column of the first kernel adds to its output: (rows, ky, B, columns, kx, channels)."""
    channels, in_channels, *kernel = layer.weight.shape
    patches = F.unfold(differences, layer.kernel_size, stride=layer.stride)
    rows = (differences.shape[2] - kernel[0]) // layer.stride[0] + 1
    patches = patches.view(len(differences), in_channels, kernel[0] * kernel[1], -1).permute(2, 0, 3, 1).flatten(1, 2)
    found = torch.bmm(patches, layer.weight.flatten(2).permute(2, 1, 0))
    return found.view(*kernel, len(differences), rows, -1, channels).permute(3, 0, 2, 4, 1, 5).contiguous()


def _length(part: slice) -> int:
    return part.stop - part.start


def _in_place(values: Tensor, usual: Tensor, where: tuple[_Span, _Span], needed: tuple[_Span, _Span]) -> Tensor:
    """The ``needed`` part of a layer's output: what the undisturbed state gives, but for ``values`` at ``where``."""
    if where == needed:
        return values
    (rows, columns), (needed_rows, needed_columns) = where, needed
    crop = usual[:, None, slice(*needed_rows), slice(*needed_columns)]
    whole = crop.expand(-1, len(values) // len(usual), -1, -1, -1)
    whole = whole.clone(memory_format=torch.contiguous_format).flatten(0, 1)
    first_row, first_column = rows.first - needed_rows.first, columns.first - needed_columns.first
    whole[:, first_row : rows.end - needed_rows.first, first_column : columns.end - needed_columns.first] = values
    return whole
