"""The report of a run: its figures by hand, what its panels draw, and what it says of a folder that is not ready."""

import io
import json

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console
from run_folders import row, sample_lines, write_run

from fastreason.errors import ConfigError, DataError
from fastreason.ledger import Ledger
from fastreason.report.panels import (
    PHASES,
    STALENESS,
    bars_of,
    draw_phases,
    draw_reward,
    draw_staleness,
    step_scale,
    time_scale,
    token_scale,
)
from fastreason.report.run import describe_overlap, describe_run, overlap_efficiency, read_run, report_run
from fastreason.report.run_page import newest_samples
from fastreason.report.timeline import choose_window, draw_timeline, read_piece
from fastreason.trace import Trace

pytestmark = pytest.mark.timeout(400)


def trace_run(folder, num_steps=7, step_s=10.0, gap=None):
    """A step: two groups for 8 s, graded for 1 s, waited for, trained for 6 s from the second on, published for 1 s + 1 s."""
    start = 1_700_000_000.0
    trainer, producer = Trace(folder, "trainer"), Trace(folder, "producer")
    for step in range(num_steps):
        at = start + step * step_s + (1000.0 if gap is not None and step >= gap else 0.0)
        for group in range(2):
            producer.complete("engine", f"t{2 * step + group}", at + group, at + 8)
            producer.complete("graders", f"t{2 * step + group}", at + 8, at + 9)
        producer.complete("producer", "issue", at, at + 0.5)
        producer.complete("producer", "wait for groups", at, at + 9)
        trainer.complete("trainer", "train", at + 2, at + 8, step=step + 1)
        trainer.complete("publication", "gather and write", at + 8, at + 9, version=step + 1)
        trainer.complete("publication", "load", at + 9, at + 10, version=step + 1)
    trainer.close()
    producer.close()
    return round(start * 1e6)


def bar_heights(axes):
    """Label of each series of bars -> the heights of its bars."""
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}


def colored(path, color):
    """Which pixels have exactly this colour."""
    image = imread(path)[..., :3]
    return np.abs(image - np.array(to_rgb(color), dtype=image.dtype)).max(axis=-1) < 0.01


def said(run_dir, **options):
    text = io.StringIO()
    report_run(run_dir, console=Console(file=text, width=60), **options)
    return {line[:20].strip(): line[20:].strip() for line in text.getvalue().splitlines()}


def test_overlap_efficiency_by_hand():
    # The first step counts nothing; then g = 20, t = 16, T = 20: (20 + 16 - 20) / 16.
    rows = [row(1, total=99.0), row(2, total=11.0), row(3)]
    assert overlap_efficiency(rows) == pytest.approx(1.0)
    # Nothing overlaps: T = g + t + s = 19 a step.
    assert overlap_efficiency([row(1), row(2, total=19.0)]) == pytest.approx(-1.0 / 8.0)
    assert overlap_efficiency([row(1)]) is None
    assert overlap_efficiency([row(1), row(2, generate=0.0)]) is None, "replayed groups were not generated"


def test_an_efficiency_of_next_to_nothing_is_not_told():
    short = [row(1), row(2, generate=0.5, train=8.0, total=20.0)]
    assert describe_overlap(short) == "not told: generate 0.5 s, train 8.0 s of 20.0 s, too little of one to hide"
    assert describe_overlap([row(1), row(2)]).startswith("1.12 = ")


def test_the_table_says_where_the_time_went(tmp_path):
    rows = [row(1, total=20.0), row(2, total=12.0, **{"staleness/share_0": 0.0, "staleness/share_1": 1.0})]
    before, after = {"accuracy": 0.1, "standard_error": 0.02}, {"accuracy": 0.4, "standard_error": 0.03}
    run = write_run(
        tmp_path, rows, steps=2, finished=True, wall_s=50.0, evals={"before": before, "after": after},
        restarts={"engine": 2, "producer": 1},
    )  # fmt: skip
    find = said(run)
    assert find["run"] == f"{run}: 2 of 2 steps (finished)"
    assert find["time"] == "32.0 s in 2 steps, 16.00 s a step, the whole run 50.0 s"
    assert find["the trainer's time"] == "wait 44%, train 50%, publish 6% (generation paused for 2.5%)"
    assert find["at work beside it"] == "generate 62%, grade 3%"
    assert find["overlap efficiency"].startswith("0.75 = ")
    assert find["staleness"] == "mean 0.50, max 1 version(s): 25% are 0 behind, 75% are 1 behind"
    assert find["reward"] == "0.100 at step 1, 0.200 at step 2"
    assert find["held-out accuracy"] == "0.100 (step 0), 0.400 (step 2)"
    assert find["restarts"] == "engine 2, producer 1" and find["dropped groups"] == "0"
    assert find["ledger"] == "none (no ledger.jsonl)" and find["picture"] == str(run / "report.png")
    page = (run / "report.html").read_text()
    assert find["page"] == str(run / "report.html") and ">wait 44%, train 50%" in page
    assert "<td>2</td><td>0.2</td>" in page, "every step is in the table"


def test_the_newest_responses_are_on_the_page(tmp_path):
    run = write_run(tmp_path, [row(1)])
    written = sample_lines(1, 1, 2) + '{"torn'
    (run / "samples.jsonl").write_text(written)
    assert [each["id"] for each in newest_samples(run)["problems"]] == ["2: a", "1: a"]
    assert newest_samples(run)["problems"][1]["counts"] == [2]
    assert [each["id"] for each in newest_samples(run, tail_bytes=len(written) // 2)["problems"]] == ["2: a"]
    report_run(run, console=Console(file=io.StringIO()))
    page = (run / "report.html").read_text()
    assert "<b>" not in page and "\\u003cb\\u003e2" in page and ">2: a</button>" in page


def test_a_run_that_is_still_going_is_reported(tmp_path):
    extra = {"rollout/engine_restarts": 1.0, "rollout/producer_restarts": 0.0, "rollout/dropped": 3.0}
    run = write_run(tmp_path, [{"step": 0, "eval/accuracy": 0.25}, row(1, **extra)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "time/st')
    find = dict(describe_run(read_run(run)))
    assert "1 of 4 steps (still running" in find["run"] and "whole run" not in find["time"]
    assert find["restarts"] == "engine 1, producer 0" and find["dropped groups"] == "3"
    assert "not known" in find["overlap efficiency"] and find["held-out accuracy"] == "0.250 (step 0)"
    assert report_run(run, console=Console(file=io.StringIO())).stat().st_size > 10_000


@pytest.mark.parametrize("finished", [True, False])
def test_the_ledger_is_audited(tmp_path, finished):
    run = write_run(tmp_path, [row(1)], **({"finished": True} if finished else {}))
    ledger = Ledger(run / "ledger.jsonl")
    for ticket in range(5):
        ledger.write("issued", ticket=ticket, prompt_id=f"p{ticket}", epoch=0, version=0)
    for ticket in (0, 1, 1):
        ledger.write("trained", ticket=ticket, step=1)
    ledger.write("dropped", ticket=2, reason="all_right")
    ledger.close()
    find = dict(describe_run(read_run(run)))
    twice = "1 trained twice ((0, 'p1'))"
    if finished:
        assert find["ledger"] == f"5 issued, 2 trained, 1 dropped, 2 lost (3, 4), {twice}"
    else:
        assert find["ledger"] == f"5 issued, 2 trained, 1 dropped, 2 not trained yet, 0 lost, {twice}"
    assert find["dropped groups"] == "1"


def test_a_folder_that_cannot_be_reported_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"no run there \(no config\.yaml\)"):
        report_run(tmp_path)
    run = write_run(tmp_path / "run", [{"step": 0, "eval/accuracy": 0.1}])
    with pytest.raises(DataError, match="no step is done yet"):
        report_run(run)
    write_run(tmp_path / "other", [row(1)])
    for out in (tmp_path / "a.pdf", tmp_path / "none" / "a.png"):
        with pytest.raises(ConfigError, match="--out"):
            report_run(tmp_path / "other", out)
    assert report_run(tmp_path / "other", tmp_path / "a.png", Console(file=io.StringIO())) == tmp_path / "a.png"
    assert (tmp_path / "a.png").is_file() and not (tmp_path / "other" / "report.png").exists()


def test_reward_is_drawn_against_steps_tokens_and_time():
    rows = [row(1, total=120.0), row(3, total=240.0, **{"train/tokens": 1400.0})]
    scales = [step_scale(rows), token_scale(rows), time_scale(rows)]
    assert [scale.label for scale in scales] == ["step", "thousand tokens trained", "minutes of training"]
    assert [scale.at for scale in scales] == [{0: 0, 1: 1, 3: 3}, {0: 0, 1: 0.6, 3: 2.0}, {0: 0, 1: 2.0, 3: 6.0}]
    axes = Figure().subplots()
    draw_reward(axes, scales[2], rows, [(0, 0.1, 0.02), (3, 0.4, 0.03)])
    assert axes.lines[0].get_xydata().tolist() == [[2.0, 0.1], [6.0, 0.3]]
    assert axes.containers[0].lines[0].get_xydata().tolist() == [[0.0, 0.1], [6.0, 0.4]]


def test_a_steps_bars_hold_its_seconds_and_the_pause_is_a_part_of_publishing():
    axes = Figure().subplots()
    draw_phases(axes, bars_of([row(1, total=12.0), row(2, total=9.0)]))
    heights = bar_heights(axes)
    assert list(heights.values()) == [
        pytest.approx(values) for values in ([3, 0], [8, 8], [0.6, 0.6], [0.4, 0.4], [10, 10], [0.5, 0.5])
    ]
    sides = [bars[0].get_x() + bars[0].get_width() / 2 for bars in axes.containers]
    assert len(set(sides[:4])) == 1 and len(set(sides[4:])) == 1 and sides[0] < 1 < sides[4]
    colors = [to_hex(bars[0].get_facecolor()) for bars in axes.containers]
    assert colors == [PHASES[name] for name in ("wait", "train", "publish", "pause", "generate", "grade")]
    assert len(set(colors)) == 6


def test_one_slow_first_step_does_not_flatten_the_others():
    axes = Figure().subplots()
    draw_phases(axes, bars_of([row(1, total=300.0), *(row(step, total=12.0) for step in range(2, 9))]))
    assert 12 < axes.get_ylim()[1] < 20
    assert [text.get_text() for text in axes.texts] == ["300 s"]


def test_many_steps_become_at_most_forty_bars_of_means():
    rows = [row(step, total=10.0 + step % 2) for step in range(1, 204)]
    bars = bars_of(rows)
    assert len(bars) <= 40 and [len(bar.rows) for bar in bars[:-1]] == [6] * (len(bars) - 1)
    assert bars[0].steps == range(1, 7) and bars[-1].steps == range(199, 204)
    assert bars[0].mean("time/step_s") == pytest.approx(10.5)


def test_staleness_is_stacked_by_step_and_named_with_its_share():
    rows = [row(1, **{"staleness/share_0": 1.0, "staleness/share_1": 0.0}), row(2)]
    axes = Figure().subplots()
    draw_staleness(axes, bars_of(rows), rows)
    assert bar_heights(axes) == {"0: 75%": [1.0, 0.5], "1: 25%": [0.0, 0.5]}
    assert [bar.get_y() for bar in axes.containers[1]] == [1.0, 0.5]
    assert [to_hex(bars[0].get_facecolor()) for bars in axes.containers] == list(STALENESS[:2])


def test_the_piece_of_the_timeline_is_three_steps_in_the_middle(tmp_path):
    start = trace_run(tmp_path)
    piece = read_piece(tmp_path)
    # Trainings start at 2, 12, ..., 62: of four pieces the second.
    assert (piece.first - start, piece.last - start) == (12_000_000, 42_000_000)
    names = [span.name for span in piece.spans if span.cat == "engine"]
    assert names == ["t2", "t3", "t4", "t5", "t6", "t7", "t8", "t9"]
    assert all(span.end > piece.first and span.ts < piece.last for span in piece.spans)


def test_a_piece_does_not_span_the_time_before_a_resume(tmp_path):
    start = trace_run(tmp_path, gap=3)
    piece = read_piece(tmp_path)
    assert (piece.first - start) / 1e6 == 1032.0 and (piece.last - piece.first) / 1e6 == 30.0


def test_few_steps_are_drawn_whole_and_nothing_traced_is_nothing(tmp_path):
    assert read_piece(tmp_path) is None
    start = trace_run(tmp_path, num_steps=2)
    piece = read_piece(tmp_path)
    assert (piece.first - start, piece.last - start) == (0, 20_000_000)
    assert choose_window([0, 5, 9], 3) is None


def test_the_timeline_has_a_bar_for_every_span_at_its_time(tmp_path):
    trace_run(tmp_path)
    piece = read_piece(tmp_path)
    axes = Figure().subplots()
    draw_timeline(axes, piece)
    found = {}
    for bars in axes.collections:
        box = bars.get_paths()[0].get_extents()
        found.setdefault(to_hex(bars.get_facecolor()[0]), []).append((round(box.x0, 3), round(box.x1, 3)))
    assert sorted(found[PHASES["train"]]) == [(0, 6), (10, 16), (20, 26)]
    assert sorted(found[PHASES["pause"]]) == [(7, 8), (17, 18), (27, 28)]
    # Steps begin 2 s before their training; what began before the piece is cut off at its start.
    assert sorted(found[PHASES["generate"]])[:4] == [(0, 6), (0, 6), (8, 16), (9, 16)]
    tops = {bars.get_paths()[0].get_extents().y0 for bars in axes.collections}
    assert len(tops) == 7, "two rows of the engine and of the graders, one of producer, trainer and publication"
    lanes = ["engine", "graders", "producer", "trainer", "publication"]
    assert [label.get_text() for label in axes.get_yticklabels()] == lanes
    legend = axes.get_legend_handles_labels()[1]
    assert len(legend) == len(set(legend)) == 7


def test_the_picture_has_a_timeline_only_where_one_was_traced(tmp_path):
    run = write_run(tmp_path, [row(step) for step in range(1, 8)], steps=7, finished=True)
    console = Console(file=io.StringIO())
    without = imread(report_run(run, console=console)).shape[0]
    assert colored(run / "report.png", PHASES["generate"]).any()
    trace_run(run)
    report_run(run, console=console)
    below = colored(run / "report.png", PHASES["generate"])[without:]
    assert below.shape[0] > 200 and below.any(axis=1).sum() > 20


def test_a_picture_of_damaged_metrics_is_an_error_with_the_line(tmp_path):
    run = write_run(tmp_path, [row(1)])
    (run / "metrics.jsonl").write_text("nonsense\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(DataError, match="line 1"):
        report_run(run)


def test_a_run_on_written_responses_has_its_own_picture_and_table(tmp_path, capsys):
    config = {"model": {"path": "a/b"}, "train": {"steps": 3, "prompts_per_step": 2}}
    config |= {"offline": {"objective": "redi", "path": "pairs.jsonl"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    rows = [
        {"step": n, "loss/policy": 1.0 - n, "logp/chosen": -n / 4, "logp/rejected": -n / 2, "pairs/accuracy": n / 3}
        | {"pairs/margin": n / 4, "train/epoch": n / 2, "train/grad_norm": 1.0, "train/tokens": 50, "time/step_s": 2.0}
        for n in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = report_run(tmp_path, console=Console(width=200))
    told = " ".join(capsys.readouterr().out.split())
    for part in (
        "2 of 3 steps, epoch 1.00",
        "4.0 s in 2 steps, 25 tokens a second",
        "rejected -0.5000 at step 1, -1.0000",
    ):
        assert part in told
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000
