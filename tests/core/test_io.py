"""Files are written whole or not at all, and disk errors are reported in words."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, digest, new_folder, write_json, write_text, writing

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(blacklist_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"]), max_size=5), json_values, max_size=5))
def test_digest_ignores_the_order_of_keys(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert digest(value) == digest(backwards)
    assert canonical_json(value) == canonical_json(backwards)


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(RuntimeError, match="halfway"), new_folder(target) as folder:
        write_json(folder / "a.json", {"a": 1})
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        write_json(folder / "a.json", {"a": 1})
        assert not target.exists()
    assert (target / "a.json").read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [target]


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with new_folder(tmp_path / "target") as folder:
            write_text(folder / "file", text)
    assert (tmp_path / "target" / "file").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EROFS, "x"), "read-only"),
        (PermissionError(errno.EACCES, "x"), "permission denied"),
    ],
)
def test_disk_errors_become_user_errors(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught, writing(tmp_path / "file"):
        raise error
    assert caught.value.where == str(tmp_path / "file")
    assert "existing files are unchanged" in caught.value.what


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "x"), RuntimeError("bug"), UserError("theirs")])
def test_other_errors_are_not_converted(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path / "file"):
        raise error
    assert caught.value is error
