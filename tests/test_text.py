"""Text pickles are read by a reader that builds nothing else, and padded as recorded."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_text

from transfer1.data.pickles import load_pickle
from transfer1.data.text import NESTED, read_text_embedding


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


def nested(content: object) -> object:
    for key in reversed(NESTED):
        content = {key: content}
    return content


def test_embeddings_of_driving_data(tmp_path: Path) -> None:
    """The array, or a list of it, lies inside dicts."""
    array = np.random.default_rng(0).standard_normal((5, 1024)).astype(np.float32)
    for content in (nested(array), nested([array])):
        embedding = read_text_embedding(write_text(tmp_path / "clip.pkl", content))
        np.testing.assert_array_equal(embedding.numpy(), array)
    for content, message in (
        (nested([array, array]), r"holds a list of 2; expected a list"),
        (nested(array[0]), r"has shape \[1024\]"),
        (
            {"pickle": {"truth": 1}},
            r"dict without pickle/ground_truth \(there: the keys \['truth'\]",
        ),
    ):
        with pytest.raises(ValueError, match=r"clip\.pkl: .*" + message):
            read_text_embedding(write_text(tmp_path / "clip.pkl", content))
