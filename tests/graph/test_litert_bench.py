"""The comparison with LiteRT, without LiteRT: its tables, its way to an intermediate tensor, the C folder that it times."""

import shutil

import numpy as np
import pytest
from benchmarks import litert

from netsuke.graph import Interpreter
from netsuke.graph.read.flatbuffer import Flatbuffer
from netsuke.graph.read.tflite import import_tflite
from tests.graph.tflite_cases import codes
from tests.graph.tflite_writer import small, write


@pytest.fixture
def work(tmp_path):
    tensors, ops = small()
    (tmp_path / "model.tflite").write_bytes(write(tensors, ops, (0,), (ops[-1].outputs[0],)))
    return import_tflite(tmp_path / "model.tflite")


def all_values(work, x):
    """What every tensor of the file holds after our own run."""
    graph, values = work.graph, {work.graph.inputs[0]: x}

    def keep(k, outs):
        values.update(zip(graph.ops[k].outputs, outs))

    Interpreter(graph).run(x, on_op=keep)
    return {t: values[made] for t, made in work.made.items() if made in values}


def test_operators_are_compared_on_the_others_inputs(work):
    x = codes(1, 6, 6, 2)
    kept = {f"{k}.{t}": v for k in range(litert.KEPT) for t, v in all_values(work, x).items()}
    found = litert.operators(work, kept)
    assert found["equal"] == 1 and found["largest"] == 0
    assert set(found["kinds"]) == {op.kind for op in work.graph.ops if op.outputs[0] in set(work.made.values())}
    end = next(t for t, made in work.made.items() if made == work.graph.outputs[0])
    kept[f"0.{end}"] = kept[f"0.{end}"].astype(int) + 3
    worse = litert.operators(work, kept)
    assert worse["largest"] == 3 and worse["within_a_step"] < 1


def test_answers_count_steps_and_largest_elements():
    a = np.array([[1, 5, 3], [9, 0, 0]], np.int8)
    b = np.array([[1, 4, 7], [9, 0, 0]], np.int8)
    found = litert.answers(a, b)
    assert (found["equal"], found["within_a_step"], found["largest"], found["same_answer"]) == (4 / 6, 5 / 6, 4, 0.5)


def test_a_file_ends_at_the_tensor_that_is_asked_for(work, tmp_path, monkeypatch):
    seen = []
    runs = litert.Runs(None, work.path, work, codes(3, 6, 6, 2), [], tmp_path)

    def peer(**asked):
        data = (tmp_path / "cut.tflite").read_bytes()
        seen.append(Flatbuffer(data, "cut", "TFL3").root().tables(2)[0].integers(2))
        return {}

    monkeypatch.setattr(runs, "_ask", peer)
    runs.inside()
    assert seen == [(t,) for t in runs.tensors] and len(seen) > 2


@pytest.mark.skipif(not (shutil.which("make") and shutil.which("cc")), reason="make or cc is not installed")
def test_the_exported_folder_is_timed(work, tmp_path):
    (tmp_path / "x.bin").write_bytes(codes(1, 6, 6, 2).tobytes())
    side = litert.exported(work.graph, tmp_path)
    for runs in (1, 50):
        found = side.ask(runs)
        assert 0 < found["clock"] < 1 and 0 <= found["busy"] < 1
    side.close()
    assert side.process.returncode == 0
