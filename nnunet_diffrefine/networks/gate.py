"""The gate: classes that refinement does not help keep stage one's decision, voxel by voxel.

Exclusive classes compete for every voxel, so a voxel is stage one's or the refiner's as a whole. It stays stage one's
where either of the two decides a gated class, and where both decide background but for either the likeliest class is a
gated one. A gated class then has stage one's voxels exactly, and with all classes gated stage one passes bit by bit.
(The last half of the rule changes no decision here; it keeps a gated class unchanged where logits are averaged
afterwards, over folds or models.)

Regions have logits of their own: a gated region keeps stage one's. Of the others, one inside a gated region is cut to
it, and one around a gated region is grown to hold it, so what was nested stays nested: with a region's refined logit
R and stage one's S, its result is max(min(R, S of gated ancestors), S of gated descendants). Offsets may take a region
out of its parent: where there are any, R counts with its offset, and the min is with the parent's result too.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError, GateConfig


@dataclass(frozen=True)
class Gate:
    """Which classes are refined, and the offsets of their decision.

    Attributes:
        foreground: meaning of the R channels.
        unchanged: channels that keep stage one's decision.
        offsets: added to the refined logit of each channel, (R,) or empty for none; those of unchanged channels are
            not used.
    """

    foreground: Foreground
    unchanged: frozenset[int] = frozenset()
    offsets: tuple[float, ...] = ()

    @classmethod
    def from_settings(cls, settings: GateConfig, foreground: Foreground) -> Gate:
        """The gate that the plans describe.

        Raises:
            ConfigError: a name is none of the classes'.
        """
        names = list(foreground.names)
        for key, given in (("unchanged", settings.unchanged), ("offsets", settings.offsets)):
            if unknown := [name for name in given if name not in names]:
                near = difflib.get_close_matches(unknown[0], names, 1)
                meant = f" Did you mean '{near[0]}'?" if near else ""
                raise ConfigError(
                    f"diffrefine setting 'gate.{key}' names '{unknown[0]}', which is no class of {names}.{meant}"
                )
        unchanged = frozenset(names.index(name) for name in settings.unchanged)
        offsets = tuple(float(settings.offsets.get(name, 0.0)) for name in names)
        return cls(foreground, unchanged, offsets if any(offsets) else ())

    @property
    def closed(self) -> bool:
        """Whether no class is refined."""
        return len(self.unchanged) == self.foreground.channels

    @property
    def shifts(self) -> bool:
        """Whether any refined class has an offset."""
        return any(offset for channel, offset in enumerate(self.offsets) if channel not in self.unchanged)

    def __call__(self, refined: Tensor, stage_one: Tensor) -> Tensor:
        """Logits (B, H, *S) that are used, of the refiner's and of stage one's, both (B, H, *S)."""
        if self.closed:
            return stage_one
        if self.shifts:
            refined = self._shifted(refined)
        if self.foreground.exclusive:
            return self._exclusive(refined, stage_one) if self.unchanged else refined
        return self._regions(refined, stage_one) if self.unchanged or self.shifts else refined

    def _shifted(self, refined: Tensor) -> Tensor:
        used = [0.0 if channel in self.unchanged else offset for channel, offset in enumerate(self.offsets)]
        heads = [0.0, *used] if self.foreground.exclusive else used
        shift = torch.tensor(heads, device=refined.device, dtype=refined.dtype)
        return refined + shift.view(1, -1, *([1] * (refined.ndim - 2)))

    def _exclusive(self, refined: Tensor, stage_one: Tensor) -> Tensor:
        gated = torch.tensor(
            [False, *(channel in self.unchanged for channel in range(self.foreground.channels))], device=refined.device
        )
        decided = [logits.argmax(1) for logits in (refined, stage_one)]
        likeliest = [logits[:, 1:].argmax(1) + 1 for logits in (refined, stage_one)]
        background = (decided[0] == 0) & (decided[1] == 0)
        kept = gated[decided[0]] | gated[decided[1]]
        kept |= background & (gated[likeliest[0]] | gated[likeliest[1]])
        return torch.where(kept[:, None], stage_one.to(refined.dtype), refined)

    def _regions(self, refined: Tensor, stage_one: Tensor) -> Tensor:
        stage_one = stage_one.to(refined.dtype)
        ancestors = [self.foreground.ancestors(region) for region in range(self.foreground.channels)]
        results = list(stage_one.unbind(1))
        for region in sorted(range(self.foreground.channels), key=lambda r: len(ancestors[r])):  # parents first
            if region in self.unchanged:
                continue
            above, below = ancestors[region], [r for r, over in enumerate(ancestors) if region in over]
            channel = refined[:, region]
            if self.shifts and above:
                channel = torch.minimum(channel, results[above[0]])
            for ancestor in self.unchanged.intersection(above):
                channel = torch.minimum(channel, stage_one[:, ancestor])
            for descendant in self.unchanged.intersection(below):
                channel = torch.maximum(channel, stage_one[:, descendant])
            results[region] = channel
        return torch.stack(results, 1)
