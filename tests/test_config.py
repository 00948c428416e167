"""LazyCall, instantiate, groups and packages, the read-only composed configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import hydra.utils
import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, ReadonlyConfigError
from torch.utils.data import DataLoader

from configs.conditioner import FrameEmbedder
from configs.config_train import make_config
from kernels import BACKENDS, OPS
from transfer1.config import (
    PLACEHOLDER,
    Config,
    ConfigError,
    LazyDict,
    compose,
    compose_config,
    instantiate,
)
from transfer1.config import LazyCall as L
from transfer1.config.messages import group_options
from transfer1.diffusion.frame_condition import FrameConditioning

CONFIG = Path(__file__).parents[1] / "configs" / "config_train.py"


@attrs.define(slots=False)
class Stage:
    """A part of a ResNet."""

    width: int
    scale: Fraction = Fraction(1)


@attrs.define(slots=False)
class ResNet:
    """Something to build."""

    depth: int
    stages: list[Stage] = attrs.field(factory=list)
    by_name: dict[str, Any] = attrs.field(factory=dict)
    optimizer: object = None


@attrs.define(slots=False)
class UnetConfig:
    """An option of group `net` for package `model`."""

    channels: int = 64
    num_blocks: int = 4


@attrs.define(slots=False)
class ViTConfig:
    """An option of group `net` for package `model.net`."""

    hidden_dim: int = 512
    depth: int = 6


@pytest.fixture
def store() -> Iterator[ConfigStore]:
    """Hydra's ConfigStore, put back as it was afterwards."""
    compose_config(Config())  # the first composition registers the nodes of Hydra itself
    instance = ConfigStore.instance()
    saved = copy.deepcopy(instance.repo)
    yield instance
    instance.repo = saved


def container(node: Any) -> Any:
    return OmegaConf.to_container(node)


def test_lazy_call_only_describes() -> None:
    node = L(ResNet)(depth=50, stages=[L(Stage)(width=64)])
    assert isinstance(node, LazyDict) and LazyDict is DictConfig
    assert node["_target_"] == f"{__name__}.ResNet" and node.depth == 50
    by_path = L(f"{__name__}.ResNet")(depth=50, stages=[L(f"{__name__}.Stage")(width=64)])
    assert node == by_path


def test_instantiate_equals_hydra(tmp_path: Path) -> None:
    """From a LazyCall and from YAML, nested in lists and dicts, both build the same."""
    node = L(ResNet)(
        depth=50,
        stages=[
            L(Stage)(width=64, scale=L(Fraction)(numerator=1, denominator=2)),
            L(Stage)(width=8),
        ],
        by_name={"last": {"stage": L(Stage)(width=2)}},
    )
    file = tmp_path / "model.yaml"
    file.write_text(f"model: {{_target_: {__name__}.ResNet, depth: 50}}\n")
    yaml = OmegaConf.load(file)
    for description in (node, yaml.model):
        before = copy.deepcopy(description)
        ours = instantiate(description)
        assert isinstance(ours, ResNet)
        assert ours == hydra.utils.instantiate(description)
        assert description == before
    assert instantiate(node).stages[0].scale == Fraction(1, 2)
    assert instantiate(node).by_name["last"]["stage"] == Stage(2)
    assert instantiate(yaml) == {"model": ResNet(50)}
    assert instantiate({"_target_": f"{__name__}.ResNet", "depth": 3}) == ResNet(3)
    partial = {"_target_": "fractions.Fraction", "_partial_": True, "denominator": 3}
    assert instantiate(partial)(2) == hydra.utils.instantiate(partial)(2) == Fraction(2, 3)
    positional = {"_target_": "fractions.Fraction", "_args_": [3, 4]}
    assert instantiate(positional) == hydra.utils.instantiate(positional) == Fraction(3, 4)


def test_runtime_arguments() -> None:
    """They fill PLACEHOLDER and absent fields, and only those; the node is never written."""
    node = L(ResNet)(depth=PLACEHOLDER, by_name={"a": 1})
    OmegaConf.set_readonly(node, True)
    marker = object()
    built = instantiate(node, depth=3, optimizer=marker)
    assert (built.depth, built.optimizer, built.by_name) == (3, marker, {"a": 1})
    built.by_name["a"] = 2
    assert node.by_name.a == 1 and OmegaConf.is_missing(node, "depth")
    with pytest.raises(ConfigError, match="depth of .*ResNet is known only at run time"):
        instantiate(node)
    with pytest.raises(ConfigError, match="by_name is set to .* and was passed again"):
        instantiate(node, depth=3, by_name={})
    with pytest.raises(ConfigError, match="no argument 'dpth'; did you mean depth?"):
        instantiate(L(ResNet)(), dpth=3)
    with pytest.raises(ConfigError, match="no _target_"):
        instantiate({"a": 1}, depth=3)


def test_a_refused_value_names_its_node() -> None:
    """A ValueError of the target becomes a message with the key; other errors pass."""
    node = OmegaConf.create({"part": L(int)()})
    node.part._args_ = ["x"]
    with pytest.raises(ConfigError, match="part: invalid literal for int"):
        instantiate(node.part)
    with pytest.raises(ZeroDivisionError):
        instantiate(L(Fraction)(numerator=1, denominator=0))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("collections.Cuonter", "collections has no 'Cuonter'; did you mean Counter"),
        ("no_such_module.Net", "there is no module 'no_such_module'"),
        ("Net", "not a path like"),
        ("transfer1.config.nothing.Net", "transfer1.config has no 'nothing'"),
    ],
)
def test_wrong_targets(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        instantiate({"_target_": target})


def test_targets_without_a_path() -> None:
    with pytest.raises(ConfigError, match="top level of a module"):
        L(lambda: 0)
    with pytest.raises(ConfigError, match="callable or a dotted path"):
        L(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("node", "package", "expected"),
    [
        (UnetConfig, "model", {"channels": 64, "num_blocks": 4}),
        (ViTConfig, "model.net", {"net": {"hidden_dim": 512, "depth": 6}}),
        (UnetConfig(channels=8), "model", {"channels": 8, "num_blocks": 4}),
        (L(Stage)(width=2), "model.net", {"net": {"_target_": f"{__name__}.Stage", "width": 2}}),
        ({"depth": 2}, "model.a.b", {"a": {"b": {"depth": 2}}}),
    ],
)
def test_group_packages(store: ConfigStore, node: Any, package: str, expected: Any) -> None:
    """The package of an option says where its node lands."""
    store.store(group="net", name="chosen", node=node, package=package)
    root = Config(defaults=["_self_", {"net": None}])
    model = container(compose_config(root, ["net=chosen"]).model)
    assert model == expected
    assert compose_config(root).model is None


@pytest.mark.parametrize(("order", "channels"), [(["net", "_self_"], 8), (["_self_", "net"], 64)])
def test_self_order(store: ConfigStore, order: list[str], channels: int) -> None:
    """A value beside `_self_` wins over the group that stands before it, and loses to one after."""
    store.store(group="net", name="unet", node=UnetConfig, package="model")
    defaults = [{"net": "unet"} if entry == "net" else entry for entry in order]
    root = Config(model={"channels": 8}, defaults=defaults)
    assert container(compose_config(root).model) == {"channels": channels, "num_blocks": 4}
    assert compose_config(root, ["model.channels=3"]).model.channels == 3


def test_two_configs_share_no_list() -> None:
    first, second = make_config(), make_config()
    first.model.latent_shape.append(1)
    first.defaults.append({"more": None})
    first.checkpoint.keys_not_to_resume.append("optim")
    first.model.sde.p_mean = 5.0
    third = make_config()
    for other in (second, third):
        assert other.model.latent_shape == [16, 24, 44, 80]
        assert {"more": None} not in other.defaults
        assert other.checkpoint.keys_not_to_resume == []
        assert other.model.sde.p_mean == 0.0
    for cls in (type(first), type(first.model), type(first.checkpoint)):
        shared = [f.name for f in attrs.fields(cls) if isinstance(f.default, list | dict)]
        assert shared == [], f"{cls.__name__}: use attrs.field(factory=...)"


def test_composed_config_is_read_only() -> None:
    config: Any = compose(CONFIG, ["net=tiny_fa"])
    with pytest.raises(ReadonlyConfigError):
        config.trainer.max_iter = 1
    with pytest.raises(ReadonlyConfigError):
        config.model.net.num_blocks = 1
    with pytest.raises(ReadonlyConfigError):
        config.model.latent_shape.append(1)


def test_overrides() -> None:
    """Hydra's grammar: values, groups, `+`, `++`, `~`, and arguments left at their default."""
    config: Any = compose(
        CONFIG,
        [
            "--",
            "net=tiny_fa",
            "callbacks=basic",
            "net_ctrl=tiny_fa",
            "hint_key=control_input_depth_grayscale",
            "trainer.max_iter=7",
            "model.latent_shape=[16,1,8,8]",
            "model.net.mlp_ratio=2",
            "+model.net.min_fps=3",
            "++model.net.max_fps=50",
            "~trainer.callbacks.low_prec",
            "~net_ctrl",
            "+trainer.callbacks.more={_target_: fractions.Fraction, numerator: 3}",
            "kernels=compile",
            "kernels.attention=reference",
        ],
    )
    assert container(config.model.hint_key) == {
        "hint_key": "control_input_depth",
        "grayscale": True,
    }
    assert config.trainer.max_iter == 7 and config.model.latent_shape == [16, 1, 8, 8]
    net = config.model.net
    assert (net.mlp_ratio, net.min_fps, net.max_fps) == (2.0, 3, 50)
    assert list(config.trainer.callbacks) == ["progress_bar", "grad_clip", "iter_speed", "more"]
    assert config.model.net_ctrl is None
    assert (config.kernels.default, config.kernels.attention) == ("compile", "reference")


def test_job_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["job.project=p", "job.group=g", "job.name=n"]
    monkeypatch.delenv("OUTPUT_ROOT", raising=False)
    job = compose(CONFIG, overrides).job
    assert (job.path, job.path_local) == ("p/g/n", "checkpoints/p/g/n")
    monkeypatch.setenv("OUTPUT_ROOT", "/somewhere")
    assert compose(CONFIG, overrides).job.path_local == "/somewhere/p/g/n"
    assert job.path_local == "checkpoints/p/g/n"


def test_every_default_resolves() -> None:
    """Without an experiment the defaults list composes, and its small parts can be built."""
    config = compose(CONFIG)
    for node in (
        config.model.tokenizer,
        config.model.conditioner,
        config.model.sde,
        config.scheduler,
    ):
        assert instantiate(node) is not None
    assert OmegaConf.is_missing(config.model_obj, "config")
    assert config.model_obj["_target_"] == "transfer1.model.transfer.build_transfer"


def test_default_arguments_are_listed() -> None:
    """All parameters of a target that a config can hold appear in the composed node."""
    node = compose(CONFIG, ["net=tiny_fa"]).model.net
    assert {"mlp_ratio", "rope_h_extrapolation_ratio", "activation_checkpoint"} <= set(node)
    assert "ops" not in node


def test_kernel_keys_are_the_ops() -> None:
    """The group `kernels` has every backend and, in each, one key per op of the table."""
    assert group_options("kernels") == sorted(BACKENDS)
    for backend in BACKENDS:
        node = compose(CONFIG, [f"kernels={backend}"]).kernels
        assert set(node) == {"_target_", "default", "device", *OPS}
    node = compose(CONFIG, ["kernels=reference"]).kernels
    assert set(instantiate(node, device="cpu").table.values()) == {"reference"}


def test_frame_options_are_those_of_the_conditioner() -> None:
    """The typed node of `video_cond_bool` and the class that reads it agree."""
    fields = {field.name for field in attrs.fields(FrameEmbedder)}
    read = {field.name for field in dataclasses.fields(FrameConditioning)}
    assert fields == read | {"obj", "dropout_rate", "input_key"}


def test_a_library_class_as_target(store: ConfigStore) -> None:
    """A class that is not ours keeps its run-time arguments open."""
    store.store(
        group="data_train",
        name="plain",
        package="dataloader_train",
        node=L(DataLoader)(dataset=[1, 2, 3], batch_size=2),
    )
    config = compose(CONFIG, ["data_train=plain"])
    loader = instantiate(config.dataloader_train, collate_fn=list)
    assert list(loader) == [[1, 2], [3]]
    with pytest.raises(ConfigError, match=r"dataloader_train.batch_size=two: expected int"):
        compose(CONFIG, ["data_train=plain", "dataloader_train.batch_size=two"])
