"""Sets of 4-grams as sparse matrices, in memory and in a file, compared with Python's sets."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.data.dedup.shingles import ShingleFile, ShingleRows, shingle_matrix, shingles

texts = st.lists(st.one_of(st.text("ab ", max_size=9), st.text(max_size=12)), min_size=1, max_size=12)


@given(texts, st.sampled_from([1 << 24, 0]), st.sampled_from([1 << 21, 1]))
def test_matrix_has_the_shingles_of_each_text(some: list[str], table: int, characters: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunewright.data.dedup.shingles._TABLE", table)
        patch.setattr("tunewright.data.dedup.shingles._CHARACTERS", characters)
        matrix = shingle_matrix(some)
    rows = [set(matrix.indices[a:b].tolist()) for a, b in zip(matrix.indptr, matrix.indptr[1:], strict=False)]
    for i, text in enumerate(some):
        assert len(rows[i]) == len(shingles(text))
        for j, other in enumerate(some):
            assert len(rows[i] & rows[j]) == len(shingles(text) & shingles(other))
    assert matrix.data.tolist() == [1] * matrix.nnz


@given(texts, st.data())
def test_file_has_the_rows_of_the_matrix(some: list[str], data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, len(some) - 1), max_size=9)), dtype=np.int64)
    whole = shingle_matrix(some)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunewright.data.dedup.shingles._ROWS", 3)
        patch.setattr("tunewright.data.dedup.shingles._CHARACTERS", 9)
        with ShingleFile(some) as file:
            rows = file[places]
            assert file.sizes.tolist() == np.diff(whole.indptr).tolist()
    expected = whole[places]
    assert rows.shape == expected.shape
    assert rows.indices.tolist() == expected.indices.tolist()
    assert rows.indptr.tolist() == expected.indptr.tolist()


def test_full_disk_is_one_error(tmp_path: Path) -> None:
    code = (
        # Python would keep compiled modules that the limit cut short.
        "import resource, sys; sys.dont_write_bytecode = True\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from tunewright.data.dedup.shingles import ShingleFile\n"
        "ShingleFile(['abc' * 5000])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True)
    assert f"UserError: {tmp_path}: the file exceeds the size limit of this system" in ran.stderr.decode()


@given(texts, st.data())
def test_some_rows_of_a_file_reach_another_process_as_a_matrix(some: list[str], data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, len(some) - 1), max_size=9)), dtype=np.int64)
    whole = shingle_matrix(some)[places]
    with ShingleFile(some) as file:
        rows = ShingleRows(file, places)
        copy = pickle.loads(pickle.dumps(rows, protocol=5))
        assert rows.shape == copy.shape == whole.shape
        assert (rows[:] != whole).nnz == (copy != whole).nnz == 0
        assert (rows[1:3] != whole[1:3]).nnz == 0
