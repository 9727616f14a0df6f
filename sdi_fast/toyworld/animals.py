"""The living kinds of toyworld, and those with a face. Facing +x, z up, +y at a viewer's right
(seen from the front), inside a ball of about 0.65 scene units.

A kind is a tuple of (colour, solid): colour "main" is the caption's, every other name is fixed
(scenes.PALETTE). No part is thinner than about 0.1, so that it survives 64 x 64 pixels.
"""

from __future__ import annotations

from .sdf import (
    Solid,
    blend,
    box,
    capsule,
    ellipsoid,
    hull,
    intersection,
    mirrored,
    rod,
    sphere,
    torus,
    union,
)

Parts = tuple[tuple[str, Solid], ...]


def _mushroom() -> Parts:
    cap = intersection(ellipsoid((0, 0, 0.02), (0.57, 0.57, 0.5)), hull(((0, 0, -1), -0.02)))
    spots = union(
        mirrored(sphere((0.37, 0.22, 0.27), 0.12)),
        sphere((0.14, 0, 0.46), 0.13),
        mirrored(sphere((-0.12, 0.42, 0.27), 0.13)),
        sphere((-0.43, 0, 0.27), 0.13),
    )
    mouth = capsule((0.235, -0.07, -0.34), (0.235, 0.07, -0.34), 0.04)
    return (
        ("main", cap),
        ("cream", rod((0, 0, -0.55), (0, 0, 0.06), 0.28, 0.22)),
        ("white", spots),
        ("black", union(mirrored(sphere((0.225, 0.1, -0.17), 0.06)), mouth)),
        ("leaf", ellipsoid((-0.29, 0, -0.45), (0.12, 0.2, 0.12))),
    )


def _robot() -> Parts:
    torso = box((0, 0, -0.1), (0.22, 0.27, 0.23), 0.05)
    head = box((0, 0, 0.31), (0.19, 0.22, 0.15), 0.05)
    arm = capsule((0, 0.37, 0.02), (0.04, 0.41, -0.25), 0.09)
    return (
        ("main", union(torso, head)),
        ("grey", union(mirrored(box((0.03, 0.14, -0.43), (0.15, 0.1, 0.12), 0.04)), mirrored(arm))),
        ("gold", union(mirrored(sphere((0.18, 0.1, 0.35), 0.07)), sphere((0, 0, 0.55), 0.08))),
        ("black", box((0.19, 0, 0.22), (0.04, 0.12, 0.04), 0.02)),
        ("sky", box((0.21, 0, -0.08), (0.05, 0.16, 0.12), 0.03)),
        ("dark", box((-0.27, 0, -0.08), (0.1, 0.18, 0.18), 0.04)),
        ("grey", capsule((0, 0, 0.4), (0, 0, 0.55), 0.045)),
    )


def _snowman() -> Parts:
    balls = union(sphere((0, 0, -0.3), 0.3), sphere((0, 0, 0.07), 0.23), sphere((0, 0, 0.33), 0.18))
    hat = union(rod((0, 0, 0.42), (0, 0, 0.49), 0.22), rod((0, 0, 0.45), (0, 0, 0.64), 0.14))
    dots = union(
        mirrored(sphere((0.15, 0.08, 0.38), 0.045)),
        sphere((0.23, 0, 0.09), 0.05),
        sphere((0.27, 0, -0.17), 0.055),
        sphere((0.29, 0, -0.32), 0.055),
    )
    scarf = union(
        torus((0, 0, 0.21), "z", 0.17, 0.06), capsule((-0.2, 0, 0.2), (-0.27, 0.05, -0.05), 0.08)
    )
    return (
        ("main", balls),
        ("dark", hat),
        ("black", dots),
        ("orange", rod((0.14, 0, 0.32), (0.38, 0, 0.3), 0.075, 0.02)),
        ("teal", scarf),
        ("wood", mirrored(capsule((0, 0.2, 0.08), (0.02, 0.5, 0.24), 0.05))),
    )


def _rabbit() -> Parts:
    body = blend(
        0.1,
        ellipsoid((-0.06, 0, -0.26), (0.3, 0.27, 0.27)),
        sphere((0.08, 0, 0.09), 0.23),
        mirrored(ellipsoid((0.18, 0.15, -0.47), (0.19, 0.1, 0.09))),
    )
    ears = mirrored(capsule((0.0, 0.1, 0.28), (-0.04, 0.16, 0.54), 0.08))
    return (
        ("main", union(body, ears)),
        (
            "rose",
            union(
                mirrored(capsule((0.06, 0.1, 0.33), (0.02, 0.155, 0.52), 0.045)),
                sphere((0.32, 0, 0.06), 0.05),
            ),
        ),
        ("black", mirrored(sphere((0.27, 0.11, 0.15), 0.055))),
        (
            "white",
            union(sphere((-0.38, 0, -0.28), 0.13), ellipsoid((0.12, 0, -0.25), (0.16, 0.18, 0.17))),
        ),
    )


def _duck() -> Parts:
    body = blend(
        0.08,
        ellipsoid((-0.04, 0, -0.2), (0.45, 0.3, 0.27)),
        sphere((0.22, 0, 0.24), 0.22),
        rod((-0.34, 0, -0.12), (-0.56, 0, 0.12), 0.16, 0.05),
    )
    return (
        ("main", body),
        (
            "orange",
            union(
                ellipsoid((0.47, 0, 0.2), (0.14, 0.13, 0.07)),
                mirrored(ellipsoid((0.05, 0.14, -0.48), (0.16, 0.1, 0.07))),
            ),
        ),
        ("black", mirrored(sphere((0.35, 0.15, 0.31), 0.055))),
        ("white", mirrored(ellipsoid((-0.1, 0.28, -0.15), (0.23, 0.09, 0.14)))),
    )


def _cactus() -> Parts:
    column = capsule((0, 0, -0.25), (0, 0, 0.32), 0.21)
    right = union(
        capsule((0, 0.15, -0.06), (0, 0.41, -0.06), 0.1),
        capsule((0, 0.41, -0.06), (0, 0.41, 0.16), 0.1),
    )
    left = union(
        capsule((0, -0.15, 0.06), (0, -0.41, 0.06), 0.1),
        capsule((0, -0.41, 0.06), (0, -0.41, 0.28), 0.1),
    )
    face = union(
        mirrored(sphere((0.2, 0.08, 0.27), 0.05)),
        capsule((0.2, -0.06, 0.13), (0.2, 0.06, 0.13), 0.04),
    )
    return (
        ("main", blend(0.04, column, right, left)),
        (
            "terracotta",
            union(
                rod((0, 0, -0.6), (0, 0, -0.3), 0.2, 0.28), rod((0, 0, -0.38), (0, 0, -0.27), 0.32)
            ),
        ),
        ("rose", union(sphere((0, 0, 0.54), 0.11), sphere((-0.2, 0, 0.12), 0.11))),
        ("black", face),
    )


def _penguin() -> Parts:
    body = blend(0.06, ellipsoid((0, 0, -0.12), (0.3, 0.31, 0.42)), sphere((0, 0, 0.34), 0.23))
    wings = mirrored(ellipsoid((-0.02, 0.34, -0.08), (0.13, 0.08, 0.26)))
    tail = rod((-0.22, 0, -0.36), (-0.45, 0, -0.5), 0.13, 0.06)
    return (
        ("main", union(body, wings, tail)),
        (
            "white",
            union(
                ellipsoid((0.13, 0, -0.14), (0.22, 0.24, 0.33)),
                mirrored(sphere((0.15, 0.09, 0.4), 0.085)),
            ),
        ),
        ("black", mirrored(sphere((0.215, 0.09, 0.41), 0.045))),
        (
            "orange",
            union(
                rod((0.18, 0, 0.3), (0.4, 0, 0.27), 0.09, 0.03),
                mirrored(ellipsoid((0.14, 0.15, -0.5), (0.19, 0.11, 0.07))),
            ),
        ),
    )


def _fish() -> Parts:
    body = ellipsoid((0.09, 0, 0), (0.46, 0.22, 0.33))
    band = intersection(
        ellipsoid((0.09, 0, 0), (0.48, 0.235, 0.345)), box((0.07, 0, 0), (0.07, 0.5, 0.5), 0.0)
    )
    tail = union(
        capsule((-0.3, 0, 0), (-0.5, 0, 0.22), 0.08),
        capsule((-0.3, 0, 0), (-0.5, 0, -0.22), 0.08),
        capsule((-0.5, 0, 0.2), (-0.44, 0, 0), 0.07),
        capsule((-0.5, 0, -0.2), (-0.44, 0, 0), 0.07),
    )
    fins = union(
        ellipsoid((0.02, 0, 0.33), (0.2, 0.07, 0.15)),
        mirrored(ellipsoid((-0.02, 0.24, -0.1), (0.13, 0.08, 0.1))),
    )
    return (
        ("main", body),
        ("white", union(band, mirrored(sphere((0.35, 0.13, 0.1), 0.09)))),
        ("gold", union(tail, fins)),
        ("black", mirrored(sphere((0.39, 0.185, 0.11), 0.055))),
        ("rose", torus((0.53, 0, -0.06), "x", 0.06, 0.045)),
    )


ANIMALS: dict[str, Parts] = {
    "mushroom": _mushroom(),
    "robot": _robot(),
    "snowman": _snowman(),
    "rabbit": _rabbit(),
    "duck": _duck(),
    "cactus": _cactus(),
    "penguin": _penguin(),
    "fish": _fish(),
}
