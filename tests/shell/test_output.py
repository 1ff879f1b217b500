"""Output that can't be written, terminals of another script, and names that such terminals print."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpm_scales.cli.arguments import tidy
from dpm_scales.cli.main import main
from dpm_scales.errors import UserError
from dpm_scales.models.generate import label_cycle
from support.shell import call


class Broken(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.calls = number, 0

    def reconfigure(self, **_: str) -> None:  # as of a stream whose file is a pipe by now
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

    def write(self, text: str) -> int:
        self.calls += 1
        raise OSError(self.number, os.strerror(self.number))


def printed(stream: Any, *lines: str) -> tuple[int, str]:
    """Status and standard error of a command that prints lines on a stream."""
    err = io.StringIO()
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "stdout", stream),
        mock.patch.object(sys, "stderr", err),
        mock.patch.object(sys, "argv", ["train.py"]),
    ):
        try:
            main(lambda: print(*lines, sep="\n"), "train")
        except SystemExit as end:
            return int(end.code or 0), err.getvalue()
        assert sys.stdout is stream and sys.stderr is err
    return 0, err.getvalue()


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (errno.EPIPE, 0, ""),
        (errno.EIO, 0, ""),
        (errno.ENOSPC, 1, "error: standard output could not be written: No space left on device; the rest is done\n"),
    ],
)
def test_work_outlives_its_output(number: int, status: int, words: str) -> None:
    """`| head`, a terminal that was closed, a full disk: the work is done, and what was lost to a disk is told."""
    stream = Broken(number)
    assert printed(stream, "one", "two") == (status, words)
    assert stream.calls == 1  # nothing is tried again


def test_buffers_are_dropped_with_their_stream() -> None:
    """Or Python would fail once more at its end."""
    read, write = os.pipe()
    os.close(read)
    stream = io.TextIOWrapper(os.fdopen(write, "wb"), encoding="utf-8")
    assert printed(stream, "one", "two") == (0, "")
    stream.close()


def test_terminals_without_the_characters_get_escapes() -> None:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding="ascii")
    assert printed(stream, "café 日") == (0, "")
    stream.flush()
    assert data.getvalue() == b"caf\\xe9 \\u65e5\n"


def test_streams_may_be_closed_from_the_beginning() -> None:
    assert printed(None, "one") == (0, "")


def test_the_current_folder_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    status, err = printed(io.StringIO(), "one")
    assert status == 2 and err == "error: the current folder: No such file or directory; change to one that exists\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\n\tb: 2\n", "mine.yaml is not YAML: found character '\\t' that cannot start any token, line 2"),
        (b"a: [1\n", "mine.yaml is not YAML: "),
        ("a: 1\n".encode("utf-16"), "mine.yaml is not UTF-8 text: invalid start byte; save it as UTF-8"),
    ],
)
def test_damaged_configs_of_one_s_own_are_named(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "process").mkdir()
    (tmp_path / "process" / "mine.yaml").write_bytes(content)
    outcome = call("train.py", f"--config-dir={tmp_path}", "process=mine", cwd=tmp_path)
    assert outcome.status == 2 and words in outcome.err and outcome.err.count("\n") == 1, outcome.err


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("labels=3", "labels=3"),
        ("labels=cat,the dog", "labels=[cat,'the dog']"),
        ("labels=日本", "labels='日本'"),
        ("labels=l'été", 'labels="l\'été"'),
        ("labels='2'", "labels='2'"),
        ("labels='2','a,b'", "labels=['2','a,b']"),
        ("labels=[é]", "labels=[é]"),
    ],
)
def test_labels_need_no_second_quotes(argument: str, expected: str) -> None:
    assert tidy([argument]) == [expected] == tidy([expected])
    if "," in argument:
        assert tidy(["-m", argument]) == ["-m", expected.replace("[", "").replace("]", "")]


def cycle(names: tuple[str, ...], label: int | str) -> list[int]:
    model = mock.Mock(recipe=mock.Mock(num_classes=len(names), class_names=names))
    found = label_cycle(model, label)
    assert found is not None
    return found.tolist()


@pytest.mark.parametrize(
    ("names", "label", "expected"),
    [
        (("0", "1", "2"), 1, [1]),
        (("10", "2", "7"), "2", [1]),
        (("10", "2", "7"), 0, [0]),
        (("cafe\u0301", "the"), "caf\u00e9", [0]),
        (("cafe\u0301", "caf\u00e9"), "caf\u00e9", [1]),
    ],
)
def test_labels_are_found_by_name(names: tuple[str, ...], label: int | str, expected: list[int]) -> None:
    """Whichever way a file system writes accents."""
    assert cycle(names, label) == expected


def test_a_number_that_is_another_class_s_name_is_refused() -> None:
    with pytest.raises(UserError, match="label 2 is the name of one class and the number of another, '7'; give names"):
        cycle(("10", "2", "7"), 2)
