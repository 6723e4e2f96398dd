"""The look of each material: albedo by a point's position on its thing, with detail that fades before it aliases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.synthetic.noise import Floats, Noise, resolved
from prep.synthetic.street import PAVEMENT_EDGE, ROAD_HALF_WIDTH, Material, Street

_SIDES, _ENDS = 2, 4
"""Faces below the first number look right and left, those below the second look forward and back; then up and down."""
_STOREY = 3.0
_Length = float | Floats


@dataclass(frozen=True)
class Surface:
    """The n points of one material to paint.

    Attributes:
        local: (n,3) metres along the thing's own axes: x right, y down from the ground, z along it.
        face: (n,) face number.
        footprint: (n,) width of a pixel on a surface that faces the camera, metres.
        slant: (n,) 1 / cosine between the ray and the surface's normal, >= 1.
        size, base, accent, key: (n,3), and key (n,), of the thing.
    """

    local: Floats
    face: npt.NDArray[np.int8]
    footprint: Floats
    slant: Floats
    size: Floats
    base: Floats
    accent: Floats
    key: npt.NDArray[np.int64]

    @property
    def spread(self) -> Floats:
        """Footprint along the surface, metres."""
        return self.footprint * self.slant

    @property
    def moved(self) -> Floats:
        """Local points (n,3), shifted by the thing's key, so that two things of a kind differ."""
        key = (self.key % 1024).astype(np.float32)
        return np.asarray(self.local + np.stack([key, key * 0.37, -key], axis=1), dtype=np.float32)


def _mix(first: Floats, second: npt.ArrayLike, share: Floats) -> Floats:
    """Colours (n,3) from `first`, at share 0, to `second`, at share 1."""
    return np.asarray(first + share[:, None] * (np.asarray(second, np.float32) - first), dtype=np.float32)


def _band(value: Floats, low: float, high: float, blur: Floats) -> Floats:
    """Share of a pixel, `blur` wide around `value`, that lies between low and high."""
    blur = np.maximum(blur, np.float32(1e-4))
    inside = np.minimum(value + 0.5 * blur, high) - np.maximum(value - 0.5 * blur, low)
    return np.asarray(np.clip(inside / blur, 0.0, 1.0), dtype=np.float32)


def _repeated(value: Floats, period: _Length, low: _Length, high: _Length, blur: Floats) -> Floats:
    """Share of a pixel, `blur` wide around `value`, that lies in [low, high] + k · period."""
    blur = np.maximum(blur, np.float32(1e-3))

    def covered(end: Floats) -> Floats:
        turns = np.floor(end / period)
        return np.asarray(turns * (high - low) + np.clip(end - turns * period - low, 0.0, high - low))

    return np.asarray((covered(value + 0.5 * blur) - covered(value - 0.5 * blur)) / blur, dtype=np.float32)


def _joints(value: Floats, period: float, width: float, blur: Floats) -> Floats:
    """Share of a pixel that lines `width` wide every `period` metres cover."""
    return _repeated(value + period / 2, period, (period - width) / 2, (period + width) / 2, blur)


def _facade(surface: Surface, noise: Noise) -> Floats:
    sideways = surface.face < _SIDES
    across: Floats = np.where(sideways, surface.local[:, 2], surface.local[:, 0])
    up, spread = -surface.local[:, 1], surface.spread
    colour = surface.base.copy()
    # Plaster, stains that run down, and courses of stone.
    scales = {3.1: 0.10, 0.9: 0.10, 0.31: 0.10, 0.11: 0.08, 0.045: 0.06}
    colour *= 1 + noise.octaves(surface.moved, spread, scales)[:, None]
    runs = surface.moved * np.array([1, 0.12, 1], np.float32)
    colour *= 1 + noise.octaves(runs, spread, {0.6: 0.10, 0.17: 0.06})[:, None]
    colour *= 1 - 0.25 * _joints(up, 0.31, 0.04, surface.footprint)[:, None]
    colour = _mix(colour, surface.base * 0.55, _band(up, -1.0, 0.55, surface.footprint) * 0.8)
    width: Floats = np.asarray(2.4 + 0.9 * ((surface.key * 31) % 97 / 97.0), dtype=np.float32)
    column, storey = np.floor(across / width), np.floor(up / _STOREY)
    extent = np.where(sideways, surface.size[:, 2], surface.size[:, 0])
    whole = (np.abs(column + 0.5) * width + 0.5 * width < 0.5 * extent) & (surface.face < _ENDS)
    whole &= (storey + 1) * _STOREY < surface.size[:, 1] + 0.3

    def opening(side: float, low: float, high: float) -> Floats:
        """Share of a rectangle in each storey of each column of windows."""
        columns = _repeated(across, width, side, width - side, spread)
        return np.asarray(columns * _repeated(up, _STOREY, low, high, surface.footprint) * whole, dtype=np.float32)

    bar = _repeated(across, width, 0.5 * width - 0.02, 0.5 * width + 0.02, spread) * (spread < 0.3)
    colour = _mix(colour, surface.accent, opening(0.52, 0.62, 2.68))
    lit = noise.cell(column.astype(np.int64), storey.astype(np.int64), surface.key) * resolved(2.0, spread)
    pane = np.stack([0.16 + 0.12 * lit, 0.19 + 0.13 * lit, 0.24 + 0.15 * lit], axis=1).astype(np.float32)
    curtain = _repeated(up, _STOREY, 0.74, 1.4, surface.footprint) * (lit > 0.3)
    pane = _mix(pane, (0.72, 0.68, 0.60), curtain * 0.7)
    return _mix(colour, pane, opening(0.62, 0.74, 2.56) * (1 - bar))


def _roof(surface: Surface, noise: Noise) -> Floats:
    rows = _joints(surface.local[:, 0], 0.35, 0.06, surface.spread)
    texture = noise.octaves(surface.moved, surface.spread, {2.0: 0.12, 0.5: 0.15, 0.2: 0.15, 0.07: 0.1})
    return np.asarray(surface.base * ((1 - 0.4 * rows) * (1 + texture))[:, None], dtype=np.float32)


def _paint(surface: Surface, noise: Noise) -> Floats:
    texture = noise.octaves(surface.moved, surface.spread, {1.1: 0.10, 0.35: 0.08, 0.12: 0.05, 0.04: 0.05})
    colour = surface.base * (1 + texture)[:, None]
    along, up = surface.local[:, 2], -surface.local[:, 1]
    sideways, ends = surface.face < _SIDES, (surface.face >= _SIDES) & (surface.face < _ENDS)
    doors = _band(np.abs(along - 0.1), 0.93, 0.97, surface.spread) + _band(along - 0.1, -0.02, 0.02, surface.spread)
    colour = _mix(colour, (0.05, 0.05, 0.05), 0.7 * np.clip(doors, 0, 1) * sideways)
    colour = _mix(colour, (0.08, 0.08, 0.08), 0.8 * _band(up, 0.0, 0.34, surface.footprint))
    lamp = _band(np.abs(surface.local[:, 0]), 0.5, 0.85, surface.footprint) * _band(up, 0.6, 0.78, surface.footprint)
    colour = _mix(colour, (0.9, 0.9, 0.85), lamp * (surface.face == 2))
    colour = _mix(colour, (0.7, 0.06, 0.05), lamp * (surface.face == 3))
    plate = _band(np.abs(surface.local[:, 0]), 0, 0.26, surface.footprint) * _band(up, 0.42, 0.53, surface.footprint)
    return _mix(colour, (0.88, 0.88, 0.85), plate * ends)


def _cabin(surface: Surface, noise: Noise) -> Floats:
    up, top, waist = -surface.local[:, 1], surface.size[:, 1], surface.size[:, 2]
    glass = _band(up - waist, 0.04, 1e3, surface.footprint) * _band(top - up, 0.07, 1e3, surface.footprint)
    pillar = _band(np.abs(surface.local[:, 2] + 0.15), -0.05, 0.05, surface.spread) * (surface.face < _SIDES)
    gleam = noise.octaves(surface.moved, surface.spread, {0.8: 0.10, 0.25: 0.08, 0.08: 0.05})
    pane = (np.array([0.13, 0.16, 0.19], np.float32) + 0.6 * gleam[:, None]).astype(np.float32)
    body = surface.base * (1 + noise.octaves(surface.moved, surface.spread, {0.9: 0.08, 0.2: 0.06}))[:, None]
    return _mix(body, pane, glass * (1 - pillar) * (surface.face < _ENDS))


def _rubber(surface: Surface, noise: Noise) -> Floats:
    hub = np.hypot(surface.local[:, 2], -surface.local[:, 1] - 0.32)
    rim = _band(hub, 0, 0.19, surface.footprint) * (surface.face < _SIDES)
    texture = noise.octaves(surface.moved, surface.spread, {0.12: 0.2, 0.04: 0.2})
    return _mix(surface.base, (0.45, 0.46, 0.48), rim) * (1 + texture)[:, None]


def _leaves(surface: Surface, noise: Noise) -> Floats:
    texture = noise.octaves(surface.moved, surface.spread, {0.8: 0.3, 0.35: 0.4, 0.16: 0.5, 0.07: 0.5, 0.03: 0.4})
    colour = surface.base * np.clip(1 + texture, 0.15, 2.2)[:, None]
    return _mix(colour, colour * np.array([1.5, 1.25, 0.8], np.float32), np.clip(texture, 0, 1))


def _grained(scales: dict[float, float], stretch: tuple[float, float, float]) -> Painter:
    """Painter of one colour with noise, whose points are scaled by `stretch` first."""

    def painter(surface: Surface, noise: Noise) -> Floats:
        points = surface.moved * np.array(stretch, np.float32)
        texture = noise.octaves(points, surface.spread, scales)
        return np.asarray(surface.base * (1 + texture)[:, None], dtype=np.float32)

    return painter


def _sign(surface: Surface, noise: Noise) -> Floats:
    up = -surface.local[:, 1] - (surface.size[:, 2] - 0.33)
    reach = np.maximum(np.abs(up), np.abs(surface.local[:, 0]))
    colour = _mix(surface.base, surface.accent, _band(reach, 0, 0.24, surface.footprint))
    bar = _band(np.abs(up), 0, 0.05, surface.footprint) * _band(np.abs(surface.local[:, 0]), 0, 0.17, surface.footprint)
    colour = _mix(colour, (0.1, 0.1, 0.1), bar * (surface.key % 2))
    return _mix(colour, (0.5, 0.5, 0.5), (surface.face != 3).astype(np.float32))


Painter = Callable[[Surface, Noise], Floats]

PAINTERS: dict[Material, Painter] = {
    Material.FACADE: _facade,
    Material.ROOF: _roof,
    Material.PAINT: _paint,
    Material.CABIN: _cabin,
    Material.RUBBER: _rubber,
    Material.BARK: _grained({0.3: 0.3, 0.1: 0.3, 0.035: 0.25}, (1, 0.25, 1)),
    Material.LEAVES: _leaves,
    Material.METAL: _grained({1.0: 0.25, 0.3: 0.2, 0.08: 0.15}, (1, 1, 1)),
    Material.SIGN: _sign,
    Material.HILL: _grained({60.0: 0.25, 22.0: 0.25, 8.0: 0.2, 3.0: 0.2}, (1, 2, 1)),
    Material.WOOD: _grained({0.5: 0.25, 0.17: 0.3, 0.05: 0.2}, (1, 0.3, 1)),
}


def paint_ground(street: Street, point: Floats, view: Floats, footprint: Floats, slant: Floats, noise: Noise) -> Floats:
    """Albedo (n,3) of the ground at points (n,3), seen along view (n,3): road with markings, pavement, grass."""
    x, z = point[:, 0], point[:, 2]
    heading = street.road.heading(z)
    lateral = ((x - street.road.centre(z)) * np.cos(heading)).astype(np.float32)
    spread = footprint * slant
    # A pixel covers an ellipse on the ground: long in the view's direction, a footprint wide across it.
    turned = np.arctan2(view[:, 0], view[:, 2]) - heading
    across = np.hypot(spread * np.sin(turned), footprint * np.cos(turned)).astype(np.float32)
    along = np.hypot(spread * np.cos(turned), footprint * np.sin(turned)).astype(np.float32)
    # Wheels and rain stretch the texture along the road, so a pixel's width resolves it, not its length.
    drawn = np.stack([lateral, np.zeros_like(z), z * 0.06], axis=1).astype(np.float32)
    streaks = noise.octaves(drawn, np.maximum(across, along * 0.06), {1.3: 0.15, 0.45: 0.16, 0.16: 0.14, 0.06: 0.08})
    patches = noise.octaves(point, spread, {6.0: 0.2, 2.1: 0.22, 0.7: 0.22, 0.24: 0.16, 0.08: 0.12, 0.03: 0.1})
    grain = (1 + streaks + patches)[:, None]
    side = np.abs(lateral)
    colour = np.array([0.36, 0.36, 0.37], np.float32) * grain
    white = _markings(street, lateral, z, across, along)
    colour = _mix(colour, np.array([0.80, 0.80, 0.78], np.float32) * (0.75 + 0.25 * grain), white * 0.85)
    slabs = np.array([0.58, 0.56, 0.53], np.float32) * grain
    lines = np.maximum(_joints(lateral, 0.7, 0.04, across), _joints(z, 1.05, 0.05, along))
    colour = _mix(colour, slabs * (1 - 0.35 * lines)[:, None], _band(side, ROAD_HALF_WIDTH, 1e3, across))
    kerb = _band(side, ROAD_HALF_WIDTH, ROAD_HALF_WIDTH + 0.22, across)
    colour = _mix(colour, np.array([0.68, 0.67, 0.65], np.float32) * (1 + patches)[:, None], kerb)
    tufts = noise.octaves(point, spread, {1.5: 0.2, 0.5: 0.3, 0.17: 0.3, 0.06: 0.25})
    grass = np.array([0.28, 0.36, 0.16], np.float32) * (1 + tufts)[:, None]
    return _mix(colour, grass, _band(side, PAVEMENT_EDGE, 1e3, across))


def _markings(street: Street, lateral: Floats, z: Floats, across: Floats, along: Floats) -> Floats:
    """Share (n,) of white paint: the dashed centre line, parking lines, zebra crossings."""
    side = np.abs(lateral)
    white: Floats = _band(lateral, -0.07, 0.07, across) * _repeated(z, 9.0, 0.0, 4.0, along)
    white = np.maximum(white, _band(side, 3.28, 3.42, across))
    stripes = _repeated(lateral, 1.0, 0.25, 0.75, across)
    for crossing in street.crossings:
        zebra = _band(z, crossing - 1.6, crossing + 1.6, along) * _band(side, 0, 5.0, across)
        white = np.maximum(white, stripes * zebra)
    return white


def paint_sky(direction: Floats, noise: Noise) -> Floats:
    """Colour (n,3) of the sky in unit directions (n,3): haze at the horizon, clouds above."""
    up = np.clip(-direction[:, 1], 0, 1)
    colour = _mix(np.full_like(direction, 1) * np.array([0.80, 0.84, 0.88], np.float32), (0.42, 0.58, 0.82), up**0.5)
    flat = direction * np.array([1, 2.5, 1], np.float32)
    clouds = noise.octaves(flat, np.full(len(flat), 0.002, np.float32), {0.35: 0.5, 0.15: 0.3, 0.06: 0.18, 0.025: 0.1})
    return _mix(colour, (0.95, 0.95, 0.96), np.clip(clouds * 1.5, 0, 0.9))
