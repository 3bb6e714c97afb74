"""Contacts of vehicles with each other, with the median barrier and with the guard rails: found and resolved."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from carla_digr.simulator.road import BARRIER_HALF_WIDTH, RAIL_OFFSET, project_to
from carla_digr.simulator.traffic import CLIENT

RAIL_HALF_WIDTH = 0.1  # m
TOUCHING = 1e-6  # m of overlap that is no contact: the rounding left when a contact was resolved


@njit(cache=True, nogil=True)
def box_overlap(a, b):
    """Separating-axis test of two oriented boxes, (5,) x, y, yaw, half length, half width each (Ericson, 2005, 4.4.1).

    Returns:
        (depth, nx, ny): how deep they overlap, negative or zero when they do not, and the unit normal from a to b along
        which that depth is least.
    """
    dx, dy = b[0] - a[0], b[1] - a[1]
    depth, nx, ny = math.inf, 0.0, 0.0
    for k in range(4):
        yaw = a[2] if k < 2 else b[2]
        ux, uy = (math.cos(yaw), math.sin(yaw)) if k % 2 == 0 else (-math.sin(yaw), math.cos(yaw))
        reach = 0.0
        for box in (a, b):
            along = abs(math.cos(box[2]) * ux + math.sin(box[2]) * uy)
            across = abs(-math.sin(box[2]) * ux + math.cos(box[2]) * uy)
            reach += box[3] * along + box[4] * across
        distance = dx * ux + dy * uy
        if reach - abs(distance) < depth:
            depth = reach - abs(distance)
            sign = 1.0 if distance >= 0.0 else -1.0
            nx, ny = sign * ux, sign * uy
    return depth, nx, ny


@njit(cache=True, nogil=True)
def _box(v, out):
    out[0], out[1], out[2], out[3], out[4] = v.x, v.y, v.yaw, 0.5 * v.length, 0.5 * v.width


@njit(cache=True, nogil=True)
def _lateral_range(v, pieces):
    """(lowest, highest) road offset d of the box's corners and of the middles of its sides."""
    low, high = math.inf, -math.inf
    c, sn = math.cos(v.yaw), math.sin(v.yaw)
    for i in range(-1, 2):
        for j in range(-1, 2):
            if i == 0 and j == 0:
                continue
            forward, right = 0.5 * i * v.length, 0.5 * j * v.width
            _, d, _ = project_to(pieces, v.x + c * forward - sn * right, v.y + sn * forward + c * right)
            low, high = min(low, d), max(high, d)
    return low, high


@njit(cache=True, nogil=True)
def static_overlap(v, pieces):
    """(depth, direction, which) of the overlap with the barrier (0) or a guard rail (1); direction is the sign of d in
    which the obstacle lies. Depth is at most zero when free. The rail has no far side: nothing passes it."""
    reach = 0.5 * math.hypot(v.length, v.width)
    inner, outer = BARRIER_HALF_WIDTH, RAIL_OFFSET - RAIL_HALF_WIDTH
    if abs(v.d) - reach > inner and abs(v.d) + reach < outer:
        return 0.0, 0.0, 0
    low, high = _lateral_range(v, pieces)
    if v.d < 0.0:
        low, high = -high, -low
    side = -1.0 if v.d < 0.0 else 1.0
    if high - outer > inner - low:
        return high - outer, side, 1
    return inner - low, -side, 0


@njit(cache=True, nogil=True)
def push(v, nx, ny, depth, impulse):
    """Apply an impulse (N s) along (nx, ny) to a vehicle's speed and move a client's one out by depth."""
    speed = v.speed + impulse / v.mass * (nx * math.cos(v.yaw) + ny * math.sin(v.yaw))
    v.speed = speed if v.driver == CLIENT else max(speed, 0.0)
    if v.driver == CLIENT:
        v.x += nx * depth
        v.y += ny * depth


@njit(cache=True, nogil=True)
def collide(vehicles, pieces, contacts):
    """Find and resolve the overlaps of the table, plastically; returns their number.

    ``contacts`` (C, 5) receives index, other index (-1 barrier, -2 rail), and the impulse's direction nx, ny and size
    on the other one.
    """
    n = vehicles.shape[0]
    count = 0
    a = np.empty(5)
    b = np.empty(5)
    for i in range(n):
        v = vehicles[i]
        for j in range(i + 1, n):
            w = vehicles[j]
            if v.ghost or w.ghost:
                continue
            if v.driver != CLIENT and w.driver != CLIENT and v.driver != w.driver:
                continue
            dx, dy = w.x - v.x, w.y - v.y
            reach = 0.5 * (v.length + w.length + v.width + w.width)
            if dx * dx + dy * dy > reach * reach:
                continue
            _box(v, a)
            _box(w, b)
            depth, nx, ny = box_overlap(a, b)
            if depth <= TOUCHING or count == contacts.shape[0]:
                continue
            closing = v.speed * (math.cos(v.yaw) * nx + math.sin(v.yaw) * ny)
            closing -= w.speed * (math.cos(w.yaw) * nx + math.sin(w.yaw) * ny)
            impulse = max(closing, 0.0) * v.mass * w.mass / (v.mass + w.mass)
            share = 0.5 if v.driver == CLIENT and w.driver == CLIENT else 1.0
            push(v, -nx, -ny, share * depth, impulse)
            push(w, nx, ny, share * depth, impulse)
            contacts[count, 0], contacts[count, 1] = i, j
            contacts[count, 2], contacts[count, 3], contacts[count, 4] = nx, ny, impulse
            count += 1
        if v.driver == CLIENT and not v.ghost:
            depth, direction, which = static_overlap(v, pieces)
            if depth > TOUCHING and count < contacts.shape[0]:
                _, _, heading = project_to(pieces, v.x, v.y)
                nx, ny = -math.sin(heading) * direction, math.cos(heading) * direction
                closing = v.speed * (math.cos(v.yaw) * nx + math.sin(v.yaw) * ny)
                impulse = max(closing, 0.0) * v.mass
                push(v, -nx, -ny, depth, impulse)
                contacts[count, 0], contacts[count, 1] = i, -1 - which
                contacts[count, 2], contacts[count, 3], contacts[count, 4] = nx, ny, impulse
                count += 1
    return count
