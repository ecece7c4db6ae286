"""The ledger: whole lines whatever dies, cut where a checkpoint says, and an audit that finds what is lost or done twice."""

import pytest

from fastreason.errors import CheckpointError, DataError
from fastreason.ledger import LEDGER_FILE, Ledger, audit_ledger, read_ledger


def issued(ticket, prompt=None, epoch=0):
    return {"event": "issued", "ticket": ticket, "prompt_id": prompt or f"p{ticket}", "epoch": epoch, "version": 0}


def trained(ticket, step=1):
    return {"event": "trained", "ticket": ticket, "step": step}


def test_events_come_back_in_order(tmp_path):
    ledger = Ledger(tmp_path / LEDGER_FILE, 0)
    ledger.write("issued", ticket=0, prompt_id="é\n", epoch=0, version=0)
    ledger.write_all([("trained", {"ticket": 0, "step": 1}), ("resumed", {"step": 1})])
    size = ledger.sync()
    ledger.close()
    rows = read_ledger(tmp_path)
    assert [(row["event"], row.get("ticket"), row.get("step")) for row in rows] == [
        ("issued", 0, None),
        ("trained", 0, 1),
        ("resumed", None, 1),
    ]
    assert rows[0]["prompt_id"] == "é\n" and all(row["time"] > 0 for row in rows)
    assert size == (tmp_path / LEDGER_FILE).stat().st_size
    assert read_ledger(tmp_path / "nowhere.jsonl") == []


def test_a_resumed_ledger_is_cut_to_its_checkpoint(tmp_path):
    ledger = Ledger(tmp_path / LEDGER_FILE, 0)
    ledger.write("issued", ticket=0)
    size = ledger.sync()
    ledger.write("trained", ticket=0)
    ledger.close()
    Ledger(tmp_path / LEDGER_FILE, size).write("resumed", step=0)
    assert [row["event"] for row in read_ledger(tmp_path)] == ["issued", "resumed"]
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, the checkpoint was written at 9999"):
        Ledger(tmp_path / LEDGER_FILE, 9999)


def test_a_torn_last_line_is_cut_and_any_other_is_an_error(tmp_path):
    path = tmp_path / LEDGER_FILE
    path.write_bytes(b'{"event": "issued", "ticket": 0}\n{"event": "tra')
    assert len(read_ledger(path)) == 1
    Ledger(path).write("trained", ticket=0)
    assert [row["event"] for row in read_ledger(path)] == ["issued", "trained"]
    path.write_bytes(b'{"event": "issued"}\nnothing\n{"event": "trained"}\n')
    with pytest.raises(DataError, match="line 2 is not an event"):
        read_ledger(path)


def test_an_audit_of_a_clean_run():
    rows = [issued(0), issued(1), issued(2), trained(0), {"event": "dropped", "ticket": 1}, trained(2)]
    audit = audit_ledger(rows)
    assert (audit.num_issued, audit.num_trained, audit.num_dropped) == (3, 2, 1)
    assert (audit.pending, audit.lost, audit.twice) == ([], [], [])


@pytest.mark.parametrize(
    ("rows", "lost", "twice"),
    [
        ([issued(0), issued(1), trained(0)], [1], []),
        ([issued(0), issued(2), trained(0), trained(2)], [1], []),
        ([issued(0), trained(0), trained(0, 2)], [], [(0, "p0")]),
        # Under two tickets in one epoch; in two epochs it may be.
        ([issued(0, "a"), issued(1, "a"), trained(0), trained(1)], [], [(0, "a")]),
        ([issued(0, "a"), issued(1, "a", epoch=1), trained(0), trained(1)], [], []),
        ([issued(0), trained(0), trained(5)], [], [(-1, "ticket 5, never issued")]),
        # Written twice by a producer that died in between: one prompt all the same.
        ([issued(0), issued(0), {"event": "reissued", "ticket": 0}, trained(0)], [], []),
    ],
)
def test_an_audit_finds_what_is_wrong(rows, lost, twice):
    audit = audit_ledger(rows)
    assert (audit.lost, audit.twice) == (lost, twice)


def test_what_is_pending_is_lost_only_at_the_end():
    rows = [issued(0), issued(1), trained(0)]
    assert audit_ledger(rows, finished=False).lost == [] and audit_ledger(rows, finished=False).pending == [1]
