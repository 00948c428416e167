"""The control branch: a copy of the first blocks of the base that turns hints into residuals.

Letters: B batch, C channels, T H W latent frames/rows/columns, t h w the token grid,
L = t*h*w tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import Ops
from transfer1.diffusion.condition import Condition

from .backbone import Backbone
from .layers import Grid

# How strongly hints act: one number for all, or for each hint one number, one number per sample
# [B], or one map [B or 1, 1, ...].
Weights = float | Tensor | Sequence[float | Tensor] | None

HINT_WIDTHS = (16, 16, 32, 32, 96, 96, 256)  # hidden widths of input_hint_block


class ControlEncoder(Backbone):
    """Control branch: reads the noisy latent and a hint, returns one residual per control block.

    Args other than these are those of `Backbone`:
        num_blocks: blocks of the base network.
        hint_channels: channels of the largest hint; a smaller one is zero-padded.
        dropout_ctrl_branch: how often a sample trains without control when the base trains too; the
            draw is made by the training step and comes in as `keep_B`.
        hint_gain: factor on the initial weights of the hint layers. At 1, the original's, seven
            narrow SiLU layers shrink the hint about 300 times, which takes thousands of updates to
            undo; short runs from scratch set about 3.
        num_control_blocks: blocks of this branch, at most num_blocks.
    """

    def __init__(
        self,
        max_img_h: int,
        max_img_w: int,
        max_frames: int,
        in_channels: int,
        out_channels: int,
        patch_spatial: int,
        patch_temporal: int,
        num_control_blocks: int,
        hint_channels: int = 16,
        dropout_ctrl_branch: float = 0.5,
        hint_gain: float = 1.0,
        concat_padding_mask: bool = True,
        block_config: str = "FA-CA-MLP",
        model_channels: int = 768,
        num_blocks: int = 10,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        crossattn_emb_channels: int = 1024,
        pos_emb_cls: str = "sincos",
        pos_emb_learnable: bool = False,
        pos_emb_interpolation: str = "crop",
        min_fps: int = 1,
        max_fps: int = 30,
        additional_timestamp_channels: dict[str, int] | None = None,
        affline_emb_norm: bool = False,
        use_adaln_lora: bool = False,
        adaln_lora_dim: int = 256,
        legacy_patch_emb: bool = True,
        rope_h_extrapolation_ratio: float = 1.0,
        rope_w_extrapolation_ratio: float = 1.0,
        rope_t_extrapolation_ratio: float = 1.0,
        extra_per_block_abs_pos_emb: bool = False,
        extra_per_block_abs_pos_emb_type: str = "sincos",
        extra_h_extrapolation_ratio: float = 1.0,
        extra_w_extrapolation_ratio: float = 1.0,
        extra_t_extrapolation_ratio: float = 1.0,
        concat_frame_mask: bool = False,
        add_augment_sigma_embedding: bool = False,
        activation_checkpoint: str = "none",
        ops: Ops | None = None,
    ) -> None:
        if not 1 <= num_control_blocks <= num_blocks:
            raise ValueError(
                f"num_control_blocks={num_control_blocks} must lie between 1 and "
                f"num_blocks={num_blocks}, the blocks of the base network"
            )
        super().__init__(
            max_img_h=max_img_h,
            max_img_w=max_img_w,
            max_frames=max_frames,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_spatial=patch_spatial,
            patch_temporal=patch_temporal,
            concat_padding_mask=concat_padding_mask,
            block_config=block_config,
            model_channels=model_channels,
            num_blocks=num_control_blocks,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            crossattn_emb_channels=crossattn_emb_channels,
            pos_emb_cls=pos_emb_cls,
            pos_emb_learnable=pos_emb_learnable,
            pos_emb_interpolation=pos_emb_interpolation,
            min_fps=min_fps,
            max_fps=max_fps,
            additional_timestamp_channels=additional_timestamp_channels,
            affline_emb_norm=affline_emb_norm,
            use_adaln_lora=use_adaln_lora,
            adaln_lora_dim=adaln_lora_dim,
            legacy_patch_emb=legacy_patch_emb,
            rope_h_extrapolation_ratio=rope_h_extrapolation_ratio,
            rope_w_extrapolation_ratio=rope_w_extrapolation_ratio,
            rope_t_extrapolation_ratio=rope_t_extrapolation_ratio,
            extra_per_block_abs_pos_emb=extra_per_block_abs_pos_emb,
            extra_per_block_abs_pos_emb_type=extra_per_block_abs_pos_emb_type,
            extra_h_extrapolation_ratio=extra_h_extrapolation_ratio,
            extra_w_extrapolation_ratio=extra_w_extrapolation_ratio,
            extra_t_extrapolation_ratio=extra_t_extrapolation_ratio,
            concat_frame_mask=concat_frame_mask,
            add_augment_sigma_embedding=add_augment_sigma_embedding,
            activation_checkpoint=activation_checkpoint,
            ops=ops,
        )
        self.hint_channels = hint_channels
        self.dropout_ctrl_branch = dropout_ctrl_branch
        self.hint_gain = hint_gain
        self.x_embedder2 = self.patch_embedder(hint_channels, model_channels)
        layers: list[nn.Module] = []
        widths = (model_channels, *HINT_WIDTHS, model_channels)
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*layers[:-1])
        self.zero_blocks = nn.ModuleDict(
            {name: nn.Linear(model_channels, model_channels) for name in self.blocks}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all linear layers again; hint and residuals start at exactly zero."""
        super().reset_parameters()
        if not hasattr(self, "zero_blocks"):  # called by Backbone.__init__, before they exist
            return
        for layer in self.input_hint_block:
            if isinstance(layer, nn.Linear):
                layer.weight.data.mul_(self.hint_gain)
        for layer in (self.input_hint_block[-1], self.zero_blocks):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        x_BCTHW: Tensor,
        noise_level_B: Tensor,
        condition: Condition,
        hints: Sequence[Tensor],
        weights: Weights = None,
        keep_B: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Compute the control residuals; those of several hints add up.

        Args:
            x_BCTHW: noisy latent, as the base network gets it.
            noise_level_B: c_noise.
            condition: as the base network gets it.
            hints: encoded hints [B, C, T, H, W], C up to hint_channels.
            weights: how strongly each hint acts. A number or 0-d tensor serves all hints; a 1-d
                tensor or a sequence has one entry per hint; a tensor of more dimensions one map per
                hint. In a sequence, a 1-d tensor holds one number per sample. A map is
                [B or 1, 1, frames, rows, columns] at the resolution of the tokens, of the latent or
                of the pixels. None means 1.
            keep_B: 0 for samples that get no control, else 1; None keeps all.

        Returns:
            Block index -> residual [B, L, D].

        Raises:
            ValueError: hints or weights that do not fit, named with their shapes.
        """
        inputs = self.embed_inputs(x_BCTHW, noise_level_B, condition)
        residuals: dict[int, Tensor] = {}
        for hint, weight in zip(hints, weights_per_hint(weights, len(hints)), strict=True):
            hint_BLD = self.encode_hint(hint, condition, inputs.token_position)
            strength = _strength(weight, x_BCTHW, inputs.grid)
            if keep_B is not None:
                strength = strength * keep_B.to(x_BCTHW)[:, None, None]
            tokens_BLD = inputs.tokens
            for index, (name, block) in enumerate(self.blocks.items()):
                addend = hint_BLD if index == 0 else None
                tokens_BLD = self.run_block(block, tokens_BLD, *inputs.block_arguments, addend)
                residual = self.zero_blocks[name](tokens_BLD) * strength
                residuals[index] = residuals[index] + residual if index in residuals else residual
        return residuals

    def encode_hint(
        self, hint_BCTHW: Tensor, condition: Condition, token_position: Tensor | None = None
    ) -> Tensor:
        """Turn an encoded hint into tokens [B, L, D].

        Args:
            hint_BCTHW: latent of the control video, or of several on the channel axis.
            condition: for its padding mask.
            token_position: absolute position added to the tokens, None with rotary positions.

        Raises:
            ValueError: more channels than the branch was built for.
        """
        missing = self.hint_channels - hint_BCTHW.shape[1]
        if missing < 0:
            raise ValueError(
                f"a hint of shape {tuple(hint_BCTHW.shape)} has {hint_BCTHW.shape[1]} channels, "
                f"but the control branch takes at most {self.hint_channels}: raise "
                "model.net_ctrl.hint_channels"
            )
        padded = F.pad(hint_BCTHW, (0, 0, 0, 0, 0, 0, 0, missing))
        tokens_BLD = self.x_embedder2(self.append_padding_mask(padded, condition))
        if token_position is not None:
            tokens_BLD = tokens_BLD + token_position
        return self.input_hint_block(tokens_BLD)


def weights_per_hint(weights: Weights, num_hints: int) -> list[float | Tensor]:
    """Spread control weights over the hints.

    Raises:
        ValueError: not as many weights as hints.
    """
    if weights is None:
        weights = 1.0
    if isinstance(weights, int | float) or (isinstance(weights, Tensor) and weights.ndim == 0):
        return [weights] * num_hints
    listed = list(weights)
    if len(listed) != num_hints:
        raise ValueError(
            f"{len(listed)} control weights for {num_hints} hints: pass one number for all, or one "
            "number or map per hint"
        )
    return listed


def normalize_weights(weights: Sequence[float | Tensor]) -> list[float | Tensor]:
    """Share the control out when several hints ask for more than 1 together.

    Numbers are divided by max(1, their sum). With maps or numbers per sample among them, negative
    weights become 0 and the division is done at every voxel or sample; a number stands for all.

    Raises:
        ValueError: maps of different resolutions.
    """
    if all(_is_number(weight) for weight in weights):
        share = max(1.0, sum(float(weight) for weight in weights))
        return [weight / share for weight in weights]
    shapes = {tuple(w.shape) for w in weights if isinstance(w, Tensor) and w.ndim}
    if len(shapes) > 1:
        raise ValueError(
            f"control weight maps have shapes {sorted(shapes)}; give all maps of a clip one shape"
        )
    some_map = next(w for w in weights if isinstance(w, Tensor) and w.ndim)
    maps = [torch.as_tensor(w).to(some_map).clamp(min=0).expand_as(some_map) for w in weights]
    total = torch.stack(maps).sum(0).clamp(min=1)
    return [weight / total for weight in maps]


def _is_number(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) or weight.ndim == 0


def _strength(weight: float | Tensor, x_BCTHW: Tensor, grid: Grid) -> float | Tensor:
    """The factor of a residual [B, L, D]: a number, or one per token [B or 1, L, 1]."""
    if not isinstance(weight, Tensor) or weight.ndim == 0:
        return weight
    if weight.ndim == 1:
        return weight.to(x_BCTHW)[:, None, None]
    weight_B1thw = resize_weight_map(weight.to(x_BCTHW), Grid(*x_BCTHW.shape[2:]), grid)
    if weight_B1thw.shape[0] not in (1, len(x_BCTHW)):
        raise ValueError(
            f"a control weight map has shape {tuple(weight.shape)} for a batch of {len(x_BCTHW)}: "
            "its first axis must be 1 or the batch size"
        )
    return weight_B1thw.flatten(1)[..., None]


def resize_weight_map(weight_B1FHW: Tensor, latent: Grid, grid: Grid) -> Tensor:
    """Bring a map of control weights to the token grid.

    Like the tokenizer, the first latent frame stands for the first frame alone and the others for
    the rest: each part is resized by itself, trilinearly, and then the whole to the tokens.

    Args:
        weight_B1FHW: map at the resolution of the tokens, of the latent, or of the pixels: an
            integer multiple of the latent's rows and columns, and 1 + k * (T - 1) frames.
        latent: frames, rows and columns of the latent.
        grid: token grid.

    Returns:
        [B, 1, t, h, w].

    Raises:
        ValueError: any other shape.
    """
    size = tuple(weight_B1FHW.shape[2:])
    if weight_B1FHW.ndim != 5 or weight_B1FHW.shape[1] != 1 or not _fits(size, latent, grid):
        raise ValueError(
            f"a control weight map has shape {tuple(weight_B1FHW.shape)}; expected [batch or 1, 1, "
            f"frames, rows, columns] with {tuple(grid)} (tokens), {tuple(latent)} (latent), or "
            f"pixels: 1 + k * {latent.t - 1} frames and a multiple of {latent.h} x {latent.w} rows "
            "and columns"
        )
    if size == grid:
        return weight_B1FHW
    parts = []
    if size != latent:
        parts.append(_resize(weight_B1FHW[:, :, :1], (1, latent.h, latent.w)))
        if latent.t > 1:
            parts.append(_resize(weight_B1FHW[:, :, 1:], (latent.t - 1, latent.h, latent.w)))
        weight_B1FHW = torch.cat(parts, dim=2)
    return _resize(weight_B1FHW, grid)


def _fits(size: tuple[int, ...], latent: Grid, grid: Grid) -> bool:
    if size in (tuple(grid), tuple(latent)):
        return True
    frames, rows, columns = size
    if rows % latent.h or columns % latent.w or rows // latent.h != columns // latent.w:
        return False
    return frames == 1 if latent.t == 1 else frames > 1 and (frames - 1) % (latent.t - 1) == 0


def _resize(volume: Tensor, size: tuple[int, int, int]) -> Tensor:
    return F.interpolate(volume, size=size, mode="trilinear", align_corners=False)
