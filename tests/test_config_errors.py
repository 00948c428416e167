"""Mistakes in a configuration: one message with the key, what was given and the nearest names."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import train
from transfer1.config import Config, ConfigError, compose, compose_config
from transfer1.config import LazyCall as L
from transfer1.config.removed import REMOVED_ARGUMENTS, REMOVED_KEYS
from transfer1.config.validate import validate

CONFIG = Path(__file__).parents[1] / "configs" / "config_train.py"
TINY = ("net=tiny_fa", "net_ctrl=tiny_fa", "callbacks=basic")


class Mode(enum.Enum):
    """Two ways."""

    FAST = 1
    SLOW = 2


def target(
    width: int,
    lr: float = 1e-3,
    name: str = "a",
    flag: bool = False,
    mode: Mode = Mode.FAST,
    kind: Literal["x", "y"] = "x",
    betas: tuple[float, float] = (0.9, 0.99),
    steps: Sequence[int] = (1,),
    weights: Mapping[str, float] | None = None,
    size: str | list[int] = "720",
    folder: Path | None = None,
    model: ConfigStore | None = None,
    anything=None,  # type: ignore[no-untyped-def]
    path: NotImported = None,  # type: ignore[name-defined]  # noqa: F821
) -> None:
    """A target with many annotations."""


def check(**arguments: Any) -> Any:
    """The node of `target` after validation."""
    node = OmegaConf.create({"part": L(target)(**arguments)})
    validate(node)
    return node.part


@pytest.fixture
def experiments() -> Iterator[Callable[[dict[str, Any]], str]]:
    """Registers experiments for one test."""
    compose(CONFIG)
    group = ConfigStore.instance().repo["experiment"]
    added = []

    def store(node: dict[str, Any]) -> str:
        name = f"temporary_{len(added)}"
        added.append(f"{name}.yaml")
        ConfigStore.instance().store(group="experiment", package="_global_", name=name, node=node)
        return f"experiment={name}"

    yield store
    for name in added:
        group.pop(name)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainer.max_itr=3", ["trainer.max_itr=3", "did you mean max_iter"]),
        ("trainer.max_iter=abc", ["trainer.max_iter=abc", "could not be converted to Integer"]),
        ("trainer.ddp.static_graph=maybe", ["trainer.ddp.static_graph=maybe", "not a valid bool"]),
        ("trainer=3", ["trainer=3", "TrainerConfig"]),
        ("model.latent_shape=[a]", ["model.latent_shape=[a]", "Integer"]),
        ("model.sigma_dat=1", ["did you mean sigma_data"]),
        ("nett=tiny_fa", ["no key or group 'nett'", "did you mean net"]),
        ("net=tiny_fb", ["net=tiny_fb", "did you mean tiny_fa", "faditv2_7b"]),
        ("experiment=no_such", ["experiment=no_such", "options: CTRL_7Bv1pt3_lvg"]),
        ("kernels=cuda", ["kernels=cuda", "auto, compile, reference, triton"]),
        (
            "kernels.attention=cuda",
            ["kernels.attention=cuda", "[auto, triton, compile, reference]"],
        ),
        ("kernels.atention=compile", ["kernels has no key 'atention'", "did you mean attention"]),
        ("optimizer.lr=abc", ["optimizer.lr=abc", "expected float", "'abc'"]),
        ("optimizer.learning_rate=1", ["no argument 'learning_rate'"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]", "2 values"]),
        ("model.net.num_blocks=four", ["model.net.num_blocks=four", "expected int"]),
        ("model.net.num_blcks=4", ["model.net.num_blcks=4", "did you mean num_blocks"]),
        ("+model.net.num_blcks=4", ["model.net.num_blcks=4", "did you mean num_blocks"]),
        ("model.net._target_=transfer1.model.dit.DIT", ["model.net", "did you mean DiT"]),
        ("model.net._target_=transfer2.DiT", ["model.net", "no module 'transfer2'"]),
        ("model.tokenizer=abc", ["model.tokenizer=abc", "_target_"]),
        ("model.conditioner.video_cond_bool.drop_rate=1", ["did you mean dropout_rate"]),
        ("model.conditioner.text.dropout_rate=x", ["text.dropout_rate=x", "Float"]),
        ("scheduler.warm_up_steps=5", ["scheduler.warm_up_steps=5", "expected Sequence[int]"]),
        ("model.loss_masking={a:1}", ["model.loss_masking", "+model.loss_masking.a="]),
        ("trainer.callbacks.grad_clip.clip_norm=x", ["grad_clip.clip_norm=x", "expected float"]),
        ("trainer.callbacks.grad_clp.clip_norm=1", ["did you mean grad_clip"]),
        ("dataloader_train.batch_size=2", ["dataloader_train.batch_size=2", "is empty"]),
        ("trainer.max_iter=[1", ["trainer.max_iter=[1", "key=value"]),
        ("trainer.max_iter", ["trainer.max_iter", "key=value"]),
        ("~trainer.foo", ["~trainer.foo", "does not exist"]),
        ("job.name='${nothing}'", ["job.name", "nothing"]),
    ],
)
def test_override_errors(
    override: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one message, no traceback."""
    arguments = [f"--config={CONFIG}", "--dryrun", "--", *TINY, override]
    assert train.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("node", "parts"),
    [
        ({"trainer": {"max_itr": 3}}, ["trainer.max_itr", "did you mean max_iter"]),
        ({"trainer": {"max_iter": "abc"}}, ["trainer.max_iter", "abc"]),
        ({"modle": {"sigma_data": 1}}, ["modle", "did you mean model"]),
        (
            {"model": {"net_ctrl": {"num_blcks": 3}}},
            ["model.net_ctrl.num_blcks=3", "did you mean num_blocks"],
        ),
        ({"model": {"net_ctrl": {"num_blocks": "four"}}}, ["model.net_ctrl.num_blocks=four"]),
        ({"optimizer": {"lr": [1]}}, ["optimizer.lr=[1]", "expected float"]),
        (
            {"defaults": [{"override /net": "big"}]},
            ["net=big", "options: faditv2_2b, faditv2_400m, faditv2_7b, tiny_fa"],
        ),
        ({"defaults": [{"override /nett": "big"}]}, ["override /nett", "did you mean net"]),
    ],
)
def test_experiment_errors(
    experiments: Callable[[dict[str, Any]], str], node: dict[str, Any], parts: list[str]
) -> None:
    """Typos and wrong types inside experiments are refused as well."""
    override = experiments(node)
    with pytest.raises(ConfigError) as error:
        compose(CONFIG, ["net_ctrl=tiny_fa", override])
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_experiment_overrides_groups(experiments: Callable[[dict[str, Any]], str]) -> None:
    """`override /group` chooses; the experiment's values win over it, the user over both."""
    override = experiments(
        {
            "defaults": [{"override /net": "faditv2_7b"}, "_self_"],
            "model": {"net": {"num_blocks": 3}},
            "trainer": {"max_iter": 5},
        }
    )
    net = compose(CONFIG, [override]).model.net
    assert (net.model_channels, net.num_blocks) == (4096, 3)
    config = compose(CONFIG, [override, "net=tiny_fa", "trainer.max_iter=6"])
    assert (config.model.net.model_channels, config.trainer.max_iter) == (256, 6)


@pytest.mark.parametrize("value", ["model.hint_key.grayscale=true", "model.hint_key={hint_key: a}"])
def test_keys_inside_null(value: str) -> None:
    with pytest.raises(ConfigError, match="sets a key inside null; choose an option of its group"):
        compose(CONFIG, ["~hint_key", value])


def test_conversions() -> None:
    """Values become what the annotation says, as OmegaConf does for typed fields."""
    node = check(
        width="3",
        lr=1,
        name=720,
        flag="yes",
        mode="SLOW",
        kind="y",
        betas=["0.5", 1],
        weights={"a": 1},
        size=[1, 2],
        folder="x",
        anything={"free": [1]},
        path="not checked",
    )
    assert (node.width, node.lr, node.name, node.flag) == (3, 1.0, "720", True)
    assert isinstance(node.lr, float) and isinstance(node.weights.a, float)
    assert (node.mode, node.kind, list(node.betas)) == (Mode.SLOW, "y", [0.5, 1.0])
    assert (list(node.size), node.folder, node.anything) == ([1, 2], "x", {"free": [1]})


def test_filled_in_defaults() -> None:
    """Defaults that a config can hold are written; objects that only run time has stay absent."""
    node = check(width=1)
    assert node.steps == [1] and node.weights is None and node.betas == [0.9, 0.99]
    assert {"model", "anything", "path"}.isdisjoint(node)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "part.width: .*target needs this argument"),
        ({"width": None}, "part.width=None: null is not allowed, expected int"),
        ({"width": True}, "part.width=True: expected int, got bool"),
        ({"width": 1.5}, "expected int, got float 1.5"),
        ({"width": [1]}, "expected int, got a list"),
        ({"width": L(target)(width=1)}, "expected int, got a node with _target_"),
        ({"width": 1, "flag": "maybe"}, "expected bool, got str 'maybe'"),
        ({"width": 1, "mode": "MEDIUM"}, "part.mode=MEDIUM: .*FAST.*SLOW"),
        ({"width": 1, "kind": "z"}, "part.kind=z: expected one of x, y"),
        ({"width": 1, "betas": [1, 2, 3]}, "expected 2 values, got 3"),
        ({"width": 1, "steps": "12"}, r"expected Sequence\[int\], got str '12'"),
        ({"width": 1, "steps": [1, "b"]}, "expected int, got str 'b'"),
        (
            {"width": 1, "weights": {"a": "b"}},
            r"part.weights=.*expected Mapping\[str, float\] or null",
        ),
        ({"width": 1, "weights": [1]}, r"expected Mapping\[str, float\] or null"),
        ({"width": 1, "model": "abc"}, "part.model=abc: expected ConfigStore or null"),
        ({"width": 1, "widht": 1}, "part.widht=1: .*no argument 'widht'; did you mean width"),
        ({"width": 1, "parts": [L(target)()]}, "no argument 'parts'"),
        (
            {"width": 1, "anything": [L(target)()]},
            r"part.anything\[0\].width: .*needs this argument",
        ),
    ],
)
def test_argument_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(**arguments)


@pytest.mark.parametrize("name", REMOVED_ARGUMENTS)
def test_removed_arguments(name: str) -> None:
    """Arguments of the original that are gone are refused with their replacement."""
    with pytest.raises(ConfigError) as error:
        check(width=1, **{name: None})
    assert REMOVED_ARGUMENTS[name] in str(error.value)


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_removed_keys(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(CONFIG, [f"{key}=1"])
    assert REMOVED_KEYS[key] in str(error.value) and key in str(error.value)


def test_an_error_inside_a_module_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken module is no mistake of the configuration."""
    (tmp_path / "broken_module.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    root = Config(model=L("broken_module.Net")())
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        compose_config(root)
