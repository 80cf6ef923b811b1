"""The standard library as text: the split is fixed by paths, disjoint, and the same everywhere."""

from netsuke.data import pysource


def test_known_modules_keep_their_split():
    """These answers are part of every figure that was published; a change of rule would change them all."""
    known = {"argparse.py": "test", "functools.py": "test", "json/decoder.py": "test", "tarfile.py": "validation",
             "copy.py": "validation", "os.py": "train", "json/encoder.py": "train"}  # fmt: skip
    assert {name: pysource.split_of(name) for name in known} == known


def test_splits_are_disjoint_and_cover_the_library():
    names = [{n for n, _ in pysource.modules(s)} for s in pysource.SPLITS]
    root = pysource.library_root()
    everything = {p.relative_to(root).as_posix() for p in pysource.python_files(root)}
    assert set.union(*names) == everything
    assert sum(map(len, names)) == len(everything)
    assert len(names[0]) > 8 * len(names[2])


def test_tests_and_tables_are_left_out():
    for split in pysource.SPLITS:
        for name, _ in pysource.modules(split):
            assert not pysource.SKIP.intersection(name.split("/")[:-1])
