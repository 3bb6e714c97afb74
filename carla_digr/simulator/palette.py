"""Weathers of the embedded highway: the light, sky and haze the renderer paints with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Palette:
    """Light and air of one weather. Colours are sRGB in 0..255, lights are factors on a surface's own colour."""

    name: str
    zenith: Rgb
    """Sky from about 60 degrees above the horizon."""
    horizon: Rgb
    """Sky at the horizon; haze takes this colour too."""
    cloud: Rgb
    cloud_cover: float
    """0 (clear) to 1 (closed)."""
    hills: Rgb
    ambient: Rgb
    """Light of the sky on every surface."""
    sun: Rgb
    """Light of the sun on a surface that faces it."""
    sun_azimuth: float
    """Degrees from +x towards +y."""
    sun_elevation: float
    """Degrees above the horizon."""
    haze_distance: float
    """Metres after which 63 % of an object is haze."""
    shadow: float
    """Darkness of shadows, 0 to 1."""
    lamps: float
    """How brightly vehicle lamps glow, 0 to 1."""

    def pack(self) -> NDArray[np.float64]:
        """(9, 3) float64 in the row order of the constants below, for compiled code."""
        azimuth, elevation = math.radians(self.sun_azimuth), math.radians(self.sun_elevation)
        direction = (
            math.cos(elevation) * math.cos(azimuth),
            math.cos(elevation) * math.sin(azimuth),
            math.sin(elevation),
        )
        rows = (
            self.zenith,
            self.horizon,
            self.cloud,
            self.hills,
            self.ambient,
            self.sun,
            direction,
            (self.cloud_cover, self.haze_distance, self.shadow),
            (self.lamps, 0.0, 0.0),
        )
        return np.array(rows, np.float64)


def drawn_palette(rng: np.random.Generator) -> Palette:
    """A weather drawn around one of PALETTES: sun from anywhere, other clouds, light and ground of another tint."""
    base = PALETTES[rng.integers(len(PALETTES))]
    tint = rng.uniform(0.92, 1.08, 3)
    return replace(
        base,
        name=f"like {base.name}",
        cloud_cover=float(rng.uniform(0.0, 1.0)),
        ambient=_times(base.ambient, rng.uniform(0.8, 1.2) * tint),
        sun=_times(base.sun, rng.uniform(0.6, 1.2) * tint),
        sun_azimuth=float(rng.uniform(-180.0, 180.0)),
        sun_elevation=float(rng.uniform(12.0, 65.0)),
        shadow=float(rng.uniform(0.3, 0.65)),
        lamps=float(rng.uniform(0.2, 1.0)),
    )


def _times(colour: Rgb, factors: NDArray[np.float64]) -> Rgb:
    red, green, blue = (float(value) for value in np.multiply(colour, factors))
    return red, green, blue


# Rows of Palette.pack(); AIR holds cloud cover, haze distance and shadow, LAMPS the glow of vehicle lamps.
ZENITH, HORIZON, CLOUD, HILLS, AMBIENT, SUN, SUN_DIRECTION, AIR, LAMPS = range(9)

PALETTES: tuple[Palette, ...] = (
    Palette(
        name="noon",
        zenith=(62, 120, 196),
        horizon=(190, 212, 232),
        cloud=(250, 250, 252),
        cloud_cover=0.45,
        hills=(104, 128, 132),
        ambient=(0.56, 0.60, 0.66),
        sun=(0.52, 0.49, 0.42),
        sun_azimuth=-125.0,
        sun_elevation=52.0,
        haze_distance=520.0,
        shadow=0.62,
        lamps=0.25,
    ),
    Palette(
        name="overcast",
        zenith=(140, 148, 158),
        horizon=(196, 201, 205),
        cloud=(170, 175, 182),
        cloud_cover=0.9,
        hills=(118, 126, 130),
        ambient=(0.74, 0.76, 0.78),
        sun=(0.10, 0.10, 0.10),
        sun_azimuth=-125.0,
        sun_elevation=60.0,
        haze_distance=380.0,
        shadow=0.42,
        lamps=0.4,
    ),
    Palette(
        name="sunset",
        zenith=(70, 84, 140),
        horizon=(250, 176, 112),
        cloud=(240, 136, 104),
        cloud_cover=0.5,
        hills=(104, 78, 92),
        ambient=(0.46, 0.42, 0.48),
        sun=(0.72, 0.46, 0.24),
        sun_azimuth=20.0,
        sun_elevation=14.0,
        haze_distance=460.0,
        shadow=0.55,
        lamps=0.6,
    ),
    Palette(
        name="fog",
        zenith=(186, 190, 194),
        horizon=(200, 203, 206),
        cloud=(196, 199, 202),
        cloud_cover=0.3,
        hills=(190, 194, 198),
        ambient=(0.76, 0.77, 0.79),
        sun=(0.06, 0.06, 0.06),
        sun_azimuth=-125.0,
        sun_elevation=60.0,
        haze_distance=85.0,
        shadow=0.36,
        lamps=0.8,
    ),
    Palette(
        name="dusk",
        zenith=(18, 26, 58),
        horizon=(112, 98, 122),
        cloud=(58, 56, 84),
        cloud_cover=0.5,
        hills=(38, 40, 60),
        ambient=(0.30, 0.32, 0.42),
        sun=(0.05, 0.05, 0.07),
        sun_azimuth=60.0,
        sun_elevation=25.0,
        haze_distance=420.0,
        shadow=0.4,
        lamps=1.0,
    ),
)
