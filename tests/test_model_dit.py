"""The base network: options, memory modes, precision, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from goldens import compare
from tiny_model import TINY, randomize, sample_of, tiny_dit, tiny_inputs
from torch import Tensor, nn

from kernels import select
from transfer1.diffusion.condition import DataType
from transfer1.model.block import TransformerBlock
from transfer1.model.dit import DiT


def loss_and_gradients(network: DiT, residuals: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    x, noise_level, condition = tiny_inputs()
    generator = torch.Generator().manual_seed(3)
    control = {1: torch.randn(2, 18, 48, generator=generator)} if residuals else None
    out = network(x, noise_level, condition, control)
    loss = (out * torch.randn(out.shape, generator=generator)).sum()
    network.zero_grad()
    loss.backward()
    named = network.named_parameters()
    return out, {name: value.grad for name, value in named if value.grad is not None}


@pytest.mark.parametrize("mode", ["selective", "block"])
@pytest.mark.parametrize("residuals", [False, True])
def test_activation_checkpointing_is_bitwise_the_same(mode: str, residuals: bool) -> None:
    plain, gradients = loss_and_gradients(tiny_dit(), residuals)
    out, recomputed = loss_and_gradients(tiny_dit(activation_checkpoint=mode), residuals)
    assert torch.equal(out, plain)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


def saved_bytes(mode: str) -> int:
    """Bytes of the activations that the forward pass keeps for the backward pass."""
    network = tiny_dit(activation_checkpoint=mode)
    parameters = {parameter.data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(*tiny_inputs())
    return sum(kept.values())


def test_checkpointing_keeps_less() -> None:
    assert saved_bytes("block") < saved_bytes("none") / 2


def test_samples_do_not_influence_each_other() -> None:
    """A batch gives what its samples give one by one, masks and modulation included."""
    network = tiny_dit()
    x, noise_level, condition = tiny_inputs(batch=3)
    together = network(x, noise_level, condition)
    for i in range(3):
        alone = network(x[i : i + 1], noise_level[i : i + 1], sample_of(condition, i))
        compare(together[i : i + 1], alone, f"sample {i}")


@pytest.mark.parametrize(
    "name", ["rope", "sincos", "learnable", "sincos_fps_aware", "learnable_fps_aware"]
)
def test_every_position_embedding_reaches_the_output(name: str) -> None:
    """Swapping two columns of the input is not the same as swapping them in the output."""
    network = tiny_dit(pos_emb_cls=name, extra_per_block_abs_pos_emb=False, min_fps=10)
    x, noise_level, condition = tiny_inputs()
    condition = replace(condition, padding_mask=torch.zeros(2, 1, 32, 48))
    order = [2, 3, 0, 1, 4, 5]
    out = network(x, noise_level, condition)
    swapped = network(x[..., order], noise_level, condition)[..., order]
    assert (out - swapped).abs().max() > 1e-3 * out.abs().max()


def test_positions_are_needed_to_tell_columns_apart() -> None:
    """The control of the test above: without any position the network is equivariant."""
    network = tiny_dit(pos_emb_cls="learnable", extra_per_block_abs_pos_emb=False)
    nn.init.zeros_(network.pos_embedder.pos_embed)
    x, noise_level, condition = tiny_inputs()
    condition = replace(condition, padding_mask=torch.zeros(2, 1, 32, 48))
    order = [2, 3, 0, 1, 4, 5]
    out = network(x, noise_level, condition)
    compare(network(x[..., order], noise_level, condition)[..., order], out, "swapped")


@pytest.mark.parametrize("config", ["FA", "mlp-CA", "ff-cross_attn-full_attn-mlp", "FA-FA"])
def test_any_order_and_number_of_sublayers(config: str) -> None:
    """A block is its sublayers one after another, each with its own residual."""
    torch.manual_seed(0)
    ops = select("reference")
    block = TransformerBlock(config, 24, 12, 2, 2.0, None, ops)
    randomize(block)
    x, emb, context = torch.randn(2, 6, 24), torch.randn(2, 24), torch.randn(2, 4, 12)
    expected = x
    for sublayer in block.blocks:
        shift, scale, gate = sublayer.modulation(emb, None)
        h = nn.functional.layer_norm(expected, (24,), eps=1e-6)
        h = h * (1 + scale[:, None]) + shift[:, None]
        expected = expected + gate[:, None] * sublayer.transform(h, context, None)
    compare(block(x, emb, context, None, None), expected, "block")


def test_features_come_before_the_control_residual() -> None:
    network = tiny_dit()
    inputs = tiny_inputs()
    residual = torch.randn(2, 18, 48)
    plain, (first,) = network(*inputs, feature_indices=[1])
    out, (second, last) = network(*inputs, {1: residual}, feature_indices=[1, 2])
    assert first.shape == (2, 3, 2, 3, 48)
    assert torch.equal(first, second)
    assert last.shape == first.shape and not torch.equal(out, plain)
    compare(out, network(*inputs, {1: residual}), "with and without features")
    assert torch.equal(plain, network(*inputs))


def test_bfloat16_network_follows_float32() -> None:
    network = tiny_dit()
    x, noise_level, condition = tiny_inputs()
    expected = network(x, noise_level, condition)
    network.to(torch.bfloat16)
    condition = replace(condition, context=condition.context.bfloat16())
    out = network(x.bfloat16(), noise_level, condition)
    assert out.dtype == torch.bfloat16
    compare(out, expected, "bfloat16", tolerance=0.05)


def test_images_of_a_frame_conditioned_network_need_no_mask() -> None:
    network = tiny_dit(in_channels=6, concat_frame_mask=True, add_augment_sigma_embedding=True)
    x, noise_level, condition = tiny_inputs(frames=1)
    image = replace(condition, data_type=DataType.IMAGE, fps=None)
    as_video = replace(
        condition,
        frame_mask=torch.zeros(2, 1, 1, 4, 6),
        pose=torch.zeros(2, 1, 2, 4, 6),  # longer than the clip: cut to its frames
        augment_sigma=torch.zeros(2),
    )
    assert torch.equal(network(x, noise_level, image), network(x, noise_level, as_video))


def test_attention_over_a_single_token_and_a_single_word() -> None:
    network = tiny_dit()
    x, noise_level, condition = tiny_inputs(frames=1, rows=2, columns=2)
    condition = replace(condition, context=condition.context[:, :1])
    assert network(x, noise_level, condition).isfinite().all()


def test_extra_time_embeddings_stand_side_by_side_in_the_order_of_the_configuration() -> None:
    channels = {"w": 6, "fps": 4}
    network = tiny_dit(additional_timestamp_channels=channels, use_adaln_lora=False)
    _, _, condition = tiny_inputs()
    condition = replace(condition, image_size=torch.tensor([[1.0, 2.0, 3.0, 4.0], [5, 6, 7, 8]]))
    added = network._additional_embedding(condition, torch.zeros(2, 48))
    embedders = network.additional_timestamp_embedder
    assert torch.equal(added[:, :6], embedders["w"](torch.tensor([2.0, 6.0]))[0])
    assert torch.equal(added[:, 6:10], embedders["fps"](torch.tensor([30.0, 30.0]))[0])
    assert not added[:, 10:].any()


def without(name: str) -> Any:
    return lambda condition: replace(condition, **{name: None})


@pytest.mark.parametrize(
    ("network", "shape", "change", "message"),
    [
        ({}, (2, 4, 3, 5, 6), None, "H = 5 is not a multiple of the patch size 2.*patch_spatial"),
        ({}, (2, 4, 3, 4, 7), None, "W = 7 .*patch_spatial"),
        ({"patch_temporal": 2}, (2, 4, 3, 4, 6), None, "T = 3 .*patch_temporal"),
        ({}, (2, 4, 3, 18, 6), None, "h = 9.*max_img_h"),
        ({}, (2, 5, 3, 4, 6), None, "5 channels.*in_channels=4"),
        ({}, (2, 4, 3, 4, 6), without("padding_mask"), "padding mask.*concat_padding_mask=False"),
        ({}, (2, 4, 3, 4, 6), without("fps"), "needs its frame rate"),
        ({"in_channels": 5, "concat_frame_mask": True}, (2, 4, 3, 4, 6), None, "no frame_mask"),
        (
            {"add_augment_sigma_embedding": True},
            (2, 4, 3, 4, 6),
            None,
            "condition_on_augment_sigma=True",
        ),
        (
            {"additional_timestamp_channels": {"h": 4}},
            (2, 4, 3, 4, 6),
            None,
            "additional_timestamp_channels.h needs image_size",
        ),
        (
            {"crossattn_emb_channels": 13},
            (2, 4, 3, 4, 6),
            None,
            r"shape \(2, 5, 12\), expected \[2, tokens, 13\].*crossattn_emb_channels",
        ),
    ],
    ids=lambda value: "changed" if callable(value) else str(value),
)
def test_inputs_that_do_not_fit_are_refused(
    network: dict[str, Any], shape: tuple[int, ...], change: Any, message: str
) -> None:
    _, noise_level, condition = tiny_inputs()
    with pytest.raises(ValueError, match=message):
        tiny_dit(**network)(
            torch.randn(shape), noise_level, change(condition) if change else condition
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_config": "FA-XX"}, "'XX'.*fa, full_attn, ca"),
        ({"num_heads": 5}, "model_channels=48 is not a multiple of num_heads=5"),
        ({"pos_emb_cls": "rope4d"}, "pos_emb_cls='rope4d'.*rope3d"),
        ({"pos_emb_interpolation": "resize"}, "only 'crop'"),
        ({"extra_per_block_abs_pos_emb_type": "none"}, "choose one of sincos, learnable"),
        ({"activation_checkpoint": "full"}, "choose one of none, selective, block"),
        ({"additional_timestamp_channels": {"width": 4}}, "names width; choose from fps"),
        ({"additional_timestamp_channels": {"h": 40, "w": 40}}, "at most model_channels=48"),
        ({"concat_frame_mask": True}, "in_channels of at least 5"),
    ],
    ids=str,
)
def test_arguments_that_make_no_network_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**{**TINY, **arguments})


@pytest.mark.parametrize("argument", ["control_residuals", "feature_indices"])
def test_blocks_that_do_not_exist_are_refused(argument: str) -> None:
    value = {3: torch.zeros(1)} if argument == "control_residuals" else [3]
    with pytest.raises(ValueError, match=rf"{argument} names blocks \[3\]; there are 3"):
        tiny_dit()(*tiny_inputs(), **{argument: value})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_compiles_as_one_graph(mode: str) -> None:
    """No value of a tensor decides what is computed."""
    network = tiny_dit(activation_checkpoint=mode)
    inputs = tiny_inputs()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    out = compiled(*inputs)
    compare(out, network(*inputs), "output")
    out.sum().backward()
    assert network.x_embedder.proj[1].weight.grad is not None
