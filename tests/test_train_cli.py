"""The command line of train.py: exit codes, the dry run, and what starting it imports."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from loguru import logger
from omegaconf import OmegaConf

import train
from transfer1.config import Config

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'config_train.py'}"
EXPERIMENT = "CTRL_7Bv1pt3_lvg_tp_121frames_control_input_edge_block3_posttrain"
SLOW_TO_IMPORT = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "triton",
    "cv2",
    "av",
)


class RecordingTrainer:
    """Stands in for the trainer and keeps the configuration that it was given."""

    configs: list[Config] = []

    def __init__(self, config: Config) -> None:
        self.configs.append(config)

    def run(self) -> int:
        return 7


@pytest.fixture(autouse=True)
def output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Job folders of these tests."""
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    return tmp_path


def test_dryrun_prints_and_saves(output_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"experiment={EXPERIMENT}", "job.name=dry", "optimizer.lr=0.5"]
    assert train.main([CONFIG, "--dryrun", "--", *overrides]) == 0
    printed = capsys.readouterr().out
    saved = output_root / "cosmos_transfer1_posttrain" / "CTRL_7Bv1_lvg" / "dry" / "config.yaml"
    assert saved.read_text() == printed
    config = OmegaConf.create(printed)
    assert config.optimizer.lr == 0.5 and config.job.path_local == str(saved.parent)
    assert config.model.net.model_channels == 4096


def test_training_runs_the_trainer() -> None:
    """The class that trainer.type names gets the configuration; its code is the exit code."""
    overrides = [f"experiment={EXPERIMENT}", f"trainer.type={__name__}.RecordingTrainer"]
    assert train.main([CONFIG, "--", *overrides]) == 7
    assert RecordingTrainer.configs.pop().model.net.num_blocks == 28


def test_wrong_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"experiment={EXPERIMENT}", f"trainer.type={__name__}.RecordingTrainr"]
    assert train.main([CONFIG, "--", *overrides]) == 2
    assert "did you mean RecordingTrainer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [([], "no net and no data_train"), (["net=tiny_fa"], "no data_train")],
)
def test_nothing_chosen(
    overrides: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training without a network or data lists what there is to choose; a dry run is content."""
    assert train.main([CONFIG, "--", *overrides]) == 2
    message = capsys.readouterr().err
    assert missing in message
    for choices in (
        f"experiment= .*{EXPERIMENT}",
        "net= faditv2_2b, faditv2_400m, faditv2_7b, tiny_fa",
        "data_train= .*example_transfer_train_data_control_input_edge",
    ):
        assert re.search(choices, message), message
    assert train.main([CONFIG, "--dryrun", "--", *overrides]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG, f"experiment={EXPERIMENT}"], r"overrides go after --: .* -- experiment=CTRL"),
        ([CONFIG, "--dry-run"], "unknown argument --dry-run"),
        (["--config"], "expected one argument"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("path", "message"),
    [("no_such.py", "no such Python file"), (str(ROOT / "setup.cfg"), "no such Python file")],
)
def test_wrong_config_file(path: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([f"--config={path}"]) == 2
    assert message in capsys.readouterr().err


def test_the_path_of_the_original_is_understood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands written for the original work as they are, and say what was read."""
    monkeypatch.chdir(ROOT)
    path = "cosmos_transfer1/diffusion/config/config_train.py"
    lines: list[str] = []
    handler = logger.add(lines.append, format="{message}")
    try:
        overrides = [f"experiment={EXPERIMENT}", "job.name=original"]
        assert train.main([f"--config={path}", "--dryrun", "--", *overrides]) == 0
    finally:
        logger.remove(handler)
    assert OmegaConf.create(capsys.readouterr().out).job.name == "original"
    assert [line.strip() for line in lines] == [
        f"--config={path} is the original's file; reading configs/config_train.py in its place"
    ]


def test_config_file_without_make_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "empty.py"
    file.write_text("")
    assert train.main([f"--config={file}"]) == 2
    assert "defines no make_config()" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process(output_root: Path) -> None:
    """From a shell: a dry run within 3 s from the second start on, no slow imports, exit codes."""
    seconds = []
    while len(seconds) < 2 or (seconds[-1] >= 3 and len(seconds) < 5):
        before = processor_seconds()
        result = start("--dryrun", "--", f"experiment={EXPERIMENT}", "job.name=process")
        seconds.append(processor_seconds() - before)
        assert result.returncode == 0, result.stderr
    assert seconds[-1] < 3, f"processor seconds of each start: {seconds}"
    result = start("--dryrun", "--", f"experiment={EXPERIMENT}", "job.name=process", trace=True)
    imported = imports(result.stderr)
    assert {"torch", "transfer1.data.sampler"} <= imported  # the targets were looked at
    assert [name for name in SLOW_TO_IMPORT if name in imported] == []

    result = start("--help", trace=True)
    assert result.returncode == 0 and "--dryrun" in result.stdout
    assert "torch" not in imports(result.stderr)

    result = start("--dryrun", "--", "nett=tiny_fa")
    assert result.returncode == 2 and "did you mean net" in result.stderr
    assert "Traceback" not in result.stderr


def processor_seconds() -> float:
    """Processor time of all finished children: unlike the clock, the same on a busy machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def start(*arguments: str, trace: bool = False) -> subprocess.CompletedProcess[str]:
    """Run train.py; with `trace`, every imported module is listed on stderr."""
    command = [sys.executable, *(["-X", "importtime"] if trace else []), "train.py", CONFIG]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment
    )


def imports(trace: str) -> set[str]:
    """Modules named in the output of `python -X importtime`."""
    return {line.rpartition("|")[2].strip() for line in trace.splitlines() if "|" in line}
