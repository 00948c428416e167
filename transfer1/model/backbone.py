"""What the base network and its control branch share: embeddings, blocks and initialisation.

Letters: B batch, C latent channels, T H W latent frames/rows/columns, t h w the token grid,
L = t*h*w tokens, M context tokens, D width, R rotary pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import Ops, select
from transfer1.diffusion.condition import Condition, DataType

from .block import AdaLNSublayer, TransformerBlock, checkpointing
from .layers import EPS, FinalLayer, Grid, PatchEmbed, time_embedder
from .position import Rotary, build_extra_position, build_position, rotary_table

# Extra time embeddings: name -> column of image_size, None for the frame rate.
TIMESTAMPS: Mapping[str, int | None] = {"fps": None, "h": 0, "w": 1, "org_h": 2, "org_w": 3}


class Embedded(NamedTuple):
    """The inputs of the transformer blocks."""

    tokens: Tensor  # [B, L, D]
    emb: Tensor  # activated conditioning vector [B, D]
    context: Tensor  # text [B, M, C]
    rope: Tensor | None  # rotary table of self-attention [2, L, R]
    adaln_lora: Tensor | None  # modulation shared by all sublayers [B, 3D]
    position: Tensor | None  # added at the start of every block [L, D]
    token_position: Tensor | None  # added once, before the blocks [L, D] or [B, L, D]
    grid: Grid

    @property
    def block_arguments(self) -> tuple[Tensor | None, ...]:
        """What every block takes after the tokens."""
        return self.emb, self.context, self.rope, self.adaln_lora, self.position


class Backbone(nn.Module):
    """Embeddings, blocks and final layer: everything that base network and control branch share.

    Args:
        max_img_h: rows of the largest latent.
        max_img_w: columns of the largest latent.
        max_frames: frames of the largest latent.
        in_channels: channels of the network input without the padding mask.
        out_channels: channels of the prediction.
        patch_spatial: rows and columns of a latent per token.
        patch_temporal: frames of a latent per token.
        concat_padding_mask: append the padding mask as a channel.
        block_config: sublayers of every block, joined by "-".
        model_channels: width D.
        num_blocks: number of transformer blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over D.
        crossattn_emb_channels: width of the text embeddings.
        pos_emb_cls: rope3d, rope, sincos, learnable, sincos_fps_aware or learnable_fps_aware.
        pos_emb_learnable: whether a sincos table is trained.
        pos_emb_interpolation: how a table serves smaller clips; only "crop".
        min_fps: slowest frame rate of a frame-rate-aware table.
        max_fps: frame rate at which such a table is sampled.
        additional_timestamp_channels: widths of extra time embeddings by name (fps, h, w, org_h,
            org_w).
        affline_emb_norm: RMSNorm on the conditioning vector.
        use_adaln_lora: low-rank modulation layers plus one modulation shared by all sublayers.
        adaln_lora_dim: their rank.
        legacy_patch_emb: store the patch embedding as a convolution weight.
        rope_h_extrapolation_ratio: stretch of the rotary row axis.
        rope_w_extrapolation_ratio: stretch of the rotary column axis.
        rope_t_extrapolation_ratio: stretch of the rotary frame axis.
        extra_per_block_abs_pos_emb: add an absolute position at the start of every block.
        extra_per_block_abs_pos_emb_type: sincos or learnable.
        extra_h_extrapolation_ratio: stretch of the extra sincos row axis.
        extra_w_extrapolation_ratio: stretch of the extra sincos column axis.
        extra_t_extrapolation_ratio: stretch of the extra sincos frame axis.
        concat_frame_mask: append the mask of given frames as a channel, counted in in_channels.
        add_augment_sigma_embedding: condition on the noise level of the given frames.
        activation_checkpoint: none, selective or block; changes memory and speed, not values.
        ops: the chosen kernels; None for the references.
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
        super().__init__()
        ops = ops or select("reference")
        if model_channels % num_heads:
            raise ValueError(
                f"model_channels={model_channels} is not a multiple of num_heads={num_heads}"
            )
        if pos_emb_interpolation != "crop":
            raise ValueError(f"pos_emb_interpolation={pos_emb_interpolation!r}: only 'crop' exists")
        if concat_frame_mask and in_channels <= out_channels:
            raise ValueError(
                f"concat_frame_mask=True needs in_channels of at least {out_channels + 1} (the "
                f"latent and the mask), got in_channels={in_channels}"
            )
        self.in_channels = in_channels
        self.patch_spatial = patch_spatial
        self.patch_temporal = patch_temporal
        self.concat_padding_mask = concat_padding_mask
        self.concat_frame_mask = concat_frame_mask
        self.context_dim = crossattn_emb_channels
        self.legacy_patch_emb = legacy_patch_emb
        self.run_block = checkpointing(activation_checkpoint)

        self.x_embedder = self.patch_embedder(in_channels, model_channels)
        lengths = {
            "len_h": max_img_h // patch_spatial,
            "len_w": max_img_w // patch_spatial,
            "len_t": max_frames // patch_temporal,
        }
        self.pos_embedder = build_position(
            pos_emb_cls,
            width=model_channels,
            head_dim=model_channels // num_heads,
            lengths=lengths,
            ratios={
                "h_extrapolation_ratio": rope_h_extrapolation_ratio,
                "w_extrapolation_ratio": rope_w_extrapolation_ratio,
                "t_extrapolation_ratio": rope_t_extrapolation_ratio,
            },
            fps={"min_fps": min_fps, "max_fps": max_fps},
            learnable=pos_emb_learnable,
        )
        self.extra_pos_embedder = None
        if extra_per_block_abs_pos_emb:
            self.extra_pos_embedder = build_extra_position(
                extra_per_block_abs_pos_emb_type,
                width=model_channels,
                lengths=lengths,
                ratios={
                    "h_extrapolation_ratio": extra_h_extrapolation_ratio,
                    "w_extrapolation_ratio": extra_w_extrapolation_ratio,
                    "t_extrapolation_ratio": extra_t_extrapolation_ratio,
                },
            )
        self.t_embedder = time_embedder(model_channels, use_adaln_lora)
        lora_dim = adaln_lora_dim if use_adaln_lora else None
        self.blocks = nn.ModuleDict(
            {
                f"block{index}": TransformerBlock(
                    block_config,
                    model_channels,
                    crossattn_emb_channels,
                    num_heads,
                    mlp_ratio,
                    lora_dim,
                    ops,
                )
                for index in range(num_blocks)
            }
        )
        patch_values = patch_spatial**2 * patch_temporal * out_channels
        self.final_layer = FinalLayer(model_channels, patch_values, lora_dim, ops)
        self.additional_timestamp_embedder = _timestamp_embedders(
            additional_timestamp_channels or {}, model_channels
        )
        # "affline" is the spelling of released checkpoints.
        self.affline_norm = (
            nn.RMSNorm(model_channels, eps=EPS) if affline_emb_norm else nn.Identity()
        )
        self.augment_sigma_embedder = (
            time_embedder(model_channels, use_adaln_lora) if add_augment_sigma_embedding else None
        )
        self.reset_parameters()

    def patch_embedder(self, channels: int, width: int) -> PatchEmbed:
        """A patch embedding for an input of `channels`, and the padding mask if there is one."""
        channels += self.concat_padding_mask
        return PatchEmbed(
            self.patch_spatial, self.patch_temporal, channels, width, self.legacy_patch_emb
        )

    def reset_parameters(self) -> None:
        """Draw all linear layers again: identities at the start, Xavier-uniform elsewhere."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
        for layer in self.t_embedder.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLNSublayer):
                for parameter in module.adaLN_modulation[-1].parameters():
                    nn.init.zeros_(parameter)

    def embed_inputs(
        self, x_BCTHW: Tensor, noise_level_B: Tensor, condition: Condition
    ) -> Embedded:
        """Turn a noisy latent and its condition into the inputs of the blocks.

        Raises:
            ValueError: shapes that do not fit, or a part of the condition that is missing.
        """
        x_BCTHW = self.append_padding_mask(self._input_channels(x_BCTHW, condition), condition)
        grid = self.x_embedder.grid(x_BCTHW)
        x_BLD = self.x_embedder(x_BCTHW)

        rope_2LR = token_position = position_LD = None
        position = self.pos_embedder(grid, condition.fps)
        if isinstance(self.pos_embedder, Rotary):
            rope_2LR = rotary_table(position).to(x_BLD.device)
        else:
            token_position = position.to(x_BLD.dtype)
            x_BLD = x_BLD + token_position
        if self.extra_pos_embedder is not None:
            position_LD = self.extra_pos_embedder(grid, condition.fps).to(x_BLD.dtype)

        emb_BD, adaln_lora_B3D = self.t_embedder(
            self._per_sample("noise_level", noise_level_B, x_BLD)
        )
        if self.additional_timestamp_embedder:
            emb_BD = emb_BD + self._additional_embedding(condition, emb_BD)
        if self.augment_sigma_embedder is not None:
            emb_BD = emb_BD + self._augment_sigma_embedding(condition, noise_level_B, x_BLD)
        emb_BD = F.silu(self.affline_norm(emb_BD))
        context_BMC = self._context(condition, x_BLD)
        return Embedded(
            x_BLD, emb_BD, context_BMC, rope_2LR, adaln_lora_B3D, position_LD, token_position, grid
        )

    def append_padding_mask(self, x_BCTHW: Tensor, condition: Condition) -> Tensor:
        """Append the padding mask, shrunk to the latent, as a last channel of every frame."""
        if not self.concat_padding_mask:
            return x_BCTHW
        if condition.padding_mask is None:
            raise ValueError(
                "the network takes a padding mask, but the condition has none: put padding_mask "
                "into the batch and the conditioner, or set concat_padding_mask=False"
            )
        B, _, T, H, W = x_BCTHW.shape
        mask_B1HW = F.interpolate(condition.padding_mask.float(), size=(H, W), mode="nearest")
        mask_B1THW = mask_B1HW[:, :, None].expand(B, 1, T, H, W).to(x_BCTHW.dtype)
        return torch.cat([x_BCTHW, mask_B1THW], dim=1)

    def _input_channels(self, x_BCTHW: Tensor, condition: Condition) -> Tensor:
        """The latent with the mask of given frames (and the camera pose) as further channels."""
        B, C, T, H, W = x_BCTHW.shape
        extra: list[Tensor] = []
        if self.concat_frame_mask and condition.data_type is DataType.IMAGE:
            extra.append(x_BCTHW.new_zeros(B, self.in_channels - C, T, H, W))
        elif self.concat_frame_mask:
            if condition.frame_mask is None:
                raise ValueError(
                    "the network takes a mask of given frames (concat_frame_mask=True), but the "
                    "condition of this clip has no frame_mask"
                )
            extra.append(condition.frame_mask.to(x_BCTHW.dtype))
            if condition.pose is not None:
                extra.append(condition.pose[:, :, :T].to(x_BCTHW.dtype))
        x_BCTHW = torch.cat([x_BCTHW, *extra], dim=1) if extra else x_BCTHW
        if x_BCTHW.shape[1] != self.in_channels:
            raise ValueError(
                f"a latent of {C} channels came in with {x_BCTHW.shape[1] - C} for conditioning, "
                f"but the network was built for in_channels={self.in_channels}: change "
                "in_channels of the network, or the tokenizer"
            )
        return x_BCTHW

    def _context(self, condition: Condition, x_BLD: Tensor) -> Tensor:
        context = condition.context
        if (
            context.ndim != 3
            or context.shape[0] != len(x_BLD)
            or context.shape[2] != self.context_dim
        ):
            raise ValueError(
                f"text embeddings have shape {tuple(context.shape)}, expected [{len(x_BLD)}, "
                f"tokens, {self.context_dim}]: change crossattn_emb_channels of the network or "
                "the embeddings"
            )
        return context

    @staticmethod
    def _per_sample(name: str, value_B: Tensor, x_BLD: Tensor) -> Tensor:
        """Flatten to [B]; a single value serves all samples."""
        value_B = value_B.flatten()
        if value_B.numel() not in (1, len(x_BLD)):
            raise ValueError(
                f"{name} has {value_B.numel()} values for a batch of {len(x_BLD)}; pass one each"
            )
        return value_B.expand(len(x_BLD))

    def _additional_embedding(self, condition: Condition, emb_BD: Tensor) -> Tensor:
        """Embeddings of frame rate and image size side by side, zero-padded to D."""
        parts = []
        for name, embedder in self.additional_timestamp_embedder.items():
            column = TIMESTAMPS[name]
            source, value = "fps", condition.fps
            if column is not None:
                source, value = "image_size", condition.image_size
            if value is None:
                raise ValueError(
                    f"additional_timestamp_channels.{name} needs {source}, which the condition "
                    "lacks: put it into the batch and the conditioner"
                )
            value_B = value if column is None else value[:, column]
            parts.append(embedder(self._per_sample(name, value_B.float(), emb_BD))[0])
        joined = torch.cat(parts, dim=-1)
        return F.pad(joined, (0, emb_BD.shape[-1] - joined.shape[-1]))

    def _augment_sigma_embedding(
        self, condition: Condition, noise_level_B: Tensor, x_BLD: Tensor
    ) -> Tensor:
        assert self.augment_sigma_embedder is not None
        augment_sigma = condition.augment_sigma
        if condition.data_type is DataType.IMAGE:
            augment_sigma = torch.zeros_like(noise_level_B)
        if augment_sigma is None:
            raise ValueError(
                "the network embeds the noise level of the given frames "
                "(add_augment_sigma_embedding=True), but the condition has no augment_sigma: set "
                "condition_on_augment_sigma=True for the model"
            )
        value_B = self._per_sample("augment_sigma", augment_sigma, x_BLD)
        return self.augment_sigma_embedder(value_B)[0]


def _timestamp_embedders(channels: Mapping[str, int], width: int) -> nn.ModuleDict:
    unknown = sorted(set(channels) - set(TIMESTAMPS))
    if unknown:
        raise ValueError(
            f"additional_timestamp_channels names {', '.join(unknown)}; "
            f"choose from {', '.join(TIMESTAMPS)}"
        )
    if sum(channels.values()) > width or any(size % 2 for size in channels.values()):
        raise ValueError(
            f"additional_timestamp_channels {dict(channels)}: widths must be even and add up to at "
            f"most model_channels={width}"
        )
    return nn.ModuleDict(
        {name: time_embedder(size, use_adaln_lora=False) for name, size in channels.items()}
    )
