"""What the network is told about a clip.

Letters: B batch, C latent channels, T H W latent frames/rows/columns, M context tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from .draws import Draws
from .frame_condition import FrameConditioning


class DataType(Enum):
    """Whether a batch holds single images or clips."""

    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True)
class Condition:
    """Everything that conditions one denoising call; change it with `dataclasses.replace`."""

    context: Tensor  # text embeddings [B, M, channels]
    context_mask: Tensor | None = None  # [B, M]; carried along, attention never uses it
    fps: Tensor | None = None  # frames per second [B]
    num_frames: Tensor | None = None  # pixel frames [B]
    image_size: Tensor | None = (
        None  # target height, width, original height, width in pixels [B, 4]
    )
    padding_mask: Tensor | None = None  # [B, 1, height, width] in pixels, 1 = padded
    video_cond_bool: bool | None = None  # whether the given frames are shown to the network
    data_type: DataType = DataType.VIDEO
    gt_latent: Tensor | None = None  # clean latent [B, C, T, H, W]
    frame_indicator: Tensor | None = None  # [1, 1, T, 1, 1], 1 = frame is given
    frame_mask: Tensor | None = None  # input channel [B, 1, T, H, W], 1 = frame is given
    augment_sigma: Tensor | None = None  # c_noise of the noise on the given frames [B]
    pose: Tensor | None = None  # camera pose channels [B, channels, T, H, W]


class Dropout:
    """The fate of one embedder's inputs in one call: kept, or zeroed with probability `rate`.

    Rates of 0 and 1 are decided without a draw; the others draw under "dropout.<name>" per sample,
    or under "<name>" once per batch.
    """

    def __init__(self, name: str, rate: float, draws: Draws | None) -> None:
        self.name = name
        self.rate = rate
        self.draws = draws

    def __call__(self, values: Tensor) -> Tensor:
        """Values [B, ...], those of dropped samples multiplied by 0."""
        if self.rate == 0:
            return values
        if self.rate == 1:
            return torch.zeros_like(values)
        assert self.draws is not None, "dropout is drawn"
        keep_B = self.draws.bernoulli(f"dropout.{self.name}", 1 - self.rate, len(values))
        return values * keep_B.to(values).reshape(-1, *[1] * (values.ndim - 1))

    def flag(self) -> bool:
        """One decision for the batch: False if dropped."""
        if self.rate in (0, 1):
            return self.rate == 0
        assert self.draws is not None, "dropout is drawn"
        return self.draws.coin(self.name, 1 - self.rate)


class TextAttr:
    """Text embeddings and their mask; dropout zeroes the embeddings and leaves the mask."""

    def __call__(self, dropout: Dropout, context: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Embeddings [B, M, channels], mask [B, M] -> fields of a condition."""
        return {"context": dropout(context), "context_mask": mask}


class ReMapkey:
    """Passes a tensor of the batch on.

    Args:
        output_key: field of the condition.
        dtype: "float", "bfloat16", "half", "int" or "long" to convert to; None = as it is.
    """

    DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "float": torch.float32,
        "bfloat16": torch.bfloat16,
        "half": torch.float16,
        "int": torch.int32,
        "long": torch.int64,
    }

    def __init__(self, output_key: str, dtype: str | None = None) -> None:
        if output_key not in _FIELDS:
            raise ValueError(f"output_key={output_key}: choose one of {', '.join(sorted(_FIELDS))}")
        if dtype is not None and dtype not in self.DTYPES:
            raise ValueError(f"dtype={dtype}: choose one of {', '.join(self.DTYPES)} or null")
        self.output_key = output_key
        self.dtype = None if dtype is None else self.DTYPES[dtype]

    def __call__(self, dropout: Dropout, values: Tensor) -> dict[str, Tensor]:
        """Values [B, ...] -> field of a condition."""
        return {self.output_key: dropout(values).to(self.dtype or values.dtype)}


class BooleanFlag:
    """True, and False when dropped; one for the whole batch. Its input is only a placeholder."""

    def __init__(self, output_key: str = "video_cond_bool") -> None:
        if output_key not in _FIELDS:
            raise ValueError(f"output_key={output_key}: choose one of {', '.join(sorted(_FIELDS))}")
        self.output_key = output_key

    def __call__(self, dropout: Dropout, placeholder: Any) -> dict[str, bool]:
        """-> field of a condition."""
        return {self.output_key: dropout.flag()}


Embedder = TextAttr | ReMapkey | BooleanFlag

_FIELDS = {field.name for field in dataclasses.fields(Condition)}
_FRAME_FIELDS = {field.name for field in dataclasses.fields(FrameConditioning)}


class Conditioner:
    """Makes the condition of a batch.

    Args:
        embedders: name -> node with `obj` (the embedder), `dropout_rate`, and `input_key` or
            `input_keys` (names in the batch). A `BooleanFlag` node also holds the fields of
            `FrameConditioning`, found as `frames`; without such a node `frames` is None.

    Raises:
        ValueError: a node is not of this form.
    """

    def __init__(self, **embedders: Mapping[str, Any]) -> None:
        self.embedders: dict[str, Embedder] = {}
        self.dropout_rates: dict[str, float] = {}
        self.input_keys: dict[str, list[str]] = {}
        self.frames: FrameConditioning | None = None
        for name, node in embedders.items():
            options = dict(node)
            try:
                embedder = self.embedders[name] = options.pop("obj")
                rate = self.dropout_rates[name] = float(options.pop("dropout_rate"))
                single = "input_key" in options
                keys = [options.pop("input_key")] if single else list(options.pop("input_keys"))
            except KeyError as error:
                raise ValueError(
                    f"model.conditioner.{name} lacks {error}; an embedder has obj, dropout_rate "
                    f"and input_key or input_keys, this one {sorted(node)}"
                ) from None
            if not 0 <= rate <= 1:
                raise ValueError(f"model.conditioner.{name}.dropout_rate={rate}: not in [0, 1]")
            self.input_keys[name] = keys
            has_frames = isinstance(embedder, BooleanFlag)
            allowed = _FRAME_FIELDS if has_frames else set()
            if options.keys() - allowed:
                raise ValueError(
                    f"model.conditioner.{name}: unknown {sorted(options.keys() - allowed)}; "
                    f"{type(embedder).__name__} takes {sorted(allowed) or 'no further option'}"
                )
            if has_frames:
                self.frames = FrameConditioning(**options)

    @torch.no_grad()
    def __call__(
        self,
        batch: Mapping[str, Any],
        draws: Draws | None,
        data_type: DataType = DataType.VIDEO,
        dropout_rates: Mapping[str, float] | None = None,
    ) -> Condition:
        """The condition of a training batch.

        Args:
            draws: of dropout; None if every rate is 0 or 1.
            dropout_rates: rates by embedder to use instead of the configured ones.

        Raises:
            ValueError: the batch lacks an input, or no embedder makes the text context.
        """
        rates = {**self.dropout_rates, **(dropout_rates or {})}
        fields: dict[str, Any] = {}
        for name, embedder in self.embedders.items():
            missing = [key for key in self.input_keys[name] if key not in batch]
            if missing:
                raise ValueError(
                    f"model.conditioner.{name} needs {', '.join(missing)}, the batch holds "
                    f"{', '.join(sorted(batch))}"
                )
            inputs = [batch[key] for key in self.input_keys[name]]
            made: Mapping[str, Any] = embedder(Dropout(name, rates[name], draws), *inputs)
            for field, value in made.items():
                if field in fields:  # text joins along the tokens, all else along the last axis
                    axis = 1 if field.startswith("context") else -1
                    fields[field] = torch.cat([fields[field], value], axis)
                else:
                    fields[field] = value
        if "context" not in fields:
            raise ValueError(
                "model.conditioner makes no text context; give it a TextAttr (its usual name: text)"
            )
        return Condition(**fields, data_type=data_type)

    def pair(
        self,
        batch: Mapping[str, Any],
        data_type: DataType = DataType.VIDEO,
        negative_prompt: bool = False,
    ) -> tuple[Condition, Condition]:
        """Condition and uncondition for guidance: nothing dropped, and all that ever is dropped.

        With a negative prompt the text of neither is dropped; that of the uncondition comes from
        `neg_<input key>` of the batch where it is present.
        """
        kept = dict.fromkeys(self.embedders, 0.0)
        dropped = {name: float(rate > 1e-4) for name, rate in self.dropout_rates.items()}
        negative_batch = dict(batch)
        if negative_prompt:
            for name, embedder in self.embedders.items():
                if isinstance(embedder, TextAttr):
                    dropped[name] = 0.0
                    for key in self.input_keys[name]:
                        negative_batch[key] = batch.get(f"neg_{key}", batch[key])
        condition = self(batch, None, data_type, kept)
        return condition, self(negative_batch, None, data_type, dropped)
