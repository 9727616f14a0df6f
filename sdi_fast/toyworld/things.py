"""The lifeless kinds of toyworld: same conventions as animals.py."""

from __future__ import annotations

from .animals import Parts
from .sdf import (
    box,
    capsule,
    cut,
    ellipsoid,
    hull,
    intersection,
    mirrored,
    rod,
    sphere,
    torus,
    union,
)


def _house() -> Parts:
    slope = (0.0, 0.48, 0.44)
    roof = hull(
        (slope, 0.44 * 0.58),
        ((0, -slope[1], slope[2]), 0.44 * 0.58),
        ((0, 0, -1), -0.06),
        ((1, 0, 0), 0.38),
        ((-1, 0, 0), 0.38),
    )
    panes = union(
        mirrored(box((0, 0.32, -0.18), (0.13, 0.05, 0.12), 0.02)),
        mirrored(box((-0.32, 0.15, -0.18), (0.05, 0.09, 0.12), 0.02)),
    )
    return (
        ("main", box((0, 0, -0.2), (0.33, 0.33, 0.28), 0.02)),
        ("slate", roof),
        ("wood", box((0.32, 0, -0.29), (0.06, 0.12, 0.19), 0.02)),
        ("sky", panes),
        ("gold", sphere((0.37, 0, 0.23), 0.1)),
        ("grey", box((-0.16, 0.2, 0.42), (0.08, 0.08, 0.16), 0.01)),
    )


def _car() -> Parts:
    body = box((0, 0, -0.1), (0.55, 0.28, 0.16), 0.09)
    roof = box((-0.08, 0, 0.24), (0.27, 0.23, 0.07), 0.05)
    wheel = rod((0.31, 0.2, -0.23), (0.31, 0.34, -0.23), 0.15)
    rear = rod((-0.31, 0.2, -0.23), (-0.31, 0.34, -0.23), 0.15)
    return (
        ("main", union(body, roof)),
        ("sky", box((-0.08, 0, 0.12), (0.3, 0.245, 0.12), 0.05)),
        (
            "dark",
            union(mirrored(wheel), mirrored(rear), box((0.53, 0, -0.14), (0.05, 0.1, 0.06), 0.02)),
        ),
        ("gold", mirrored(sphere((0.52, 0.18, -0.06), 0.08))),
        ("crimson", mirrored(box((-0.53, 0.17, -0.05), (0.05, 0.08, 0.06), 0.02))),
        ("white", box((-0.53, 0, -0.17), (0.05, 0.1, 0.06), 0.02)),
    )


def _mug() -> Parts:
    cup = cut(rod((0.1, 0, -0.4), (0.1, 0, 0.42), 0.36), rod((0.1, 0, 0.0), (0.1, 0, 0.6), 0.26))
    face = union(
        mirrored(sphere((0.44, 0.13, 0.1), 0.07)),
        capsule((0.44, -0.1, -0.12), (0.44, 0.1, -0.12), 0.045),
    )
    return (
        ("main", union(cup, torus((-0.29, 0, 0.0), "y", 0.2, 0.075))),
        ("wood", rod((0.1, 0, -0.1), (0.1, 0, 0.28), 0.28)),
        ("black", face),
        ("white", mirrored(sphere((0.43, 0.24, -0.02), 0.06))),
    )


def _teapot() -> Parts:
    body = ellipsoid((0, 0, -0.1), (0.38, 0.38, 0.33))
    spout = rod((0.28, 0, -0.14), (0.56, 0, 0.2), 0.13, 0.07)
    return (
        ("main", union(body, spout)),
        (
            "cream",
            union(
                ellipsoid((0, 0, 0.18), (0.25, 0.25, 0.12)), rod((0, 0, -0.46), (0, 0, -0.36), 0.25)
            ),
        ),
        ("gold", sphere((0, 0, 0.35), 0.1)),
        ("dark", union(torus((-0.37, 0, -0.04), "y", 0.19, 0.07), sphere((0.56, 0, 0.2), 0.06))),
    )


def _chair() -> Parts:
    seat = box((0, 0, -0.08), (0.33, 0.31, 0.07), 0.03)
    back = box((-0.28, 0, 0.22), (0.07, 0.31, 0.27), 0.04)
    legs = union(
        mirrored(rod((0.24, 0.22, -0.55), (0.24, 0.22, -0.1), 0.065)),
        mirrored(rod((-0.25, 0.22, -0.55), (-0.25, 0.22, -0.1), 0.065)),
    )
    return (
        ("main", union(seat, back)),
        ("wood", legs),
        ("cream", box((0.05, 0, 0.02), (0.25, 0.25, 0.07), 0.05)),
        ("gold", sphere((-0.2, 0, 0.3), 0.09)),
        ("slate", box((-0.35, 0, 0.25), (0.05, 0.19, 0.08), 0.02)),
    )


def _rocket() -> Parts:
    body = rod((0, 0, -0.38), (0, 0, 0.18), 0.23)
    fins = union(
        mirrored(
            hull(
                ((1, 0, 0), 0.06),
                ((-1, 0, 0), 0.06),
                ((0, 0, -1), 0.46),
                ((0, -1, 0), -0.1),
                ((0, 1, 0.9), 0.06),
            )
        ),
        hull(
            ((0, 1, 0), 0.06),
            ((0, -1, 0), 0.06),
            ((0, 0, -1), 0.46),
            ((1, 0, 0), -0.1),
            ((-1, 0, 0.9), 0.06),
        ),
    )
    return (
        ("main", body),
        (
            "white",
            union(
                rod((0, 0, 0.18), (0, 0, 0.62), 0.23, 0.03),
                rod((0, 0, -0.22), (0, 0, -0.13), 0.245),
            ),
        ),
        ("slate", fins),
        ("sky", sphere((0.2, 0, 0.06), 0.12)),
        ("orange", rod((0, 0, -0.38), (0, 0, -0.62), 0.18, 0.06)),
    )


def _boat() -> Parts:
    stern = ellipsoid((-0.05, 0, 0), (0.53, 0.3, 0.42))
    bow = ellipsoid((0.02, 0, 0), (0.6, 0.27, 0.4))
    flat = hull(((0, 0, 1), -0.06))
    hull_solid = intersection(union(stern, bow), flat)
    return (
        ("main", hull_solid),
        ("white", box((-0.12, 0, 0.08), (0.24, 0.19, 0.16), 0.03)),
        (
            "sky",
            union(
                box((0.11, 0, 0.11), (0.05, 0.13, 0.07), 0.02),
                mirrored(sphere((-0.12, 0.18, 0.1), 0.085)),
            ),
        ),
        ("dark", rod((-0.16, 0, 0.2), (-0.16, 0, 0.37), 0.11)),
        ("crimson", rod((-0.16, 0, 0.37), (-0.16, 0, 0.5), 0.12)),
        ("orange", torus((-0.37, 0, 0.08), "x", 0.1, 0.05)),
        ("gold", sphere((0.48, 0, -0.02), 0.09)),
    )


def _lamp() -> Parts:
    shade = rod((0, 0, -0.02), (0, 0, 0.48), 0.43, 0.25)
    return (
        ("main", shade),
        (
            "dark",
            union(
                rod((0, 0, -0.58), (0, 0, -0.47), 0.27),
                capsule((-0.2, 0, -0.52), (-0.33, 0, -0.52), 0.06),
            ),
        ),
        (
            "gold",
            union(rod((0, 0, -0.5), (0, 0, 0.0), 0.075), rod((0, 0, -0.06), (0, 0, -0.01), 0.36)),
        ),
        ("crimson", sphere((0.2, 0, -0.46), 0.09)),
        ("white", union(sphere((0.34, 0, 0.2), 0.12), mirrored(sphere((0.3, 0.17, 0.2), 0.07)))),
        ("slate", capsule((-0.39, 0, 0.05), (-0.28, 0, 0.38), 0.06)),
    )


def _cake() -> Parts:
    # the missing slice is at the back: |y| <= -0.6 x
    slice_ = hull(((0.6, 1, 0), 0.0), ((0.6, -1, 0), 0.0))
    tier = cut(rod((0, 0, -0.42), (0, 0, -0.08), 0.47), slice_)
    icing = cut(rod((0, 0, -0.08), (0, 0, 0.04), 0.49), slice_)
    cherries = union(
        sphere((0.38, 0, 0.08), 0.09),
        mirrored(sphere((0.24, 0.3, 0.08), 0.09)),
    )
    return (
        ("main", union(tier, rod((0, 0, 0.0), (0, 0, 0.26), 0.26))),
        ("white", union(icing, rod((0, 0, 0.22), (0, 0, 0.31), 0.28))),
        ("cream", rod((0, 0, -0.42), (0, 0, 0.03), 0.15)),
        ("crimson", cherries),
        ("sky", rod((0, 0, 0.3), (0, 0, 0.47), 0.07)),
        ("orange", ellipsoid((0, 0, 0.53), (0.08, 0.08, 0.11))),
    )


THINGS: dict[str, Parts] = {
    "house": _house(),
    "car": _car(),
    "mug": _mug(),
    "teapot": _teapot(),
    "chair": _chair(),
    "rocket": _rocket(),
    "boat": _boat(),
    "lamp": _lamp(),
    "cake": _cake(),
}
