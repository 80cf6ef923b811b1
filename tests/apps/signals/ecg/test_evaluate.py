"""The judge counts what it should; on real data the default method meets its bars and beats the released one."""

import numpy as np
import pytest

from netsuke.apps.signals.ecg import evaluate, reference, synthetic
from netsuke.claims import run_claim
from netsuke.data.catalogue import missing
from netsuke.errors import NetsukeError
from netsuke.systems import featuredb_ecg
from netsuke.systems.featuredb_ecg_cases import Row, hearts, judged, shuffled
from tests.apps.signals.ecg.files import write_annotations, write_wfdb

with_ludb = pytest.mark.skipif(bool(missing((reference.LUDB,))), reason=f"NETSUKE_DATA lacks {reference.LUDB}")


def test_area_under_the_curve_counts_ties_and_silence():
    y = np.array([True, True, False, False])
    assert evaluate.auc(np.array([3.0, 2, 1, 0]), y) == 1 and evaluate.auc(np.array([0.0, 1, 2, 3]), y) == 0
    assert evaluate.auc(np.array([1.0, 1, 1, 1]), y) == 0.5
    assert evaluate.auc(np.array([np.nan, 2, 1, np.nan]), y) == pytest.approx(0.625)  # a refused case ranks lowest
    assert np.isnan(evaluate.auc(np.ones(4), np.ones(4, bool)))


def test_failures_and_false_answers_are_counted_not_dropped():
    want = np.array([100.0, 110, 120, 130, np.nan])
    found = np.array([102.0, 108, np.nan, 134, 150])
    got = evaluate.agreement(found, want)
    assert (got["records"], got["answered"], got["failures"], got["false"]) == (4, 3, 1, 1)
    assert got["mae"] == pytest.approx(8 / 3) and got["bias"] == pytest.approx(4 / 3)
    assert got["mae_with_failures"] == pytest.approx((2 + 2 + 4 + 5) / 4)  # the failure costs |120 - median|
    assert got["mae_interval"][0] <= got["mae"] <= got["mae_interval"][1]


def test_peaks_are_matched_between_the_first_and_the_last_mark():
    wanted = np.array([100, 200, 300])
    assert evaluate.matched(np.array([10, 101, 250, 299, 500]), wanted, 100) == (2, 1, 1)
    assert evaluate.matched(np.zeros(0), wanted, 100) == (0, 3, 0)


def test_a_folder_of_records_is_judged(tmp_path):
    h = synthetic.heart(70, 10, 250)
    head = write_wfdb(tmp_path, "7", np.rint(200 * h.x)[:, None].astype(int), 250, gain="200/mV")
    rows = []
    for r in h.r[1:-1]:
        at = round(250 * r)
        on, off = at + round(-0.0456 * 250), at + round(0.0478 * 250)
        p_on = on - round(h.pr / 4)
        rows += [(p_on, 39), (p_on + 12, 24), (p_on + 24, 40), (on, 39), (at, 1), (off, 40)]
        rows += [(off + 30, 39), (off + 45, 27), (on + round(h.qt / 4), 40)]
    write_annotations(tmp_path / "7.i", rows)
    got = evaluate.judge(evaluate.marked_folder(tmp_path))
    assert got["R peaks"]["sensitivity"] == got["R peaks"]["predictivity"] == 1
    found, marked = got["rows"][0]["found"], got["rows"][0]["marked"]
    assert marked == pytest.approx([h.pr, h.qrs, h.qt], abs=5) and np.abs(found - marked).max() < 25
    head.with_suffix(".i").unlink()
    with pytest.raises(NetsukeError, match="no WFDB record with marks"):
        evaluate.marked_folder(tmp_path)


def test_diagnoses_of_the_first_degree_only():
    assert reference.AV_BLOCK.search("Sinus rhythm | I degree av block")
    for other in ("Iii degree av-block", "Ii degree av block", "sinoatrial block"):
        assert not reference.AV_BLOCK.search(other)


@with_ludb
def test_reference_intervals_are_those_of_the_database():
    rows = np.array([m.intervals() for m in reference.ludb("II")])
    assert np.isfinite(rows[:, 0]).sum() == 176 and np.isfinite(rows[:, 2]).sum() == 199
    assert np.nanmedian(rows[:, :3], axis=0) == pytest.approx([160, 92, 398], abs=2)
    assert sum(m.av_block for m in reference.ludb("I")) == 10


@with_ludb
def test_a_fifth_of_the_people_is_marked_well_and_shuffled_answers_are_not():
    for lead in ("I", "II"):
        ours, theirs, control = judged(lead, "netsuke", True), judged(lead, "released", True), shuffled(lead, True)
        for k, most in (("PR", 11), ("QRS", 10), ("QT", 16)):
            assert ours[k]["mae_with_failures"] < most < control[k]["mae"]
            assert ours[k]["mae_with_failures"] < theirs[k]["mae_with_failures"]
            assert ours[k]["within_plus_minus"] > 0.8
        assert ours["R peaks"]["missed"] == ours["R peaks"]["false"] == 0


def test_a_value_graded_good_and_far_off_is_counted():
    row = Row("x")
    for got in hearts(True):
        assert got.wrong == 0 and got.unexplained == 0, got
    h = synthetic.heart(70, 10)
    from netsuke.apps.signals.ecg.pipeline import analyse
    from netsuke.apps.signals.ecg.record import of_array

    row.add(analyse(of_array(h.x, 500)), {"heart rate": 90.0, "QT": h.qt}, "made")
    assert row.wrong == row.spoiled == 1 and "heart rate 70, true 90" in row.worst[0]


def test_every_claim_can_be_judged_or_says_why_not(monkeypatch):
    assert len({c.text for c in featuredb_ecg.CLAIMS}) == len(featuredb_ecg.CLAIMS)
    for claim in featuredb_ecg.CLAIMS:
        assert bool(claim.measure) != bool(claim.why) and (claim.measure is None or claim.bar)
    monkeypatch.delenv("NETSUKE_DATA", raising=False)
    assert {run_claim(c, True)["verdict"] for c in featuredb_ecg.CLAIMS} == {"cannot be shown"}
