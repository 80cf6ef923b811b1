"""Tables and arrays as series: dates on a grid, missing cells, and one sentence for everything else."""

from datetime import timedelta

import numpy as np
import pytest

from netsuke.apps.signals.forecast.series import Series, filled, from_array, read
from netsuke.errors import NetsukeError

GOOD = "date,a,b\n2024-01-01 00:00,1,2\n2024-01-01 01:00,,4.5\n2024-01-01 02:00,5,NaN\n2024-01-01 04:00,6,7\n"


def written(tmp_path, text, name="x.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_table_with_dates_gaps_and_empty_cells(tmp_path):
    got = read(written(tmp_path, GOOD))
    assert got.names == ["a", "b"] and got.step == timedelta(hours=1) and got.notes == ["1 rows are absent"]
    wanted = [[1, 2], [np.nan, 4.5], [5, np.nan], [np.nan, np.nan], [6, 7]]
    assert np.array_equal(got.values, wanted, equal_nan=True)
    assert got.date(5) == "2024-01-01 05:00:00"
    assert read(written(tmp_path, GOOD), ["b"]).values.shape == (5, 1)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_marks_no_dates_and_a_byte_order_mark(tmp_path, mark):
    got = read(written(tmp_path, "\ufeff" + f"load{mark}sun\r\n1{mark}2\r\n3{mark}4\r\n"))
    assert got.names == ["load", "sun"] and got.values.tolist() == [[1, 2], [3, 4]] and got.date(2) == "2"


def test_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.int16))
    assert read(tmp_path / "x.npy").values.shape == (6, 1)


HEAD = "date,a\n"
WRONG = {
    "no file": (None, "no such file"),
    "ending": ("x.xlsx", "ending"),
    "empty": ("", "0 lines"),
    "header only": ("a,b\n", "1 lines"),
    "no header": ("1,2\n3,4\n", "header"),
    "ragged": ("a,b\n1,2\n3\n", "line 3 has 1 cells"),
    "words": ("a,b\n1,2\n3,high\n", "line 3, column 'b': 'high'"),
    "infinite": ("a,b\n1,2\n3,inf\n", "no finite number"),
    "decimal comma": ('a;b\n1,5;2\n', "'1,5' is no finite number"),
    "twins": ("a,a\n1,2\n3,4\n", "different names"),
    "dates only": ("date\n2024-01-01\n2024-01-02\n", "dates only"),
    "bad date": (HEAD + "2024-01-01,1\nyesterday,2\n", "line 3: 'yesterday' is no date"),
    "backwards": (HEAD + "2024-01-02,1\n2024-01-01,2\n", "not after"),
    "twice": (HEAD + "2024-01-01,1\n2024-01-01,2\n", "not after"),
    "uneven": (HEAD + "2024-01-01 00:00,1\n2024-01-01 01:00,2\n2024-01-01 02:00,2\n2024-01-01 02:20,3\n", "equal steps"),
    "zones": (HEAD + "2024-01-01T00:00,1\n2024-01-01T01:00+00:00,2\n", "time zone"),
    "a century": (HEAD + "2024-01-01,1\n2024-01-02,2\n2124-01-01,2\n", "equal steps"),
    "latin": (b"a,b\n1,\xff\n", "UTF-8"),
    "npy": (b"\x93NUMPY junk", ".npy"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_files_are_one_sentence(tmp_path, case):
    text, word = WRONG[case]
    path = tmp_path / ("x.npy" if case == "npy" else "x.csv")
    if case == "ending":
        path = written(tmp_path, "a\n1\n", "x.xlsx")
    elif text is not None:
        written(tmp_path, text, path.name)
    with pytest.raises(NetsukeError) as e:
        read(path)
    assert word in str(e.value) and "\n" not in str(e.value)


def test_pickles_are_not_opened(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(NetsukeError, match="sound"):
        read(tmp_path / "x.npy")


def test_unknown_columns_are_named(tmp_path):
    with pytest.raises(NetsukeError, match=r"'c'.*a, b"):
        read(written(tmp_path, GOOD), ["c"])


def test_short_gaps_are_bridged_and_long_ones_take_the_same_phase():
    x = np.tile([0.0, 10, 20, 30, 40, 50, 60, 70], 6)
    x[9] = np.nan  # a quarter of a period is two rows
    x[18:24] = np.nan
    x[:3] = np.nan
    got, count = filled(Series(x[:, None], ["a"]), "fill", 8)
    assert count == 10 and np.array_equal(got[:, 0], np.tile([0.0, 10, 20, 30, 40, 50, 60, 70], 6))
    line, _ = filled(from_array(np.array([1.0, np.nan, np.nan, 4, 6, np.nan])), "fill", None)
    assert line[:, 0].tolist() == [1, 2, 3, 4, 6, 6]


def test_the_policy_error_says_where():
    with pytest.raises(NetsukeError, match="1 values are missing, the first in 'channel 0' at 1"):
        filled(from_array(np.array([1.0, np.nan, 3])), "error", None)
