"""The occupancy grid that marching skips empty space with (methods.md D, Marching)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import RenderConfig
from .ops.occupancy import update_occupancy
from .types import SDIFastError


class OccupancyGrid:
    """A cube of G^3 cells over [-radius, radius]^3, cell (x * G + y) * G + z.

    `occs` [G^3] f32 is a decaying maximum of density * step size; `binary` [G, G, G] bool is what
    marching reads. Before the first update every cell counts as occupied: nothing is known yet.
    """

    def __init__(
        self,
        config: RenderConfig,
        *,
        radius: float,  # scene units
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        resolution = config.occupancy_resolution
        if resolution < 1:
            raise SDIFastError(f"occupancy_resolution: expected at least 1, got {resolution}")
        self.resolution = resolution
        self.radius = radius
        self.step_size = config.step_size(radius)
        self.backend = backend
        self.occs = torch.zeros(resolution**3, device=device)
        self.binary = torch.ones(resolution, resolution, resolution, dtype=torch.bool).to(device)

    def update(
        self,
        step: int,
        density_fn: Callable[[Tensor], Tensor],  # world points [M, 3] -> density [M]
        config: RenderConfig,
        generator: torch.Generator,
    ) -> None:
        """Refreshes the grid where `step` is due; to be called before the training step.

        In the warm-up every cell is evaluated; later a quarter as many, drawn uniformly, and up to
        that many of the occupied ones. Each at one random point of the cell.

        Args:
            generator: drawn from on its own device, so that a CPU generator gives the same points
                on every device. One on a GPU makes the update go without a synchronisation; then
                always as many points are evaluated, some of them twice.
        """
        if step % config.occupancy_every:
            return
        with torch.no_grad():
            if step < config.occupancy_warmup:
                cells = torch.arange(self.occs.numel(), device=self.occs.device)
                points = self._random_points(cells, generator)
            elif generator.device.type == "cpu":
                cells = self._draw_cells(generator)
                points = self._random_points(cells, generator)
            else:
                cells, points = self._draw_fixed(generator)
            density = density_fn(points)
            binary = update_occupancy(
                self.occs,
                cells,
                density.to(self.occs.dtype) * self.step_size,
                config.occupancy_decay,
                config.occupancy_threshold,
                backend=self.backend,
            )
            self.binary.copy_(binary)  # in place: captured renderings read it there

    def mean(self) -> float:
        """Mean of density * step size over all cells: the bound of the alpha threshold."""
        return float(self.mean_tensor())

    def mean_tensor(self) -> Tensor:
        """`mean()` as a tensor [] on the grid's device, without a synchronisation."""
        return self.occs.mean()

    def state_dict(self) -> dict[str, Tensor]:
        """`occs` and `binary` (as uint8), fit for safetensors."""
        return {"occs": self.occs, "binary": self.binary.to(torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a state of `state_dict`; SDIFastError where it does not fit."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise SDIFastError(f"occupancy: expected {sorted(own)}, got {sorted(state)}")
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise SDIFastError(
                    f"occupancy.{name}: expected shape {list(value.shape)}, "
                    f"got {list(state[name].shape)}"
                )
        self.occs.copy_(state["occs"])
        self.binary.copy_(state["binary"] != 0)

    def _draw_cells(self, generator: torch.Generator) -> Tensor:  # [M] i64
        n_cells = self.occs.numel()
        n_drawn = max(n_cells // 4, 1)

        def draw(high: int) -> Tensor:
            picks = torch.randint(high, (n_drawn,), generator=generator, device=generator.device)
            return picks.to(self.occs.device)

        uniform = draw(n_cells)
        occupied = torch.nonzero(self.binary.flatten())[:, 0]
        if len(occupied) > n_drawn:
            occupied = occupied[draw(len(occupied))]
        return torch.cat([uniform, occupied])

    def _draw_fixed(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As `_draw_cells`, always 2 n_drawn cells, and their points [2 n_drawn, 3].

        Where fewer cells than n_drawn are occupied, the rest repeats the first cell with the same
        point, which changes nothing.
        """
        device, n_cells = self.occs.device, self.occs.numel()
        n_drawn = max(n_cells // 4, 1)
        uniform = torch.randint(
            n_cells, (n_drawn,), generator=generator, device=generator.device
        ).to(device)
        share = torch.rand(
            n_drawn, generator=generator, device=generator.device, dtype=torch.float64
        ).to(device)
        n_before = self.binary.flatten().cumsum(0)  # occupied cells up to each one, itself included
        n_occupied = n_before[-1]
        slot = torch.arange(n_drawn, device=device)
        drawn = (share * n_occupied).long()  # below n_occupied, as share is below 1
        rank = torch.where(n_occupied > n_drawn, drawn, slot)
        cells = torch.cat([uniform, torch.searchsorted(n_before, rank + 1)])
        is_spare = torch.cat([torch.zeros_like(slot, dtype=torch.bool), rank >= n_occupied])
        cells = torch.where(is_spare, cells[0], cells)
        points = self._random_points(cells, generator)
        return cells, torch.where(is_spare[:, None], points[0], points)

    def _random_points(self, cells: Tensor, generator: torch.Generator) -> Tensor:
        """One point [M, 3], in scene units, in each of the cells [M]."""
        g = self.resolution
        corner = torch.stack([cells // (g * g), cells // g % g, cells % g], dim=-1)
        inside = torch.rand(len(cells), 3, generator=generator, device=generator.device)
        return (corner + inside.to(cells.device)) / g * (2.0 * self.radius) - self.radius
