"""The network under classifier-free guidance, one forward for both predictions.

Ho and Salimans, "Classifier-free diffusion guidance", 2022.

Letters: B batch, C latent channels, T H W latent frames/rows/columns, L tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from transfer1.diffusion.condition import Condition
from transfer1.diffusion.sampler import guided
from transfer1.model.block import CrossAttention
from transfer1.model.control import Weights, normalize_weights, weights_per_hint
from transfer1.model.transfer import Transfer

Residuals = dict[int, Tensor]
TEXT_FIELDS = ("context", "context_mask")
FRAME_FIELDS = ("gt_latent", "frame_indicator", "frame_mask", "augment_sigma", "video_cond_bool")


class GuidedNetwork:
    """Network outputs with guidance, to be called by `denoise`.

    Guidance on outputs equals guidance on x0, which is linear in them, as long as both predictions
    start from one input: given frames are shown to both alike.

    The control branch runs once per call where its residuals serve both predictions: where its
    blocks do not attend to the text, and where the uncondition has no hint.

    Args:
        model: in evaluation mode.
        uncondition: without its fields of frames, which are those of the condition.
        hints, weights: as `Transfer.forward` takes them.
        guidance: 0 = the conditional prediction alone.
        use_none_hint: the uncondition has no hint.
        batched: both predictions in one forward of twice the batch. Where the device has not the
            memory for it, or texts differ in length or clips in fps, they run one after the other.
    """

    def __init__(
        self,
        model: Transfer,
        uncondition: Condition,
        hints: Sequence[Tensor],
        weights: Weights,
        guidance: float,
        use_none_hint: bool = False,
        batched: bool = True,
    ) -> None:
        self.model = model
        self.uncondition = uncondition
        self.hints = list(hints)
        shares = weights_per_hint(weights, len(self.hints))
        self.weights = normalize_weights(shares) if len(shares) > 1 else shares
        self.guidance = guidance
        self.use_none_hint = use_none_hint
        self.batched = batched

    def __call__(self, x: Tensor, noise_level: Tensor, condition: Condition) -> Tensor:
        """x [B, C, T, H, W] and c_noise [B] -> guided output [B, C, T, H, W]."""
        if self.guidance == 0:
            return self._base(x, noise_level, condition, self._residuals(x, noise_level, condition))
        frames = {name: getattr(condition, name) for name in FRAME_FIELDS}
        uncondition = dataclasses.replace(self.uncondition, **frames)
        if self.batched and _can_stack(condition, uncondition):
            try:
                both = self._together(x, noise_level, condition, uncondition)
                return guided(both[: len(x)], both[len(x) :], self.guidance)
            except torch.OutOfMemoryError:
                logger.warning("no memory for guidance in one forward: two forwards from here on")
                self.batched = False
        residuals = self._residuals(x, noise_level, condition)
        conditional = self._base(x, noise_level, condition, residuals)
        if self.use_none_hint:
            residuals = None
        elif not self._shares_residuals(condition, uncondition):
            residuals = self._residuals(x, noise_level, uncondition)
        unconditional = self._base(x, noise_level, uncondition, residuals)
        return guided(conditional, unconditional, self.guidance)

    def _together(
        self, x: Tensor, noise_level: Tensor, condition: Condition, uncondition: Condition
    ) -> Tensor:
        """Outputs [2B, C, T, H, W]: conditional, then unconditional."""
        twice_x, twice_level = torch.cat([x, x]), torch.cat([noise_level, noise_level])
        stacked = _stack(condition, uncondition)
        residuals: Residuals | None
        if self.use_none_hint or self._shares_residuals(condition, uncondition):
            once = self._residuals(x, noise_level, condition) or {}
            residuals = {
                block: torch.cat([value, torch.zeros_like(value) if self.use_none_hint else value])
                for block, value in once.items()
            }
        else:
            residuals = self._residuals(twice_x, twice_level, stacked, copies=2)
        return self._base(twice_x, twice_level, stacked, residuals)

    def _shares_residuals(self, condition: Condition, uncondition: Condition) -> bool:
        """Whether the control branch sees no difference between the two."""
        control = self.model.net
        if control is None:
            return True
        reads_text = any(isinstance(module, CrossAttention) for module in control.modules())
        unseen = () if reads_text else TEXT_FIELDS
        return all(
            _equal(getattr(condition, field.name), getattr(uncondition, field.name))
            for field in dataclasses.fields(Condition)
            if field.name not in unseen
        )

    def _residuals(
        self, x: Tensor, noise_level: Tensor, condition: Condition, copies: int = 1
    ) -> Residuals | None:
        if not self.hints:
            return None
        if self.model.net is None:
            raise ValueError("hints came in, but there is no control branch: set net_ctrl=NAME")
        hints = [torch.cat([hint] * copies) for hint in self.hints]
        weights = [_copied(weight, copies) for weight in self.weights]
        return self.model.net(x, noise_level, condition, hints, weights)

    def _base(
        self, x: Tensor, noise_level: Tensor, condition: Condition, residuals: Residuals | None
    ) -> Tensor:
        output = self.model.base(x, noise_level, condition, residuals)
        assert isinstance(output, Tensor)  # no features were asked for
        return output


def _can_stack(condition: Condition, uncondition: Condition) -> bool:
    same_text = condition.context.shape == uncondition.context.shape
    return same_text and _equal(condition.fps, uncondition.fps)


def _stack(condition: Condition, uncondition: Condition) -> Condition:
    """Both on the batch axis, for the network: `gt_latent` and `frame_indicator` stay single."""
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(Condition):
        first, second = getattr(condition, field.name), getattr(uncondition, field.name)
        if isinstance(first, Tensor) and field.name not in ("gt_latent", "frame_indicator"):
            joined[field.name] = torch.cat([first, second])
    return dataclasses.replace(condition, **joined)


def _equal(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return first is second or (not isinstance(first, Tensor) and first == second)


def _copied(weight: float | Tensor, copies: int) -> float | Tensor:
    """A weight for a batch that was repeated: one per sample is repeated too."""
    if isinstance(weight, Tensor) and weight.ndim and len(weight) > 1:
        return torch.cat([weight] * copies)
    return weight
