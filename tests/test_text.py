"""Text pickles are read by a reader that builds nothing else, and padded as recorded."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_text
from test_controls import recorded

from transfer1.data.pickles import load_pickle
from transfer1.data.text import pad_text, read_text_embedding


def test_golden_padding() -> None:
    for run in recorded("text"):
        embedding = run.other("text").group("input")["emb"]
        padded, mask = pad_text(embedding, run.spec["n"], run.spec["is_mask_all_ones"])
        torch.testing.assert_close(padded, run.group("output")["emb"], rtol=0, atol=0)
        torch.testing.assert_close(mask, run.group("output")["mask"], rtol=0, atol=0)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_embeddings_of_every_protocol(protocol: int, dtype: type, tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((7, 1024)).astype(dtype)
    path = tmp_path / "clip.pickle"
    path.write_bytes(pickle.dumps([array], protocol))
    embedding = read_text_embedding(path)
    assert embedding.dtype == torch.float32
    np.testing.assert_array_equal(embedding.numpy(), array.astype(np.float32))


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ([np.zeros((7, 512), np.float32)], r"shape \[7, 512\]"),
        ([np.zeros((1, 7, 1024), np.float32)], r"shape \[1, 7, 1024\]"),
        ([np.zeros((0, 1024), np.float32)], r"shape \[0, 1024\]"),
        ([np.zeros((7, 1024), np.int64)], "int64"),
        ([np.zeros((7, 1024), np.float32)] * 2, "a list of 2"),
        ([], "a list of 0"),
        ({"emb": np.zeros((7, 1024), np.float32)}, "a dict"),
        (["text"], "str"),
    ],
)
def test_wrong_content_is_named(content: object, seen: str, tmp_path: Path) -> None:
    path = write_text(tmp_path / "clip.pickle", content)
    with pytest.raises(
        ValueError, match=rf"clip\.pickle: .*{seen}.*\[n, 1024\].*embed the text again"
    ):
        read_text_embedding(path)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clip\.pickle: the text embedding is missing"):
        read_text_embedding(tmp_path / "clip.pickle")
    for content in (b"", b"not a pickle", pickle.dumps([np.zeros((7, 1024))])[:-100]):
        (tmp_path / "clip.pickle").write_bytes(content)
        with pytest.raises(ValueError, match=r"clip\.pickle: not a pickle of lists"):
            read_text_embedding(tmp_path / "clip.pickle")


class Runs:
    """Would run a command when it is read by an unrestricted reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickles_cannot_run_code(tmp_path: Path) -> None:
    path = write_text(tmp_path / "clip.pickle", [Runs(tmp_path / "made")])
    with pytest.raises(ValueError, match=r"clip\.pickle: .*it asks for (posix|nt)\.mkdir"):
        load_pickle(path)
    assert not (tmp_path / "made").exists()


def test_plain_containers_are_read(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, "x", None, (True, b"y")], "b": {"c": np.float32(3)}}
    assert load_pickle(write_text(tmp_path / "meta.pickle", content)) == content
