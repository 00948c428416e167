"""The configuration against the recorded one of the original: groups, experiments, overrides."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Any

import golden_config
import goldens
import pytest
from omegaconf import OmegaConf

from configs.config_train import make_config
from transfer1.config import Config, ConfigError, compose
from transfer1.config.messages import group_options

CONFIG = Path(__file__).parents[1] / "configs" / "config_train.py"
SHARED = ("hint_key", "checkpoint")  # groups whose package holds more than their options


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The json of case `config`, of --golden-dir where that has one."""
    folders = [request.config.getoption("--golden-dir"), goldens.COMMITTED, goldens.COMPLETE]
    files = [folder / "config" / "config.json" for folder in folders if folder]
    return json.loads(next(file for file in files if file.exists()).read_text())


def leaves(config: Config) -> golden_config.Leaves:
    return dict(golden_config.leaves(OmegaConf.to_container(config)))  # type: ignore[arg-type]


def test_golden_root(golden: dict[str, Any]) -> None:
    """Every field of the root before composition; `kernels` and `lora` are new in the defaults."""
    original = golden["base_config_before_override"]
    *groups, experiment = original.pop("defaults")
    original["model"].pop("ema")  # repeated by the default option of group `ema`
    ours: Any = OmegaConf.to_container(OmegaConf.structured(make_config()))
    assert ours.pop("defaults") == [*groups, {"kernels": "auto"}, {"lora": None}, experiment]
    for name in ("path", "path_local"):  # properties of the original's job
        ours["job"].pop(name)
    actual = dict(golden_config.leaves(ours))
    assert golden_config.differences(golden_config.translate(original), actual) == []


def test_golden_group_names(golden: dict[str, Any]) -> None:
    """Every option of every group exists, unless it is listed as built later."""
    compose(CONFIG)
    for group, options in golden["groups"].items():
        registered = group_options(group)
        for name in options:
            later = golden_config.is_later(group, name)
            assert (name in registered) != later, f"{group}={name}: registered or built later?"
            if golden_config.is_refused(group, name):
                with pytest.raises(ConfigError, match="multi-view models .* are not built here"):
                    compose(CONFIG, [f"{group}={name}"])


def test_golden_groups(golden: dict[str, Any]) -> None:
    """Every recorded option composes to the recorded values, in the recorded package."""
    columns = [
        [
            (group, name, option)
            for name, option in options.items()
            if "node" in option
            and not golden_config.is_later(group, name)
            and not golden_config.is_refused(group, name)
        ]
        for group, options in golden["groups"].items()
    ]
    for row in zip_longest(*columns):  # one option of each group at a time
        chosen = [entry for entry in row if entry]
        config = leaves(compose(CONFIG, [f"{group}={name}" for group, name, _ in chosen]))
        for group, name, option in chosen:
            package, node = option["package"], option["node"]
            for part in reversed(package.split(".")):
                node = {part: node}
            expected = golden_config.translate(node)
            whole = group not in SHARED
            actual = {
                key: value
                for key, value in config.items()
                if key in expected or (whole and key.startswith(f"{package}."))
            }
            assert golden_config.differences(expected, actual) == [], f"{group}={name}"


def test_golden_experiments(golden: dict[str, Any]) -> None:
    """Every recorded experiment resolves to the recorded values."""
    compose(CONFIG)
    compared = []
    for name, original in golden["resolved"].items():
        if golden_config.is_refused("experiment", name):
            continue
        original.pop("defaults")
        config = leaves(compose(CONFIG, [f"experiment={name}"]))
        for key in ("job.path", "job.path_local"):
            config.pop(key)
        assert golden_config.differences(golden_config.translate(original), config) == [], name
        compared.append(name)
    assert compared


def test_golden_overrides(golden: dict[str, Any]) -> None:
    """The recorded overrides give the recorded values; options built later are refused by name."""
    example = golden["override_example"]
    names = list(golden["groups"]["experiment"])
    overrides, skipped = [], []
    for override in example["overrides"]:
        key, _, value = override.partition("=")
        if key == "experiment":  # recorded with its common parts left out
            value = next(name for name in names if fnmatch(name, value.replace("...", "*")))
        if golden_config.is_later(key, value):
            with pytest.raises(ConfigError, match=value):
                compose(CONFIG, [f"{key}={value}"])
            skipped.append(key)
        else:
            overrides.append(f"{key}={value}")
    config = compose(CONFIG, overrides)
    for key, value in example["result"].items():
        if key == "checkpoint.type" and "ckpt_klass" in skipped:
            continue
        actual = OmegaConf.select(config, key)  # type: ignore[arg-type]
        if OmegaConf.is_config(actual):
            actual = {name: actual[name] for name in value}
        assert actual == value, key
