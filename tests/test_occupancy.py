"""The occupancy grid: its update rule and when and where it looks (methods.md D, Marching)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sdi_fast.config import RenderConfig
from sdi_fast.occupancy import OccupancyGrid
from sdi_fast.reference import update_occupancy
from sdi_fast.types import SDIFastError

CONFIG = RenderConfig(occupancy_resolution=8, n_samples_per_ray=64)
LATE = CONFIG.occupancy_warmup + 16 - CONFIG.occupancy_warmup % 16  # a due step after the warm-up


class Probe:
    """A density function that remembers where it was asked."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.points: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.points.append(x)
        return torch.full((len(x),), self.value)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells_of(x: Tensor, resolution: int, radius: float = 2.0) -> Tensor:
    x_cell, y_cell, z_cell = ((x + radius) / (2 * radius) * resolution).long().unbind(-1)
    return (x_cell * resolution + y_cell) * resolution + z_cell


def test_update_decays_and_takes_the_maximum_in_place() -> None:
    occs = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    binary = update_occupancy(
        occs, torch.tensor([0, 1, 2]), torch.tensor([0.25, 0.125, 5.0]), 0.5, 10.0
    )
    assert occs.tolist() == [0.25, 0.5, 5.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    # the mean 8.75 / 8 is below the threshold, so it decides
    assert binary.flatten().tolist() == [False, False, True, True] + [False] * 4
    assert binary.shape == (2, 2, 2)


def test_update_threshold_is_the_smaller_of_the_two() -> None:
    occs = torch.tensor([0.25, 0.5, 5.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    nothing = torch.zeros(0, dtype=torch.int64)
    binary = update_occupancy(occs, nothing, torch.zeros(0), 0.5, 0.3)
    assert binary.flatten().tolist() == [False, True, True, True] + [False] * 4


def test_update_does_not_depend_on_the_order_of_repeated_cells() -> None:
    cells = torch.tensor([5, 3, 5, 5, 3])
    values = torch.tensor([0.1, 0.7, 0.4, 0.2, 0.9])
    results = []
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        occs = torch.full((8,), 0.8)
        update_occupancy(occs, cells[order], values[order], 0.5, 0.01)
        results.append(occs)
    expected = torch.full((8,), 0.8)
    expected[5], expected[3] = 0.4, 0.9
    for occs in results:
        assert torch.equal(occs, expected)


def test_warm_up_looks_once_into_every_cell() -> None:
    grid = OccupancyGrid(CONFIG, radius=2.0)
    probe = Probe(3.0)
    grid.update(0, probe, CONFIG, generator())
    (points,) = probe.points
    assert torch.equal(cells_of(points, 8), torch.arange(512))
    inside = (points + 2.0) / 4.0 * 8 % 1.0
    assert inside.std(dim=0).min() > 0.25  # spread over the cell: 0.289 if uniform
    # density * step size
    assert torch.allclose(grid.occs, torch.tensor(3.0 * 1.732 * 4 / 64))
    assert grid.mean() == pytest.approx(3.0 * 1.732 * 4 / 64)


def test_updates_only_when_due() -> None:
    grid = OccupancyGrid(CONFIG, radius=2.0)
    probe = Probe()
    for step in range(33):
        grid.update(step, probe, CONFIG, generator())
    assert len(probe.points) == 3  # steps 0, 16, 32


def test_later_updates_look_at_uniform_and_at_occupied_cells() -> None:
    grid = OccupancyGrid(CONFIG, radius=2.0)
    few = torch.tensor([7, 100, 511])
    grid.binary.zero_()
    grid.binary.view(-1)[few] = True
    probe = Probe()
    grid.update(LATE, probe, CONFIG, generator())
    cells = cells_of(probe.points[0], 8)
    assert len(cells) == 128 + 3  # G^3 / 4 uniform, and all that are occupied
    assert torch.equal(cells[128:], few)
    assert cells[:128].unique().numel() > 90  # 128 draws out of 512: 114 expected

    grid.binary.fill_(True)
    grid.update(LATE, probe, CONFIG, generator())
    assert len(probe.points[1]) == 256  # capped at G^3 / 4 occupied ones


def test_official_counts() -> None:
    grid = OccupancyGrid(RenderConfig(), radius=2.0)
    probe = Probe()
    grid.update(256, probe, RenderConfig(), generator())
    assert len(probe.points[0]) == 8192 + 8192


def test_finds_a_ball_off_centre() -> None:
    """x, y and z are told apart."""
    centre = torch.tensor([1.0, -0.5, 0.25])
    grid = OccupancyGrid(CONFIG, radius=2.0)

    def ball(x: Tensor) -> Tensor:
        return 20.0 * ((x - centre).norm(dim=-1) < 0.8)

    draws = generator()
    for step in range(0, 256, 16):
        grid.update(step, ball, CONFIG, draws)
    centres = (torch.arange(8) + 0.5) / 2 - 2.0
    x, y, z = torch.meshgrid(centres, centres, centres, indexing="ij")
    distance = (torch.stack([x, y, z], dim=-1) - centre).norm(dim=-1)
    half_diagonal = 0.25 * 3**0.5
    assert grid.binary[distance < 0.8 - half_diagonal].all()
    assert not grid.binary[distance > 0.8 + half_diagonal].any()


def test_empty_volume_and_forgetting() -> None:
    grid = OccupancyGrid(CONFIG, radius=2.0)
    assert grid.binary.all()  # nothing is known yet
    grid.update(0, Probe(0.0), CONFIG, generator())
    assert not grid.binary.any()
    assert grid.mean() == 0.0
    # a volume that has become empty fades by the decay, down to nothing occupied
    grid.occs.fill_(1.0)
    for step in range(0, 256, 16):
        grid.update(step, Probe(0.0), CONFIG, generator())
    assert torch.allclose(grid.occs, torch.tensor(0.95**16))


def test_same_seed_same_grid() -> None:
    def run(seed: int) -> Tensor:
        grid = OccupancyGrid(CONFIG, radius=2.0)
        draws = generator(seed)
        for step in (0, LATE, LATE + 16):
            grid.update(step, lambda x: x.norm(dim=-1), CONFIG, draws)
        return grid.occs

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_state_round_trip() -> None:
    grid = OccupancyGrid(CONFIG, radius=2.0)
    grid.update(0, lambda x: (x[:, 0] > 0).float(), CONFIG, generator())
    other = OccupancyGrid(CONFIG, radius=2.0)
    other.load_state_dict(grid.state_dict())
    assert torch.equal(other.occs, grid.occs)
    assert torch.equal(other.binary, grid.binary)
    assert 0 < grid.binary.float().mean() < 1
    other.occs.zero_()
    assert grid.occs.any()  # not shared


def test_bad_states_and_settings_are_named() -> None:
    grid = OccupancyGrid(CONFIG, radius=2.0)
    with pytest.raises(SDIFastError, match="occupancy"):
        grid.load_state_dict({"occs": grid.occs})
    with pytest.raises(SDIFastError, match=r"occupancy\.occs"):
        grid.load_state_dict({**grid.state_dict(), "occs": torch.zeros(27)})
    with pytest.raises(SDIFastError, match="occupancy_resolution"):
        OccupancyGrid(dataclasses.replace(CONFIG, occupancy_resolution=0), radius=2.0)


def test_mean_as_a_tensor() -> None:
    grid = OccupancyGrid(CONFIG, radius=2.0)
    grid.occs.copy_(torch.arange(512.0))
    assert grid.mean_tensor().shape == () and grid.mean_tensor().item() == grid.mean() == 255.5


# 128 cells are drawn: none, few, exactly as many, and more are occupied
@pytest.mark.parametrize("n_occupied", [0, 3, 128, 129, 300, 512])
def test_draws_of_fixed_size_equal_the_others(n_occupied: int) -> None:
    """What a generator on a GPU draws, here with one on the CPU."""
    grid = OccupancyGrid(CONFIG, radius=2.0)
    occupied = torch.randperm(512, generator=generator(1))[:n_occupied].sort().values
    grid.binary.zero_()
    grid.binary.view(-1)[occupied] = True
    draws = generator()
    counts = torch.zeros(2, 512)
    for _ in range(200):
        cells, points = grid._draw_fixed(draws)
        assert cells.shape == (256,) and points.shape == (256, 3)
        assert torch.equal(cells_of(points, 8), cells)
        n_taken = min(n_occupied, 128)
        taken = cells[128 : 128 + n_taken]
        assert torch.isin(taken, occupied).all()
        if n_occupied <= 128:
            assert torch.equal(taken, occupied)
        spare = slice(128 + n_taken, None)  # the first draw again, with the same point
        assert (cells[spare] == cells[0]).all() and (points[spare] == points[0]).all()
        counts[0] += cells[:128].bincount(minlength=512)
        counts[1] += taken.bincount(minlength=512)
    # 200 * 128 draws over 512 cells: 50 each, 7 the standard deviation
    assert counts[0].min() > 50 - 6 * 7 and counts[0].max() < 50 + 6 * 7
    if n_occupied > 128:
        mean = 200 * 128 / n_occupied
        assert (counts[1][occupied] - mean).abs().max() < 6 * mean**0.5
