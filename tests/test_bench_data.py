"""The benchmark of the loader runs, on a small video and on the one it makes up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clips import moving_square, write_video

from bench import data
from transfer1.data.controls import CONTROLS


def test_every_control_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write_video(tmp_path / "a.mp4", moving_square(3))
    out = tmp_path / "rows.json"
    names = [*CONTROLS, data.EXACT]
    arguments = ["--video", str(video), "--frames", "2", "--samples", "1", "--json", str(out)]
    data.main([*arguments, "--control", *names])
    rows = json.loads(out.read_text())["rows"]
    assert [row["control"] for row in rows] == names
    assert all(row["clips/s"] > 0 for row in rows)
    assert "| clips/s" in capsys.readouterr().out


def test_blurs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write_video(tmp_path / "a.mp4", moving_square(3))
    data.main(["--video", str(video), "--blurs"])
    assert "bilateral x 2 + gaussian" in capsys.readouterr().out
