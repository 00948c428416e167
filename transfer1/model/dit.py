"""The video diffusion transformer.

Letters: B batch, C latent channels, T H W latent frames/rows/columns, t h w the token grid,
L = t*h*w tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from transfer1.diffusion.condition import Condition

from .backbone import Backbone
from .layers import unpatchify


class DiT(Backbone):
    """The base network: predicts from a noisy latent, its noise level and its condition."""

    def forward(
        self,
        x_BCTHW: Tensor,
        noise_level_B: Tensor,
        condition: Condition,
        control_residuals: Mapping[int, Tensor] | None = None,
        feature_indices: Sequence[int] = (),
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Run the network.

        Args:
            x_BCTHW: noisy latent, scaled by c_in.
            noise_level_B: c_noise = log(sigma) / 4.
            condition: text and everything else that is known about the clip.
            control_residuals: block index -> [B, L, D], added to the output of that block.
            feature_indices: blocks whose output is returned too, as [B, t, h, w, D], before the
                control residual is added.

        Returns:
            The prediction [B, C, T, H, W]; with feature_indices (prediction, features).

        Raises:
            ValueError: shapes that do not fit, a missing part of the condition, or a block index
                that does not exist.
        """
        residuals = dict(control_residuals or {})
        for name, indices in (
            ("control_residuals", residuals),
            ("feature_indices", feature_indices),
        ):
            unknown = sorted(set(indices) - set(range(len(self.blocks))))
            if unknown:
                raise ValueError(
                    f"{name} names blocks {unknown}; there are {len(self.blocks)}, from 0"
                )
        inputs = self.embed_inputs(x_BCTHW, noise_level_B, condition)
        x_BLD, features = inputs.tokens, []
        for index, block in enumerate(self.blocks.values()):
            addend = residuals.get(index)
            if index in feature_indices:
                x_BLD = self.run_block(block, x_BLD, *inputs.block_arguments)
                features.append(x_BLD.unflatten(1, inputs.grid))
                x_BLD = x_BLD if addend is None else x_BLD + addend
            else:
                x_BLD = self.run_block(block, x_BLD, *inputs.block_arguments, addend)
        patches_BLP = self.final_layer(x_BLD, inputs.emb, inputs.adaln_lora)
        out = unpatchify(patches_BLP, inputs.grid, self.patch_temporal, self.patch_spatial)
        return (out, features) if feature_indices else out
