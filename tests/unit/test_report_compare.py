"""fastreason report compare: tables by hand, the files it leaves, what it refuses, and curves over seeds."""

import html
import json
import re
from pathlib import Path

import pytest
import yaml
from evaluation_folders import BASE, HOSTILE, TRAINED, row, write_evaluation

from fastreason.cli import main
from fastreason.errors import ConfigError, DataError
from fastreason.evaluation.rows import EvalSample
from fastreason.evaluation.tables import Grid
from fastreason.metrics import write_summary
from fastreason.report.compare import chosen, report_compare, runs_of, training_section, write_disagreements
from fastreason.report.compare_pictures import PICTURES, bins_picture, pass_at_k_picture, transitions_picture
from fastreason.report.compare_tables import (
    agreement_grid,
    bin_grid,
    capability_grid,
    comparison_grids,
    disagreement_grid,
    entropy_grid,
    habits_grid,
    problem_grid,
    transition_grid,
)
from fastreason.report.comparison import Comparison, read_comparisons
from fastreason.report.page import Page, Section, Table, figure_bytes, render_page
from fastreason.report.training_curves import PANELS, read_run_groups, training_grid, training_picture


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write_evaluation(tmp_path, "base", BASE), write_evaluation(tmp_path, "trained", TRAINED)]


@pytest.fixture
def comparison(folders: list[Path]) -> Comparison:
    (found,) = read_comparisons(folders)
    return found


def test_accuracy_against_capability_by_hand(comparison: Comparison) -> None:
    # base: 0, 1, 2, 4, 0 of 4: accuracy 7/20, 1 - (1 - p)^4 = mean(0, 1 - .75^4, 1 - .5^4, 1, 0) = 0.524; pass@4 = 3/5.
    # trained: 2, 4, 1, 4, 0: 11/20; mean(0.9375, 1, 0.6836, 1, 0) = 0.724; pass@4 = 4/5.
    base, trained = capability_grid(comparison).rows
    assert base[:7] == ["base", "35.0", "-", "52.4", "-", "60.0", "-"] and base[9] == "3"
    assert trained[:7] == ["trained", "55.0", "+20.0", "72.4", "+20.0", "80.0", "+20.0"] and trained[9] == "4"


def test_bins_and_transitions_by_hand(comparison: Comparison) -> None:
    assert [cells[:3] + cells[4:] for cells in bin_grid(comparison).rows] == [
        ["0", "2", "0.0", "+25.0 ± 25.0"],
        ["1", "1", "25.0", "+75.0"],
        ["2", "1", "50.0", "-25.0"],
        ["3", "0", "-", "-"],
        ["4", "1", "100.0", "0.0"],
    ]
    grid = transition_grid(comparison, comparison.others[0])
    assert grid.rows[0] == ["0", "50% (1)", "", "50% (1)", "", "", "2"] and grid.rows[3] == ["3", *[""] * 5, "0"]


def test_habits_entropy_and_graders_by_hand(comparison: Comparison) -> None:
    # Right of base: p2/0, p3/0, p3/1, p4/0..3: lengths 10, 10, 11, 10..13 of mean 77/7; one "Wait" each.
    assert habits_grid(comparison).rows[0] == ["base", "right", "all", "7", "11.0", "1.00", "100.0", "0.0"]
    # p1 (of base bin 0) says 5, nothing, 5, nothing: ln 2; p10 says 5, 6, 5, 6: ln 2.
    assert entropy_grid(comparison).rows[0][:2] == ["base", "0.693"]
    # The strict grader calls the four right responses to p4 wrong.
    assert agreement_grid(comparison).rows[0] == ["base", "3", "13", "4", "0", "20.0", "free text 4"]


def test_the_responses_on_which_the_graders_differ_are_listed(comparison: Comparison, tmp_path: Path) -> None:
    grid = disagreement_grid(comparison)
    assert grid.title == "sums: 8 responses on which the graders differ; also in sums/disagreements.jsonl"
    assert grid.rows == [
        [model, "p4", str(sample), "7", "7", "right", "wrong", "free text"]
        for model in ("base", "trained")
        for sample in range(4)
    ]
    write_disagreements(comparison, tmp_path / "sums")
    lines = [json.loads(line) for line in (tmp_path / "sums" / "disagreements.jsonl").read_bytes().splitlines()]
    assert len(lines) == 8 and lines[-1] == {
        **{"model": "trained", "problem": "p4", "sample": 3, "gold": "7", "answer": "7", "math_verify": True},
        **{"strict": False, "reason": "free text", "response": "Wait, so it is 7"},
    }


def test_of_many_disagreements_the_page_has_some_of_each_reason_and_says_how_many_more(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The strict grader calls all 20 right, 13 of them alone; responses 1 and 3 to p1 answer nothing.
    text = r"\boxed{5} " + HOSTILE
    write_evaluation(tmp_path, "odd", BASE, strict=True, response=text, gold=f"{HOSTILE}%")
    monkeypatch.setattr("fastreason.report.compare_tables.MOST_DISAGREEMENTS", 3)
    page = report_compare([folders[0], tmp_path / "odd"], tmp_path / "report").read_text()
    (found,) = read_comparisons([folders[0], tmp_path / "odd"])
    grid = disagreement_grid(found)
    assert grid.title == "sums: 6 responses on which the graders differ; 11 more in sums/disagreements.jsonl"
    # One that answers nothing shows its end; of each reason there is one before there are two.
    assert [cells[:3] + cells[5:] for cells in grid.rows if cells[0] == "odd"] == [
        ["odd", "p1", "1", "wrong", "right", "no answer found"],
        ["odd", "p1", "0", "wrong", "right", "percent"],
        ["odd", "p10", "0", "wrong", "right", "percent"],
    ]
    assert grid.rows[3][4] == f"… {text}"
    assert html.escape(grid.title) in page and f'<td class="wide">{html.escape(HOSTILE)}%</td>' in page
    assert "<img src=x" not in page and page.count("</script>") == 2
    lines = (tmp_path / "report" / "sums" / "disagreements.jsonl").read_bytes().splitlines()
    assert len(lines) == 17 and {json.loads(line)["model"] for line in lines} == {"base", "odd"}


def test_problems_are_sorted_by_change(comparison: Comparison) -> None:
    assert [cells[0] for cells in problem_grid(comparison).rows] == ["p2", "p1", "p4", "p10", "p3"]
    assert problem_grid(comparison).rows[0] == ["p2", "1", "4", "+75.0", "7"]
    assert [cells[0] for cells in problem_grid(comparison, most=1).rows] == ["p2", "p3"]


def test_pictures_show_the_figures(comparison: Comparison) -> None:
    lines = {line.get_label(): line for line in pass_at_k_picture(comparison).axes[0].lines}
    middle = comparison.others[0].scores.pass_at_k[2]
    assert list(lines["trained"].get_ydata()) == pytest.approx([0.55, middle, 0.8])
    figure = bins_picture(comparison)
    assert figure is not None
    assert [bar.get_height() for bar in figure.axes[0].patches] == [25.0, 75.0, -25.0, 0.0, 0.0]
    heat = transitions_picture(comparison)
    assert heat is not None and {text.get_text() for text in heat.axes[0].texts} == {"50%\n1", "100%\n1"}
    for name, draw in PICTURES.items():
        drawn = draw(comparison)
        assert drawn is not None, name
    again = pass_at_k_picture(comparison), pass_at_k_picture(comparison)
    assert figure_bytes(again[0], "svg") == figure_bytes(again[1], "svg"), "equal figures are equal bytes"


def test_the_command_leaves_page_tables_and_pictures(folders: list[Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "report"
    assert main(["report", "compare", *map(str, folders), "--out", str(out), "--format", "latex"]) == 0
    printed = capsys.readouterr()
    assert r"\begin{tabular}" in printed.out and r"\toprule" in printed.out and f"page: {out}" in printed.err
    assert "| trained | 55.0 | +20.0 |" in (out / "tables.md").read_text()
    assert r"trained & 55.0 & +20.0 &" in (out / "tables.tex").read_text()
    pictures = {f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")}
    assert {path.name for path in (out / "sums").iterdir()} == {*pictures, "disagreements.jsonl"}
    page = (out / "index.html").read_text()
    assert "<img src=x" not in page and page.count("</script>") == 2, (
        "no text of a model ends a script or makes an element"
    )
    outside = [
        address for address in re.findall(r"(?:src|href)=\"([^\"]+)", page) if not address.startswith(("data:", "#"))
    ]
    assert outside == []
    (sets,) = re.findall(r'id="samples">(.*?)</script>', page, re.DOTALL)
    problem = json.loads(sets)[0]["problems"][0]
    assert HOSTILE in problem["question"] and [len(each) for each in problem["samples"]] == [4, 4]


def test_one_evaluation_alone_can_be_reported(folders: list[Path]) -> None:
    (alone,) = read_comparisons(folders[:1])
    assert [name for name, draw in PICTURES.items() if draw(alone) is None] == ["bins", "transitions"]
    titles = [grid.title for grid in comparison_grids(alone)]
    assert len(titles) == 3 and not any("change" in title for title in titles)


def test_a_folder_of_models_is_compared_in_order_of_names(folders: list[Path], tmp_path: Path) -> None:
    (found,) = read_comparisons([tmp_path])
    assert [evaluation.label for evaluation in found.evaluations] == ["base", "trained"]


def test_only_as_many_responses_as_all_have_are_used(folders: list[Path], tmp_path: Path) -> None:
    more = write_evaluation(tmp_path, "more", {id: 4 for id in BASE}, n=6)
    (found,) = read_comparisons([folders[0], more])
    assert found.n == 4 and found.others[0].scores.pass_at_1 == 1.0 and "first 4 responses" in found.notes[0]
    (found,) = read_comparisons([folders[0], more], n=2)
    assert found.counts(found.base) == [0, 1, 2, 2, 0]
    with pytest.raises(ConfigError, match=r"--n 5: .*base.* has 4 responses"):
        read_comparisons([folders[0], more], n=5)


def test_what_differs_is_said_and_what_cannot_be_compared_refused(folders: list[Path], tmp_path: Path) -> None:
    other = write_evaluation(tmp_path, "r1", TRAINED, template="r1")
    (found,) = read_comparisons([folders[0], other])
    assert found.notes == ["template differs: name base 'raw', r1 'r1'"]
    foreign = write_evaluation(tmp_path, "foreign", TRAINED, checksum="d")
    with pytest.raises(DataError, match="different problems"):
        read_comparisons([folders[0], foreign])
    with pytest.raises(ConfigError, match="no evaluation there"):
        read_comparisons([tmp_path / "nothing"])
    write_evaluation(tmp_path, "base", BASE, key="ffffffffffff")
    with pytest.raises(ConfigError, match=r"several settings\. Name one of"):
        read_comparisons([tmp_path / "base", folders[1]])
    with pytest.raises(DataError, match=r"not every problem"):
        read_comparisons([folders[0], write_evaluation(tmp_path, "short", {"p1": 1, "p2": 0})])


def test_right_and_wrong_responses_are_shown_in_turn() -> None:
    rows = [EvalSample(**row("p2", sample, sample > 1)) for sample in range(4)]
    assert [one.sample for one in chosen(rows, 2)] == [0, 2]
    assert [one.sample for one in chosen(rows, 3)] == [0, 2, 3]
    assert [one.sample for one in chosen(rows, 9)] == [0, 1, 2, 3]


def write_run(folder: Path, seed: int, rewards: list[float], lr: float = 1e-6, **logged: float | None) -> Path:
    folder.mkdir()
    config = {"run": {"name": folder.name, "seed": seed}, "model": {"path": "m"}, "train": {"lr": lr}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    figures = {"loss/entropy": 1.0} | logged
    rows = [{"step": step, "reward/mean": reward, **figures} for step, reward in enumerate(rewards, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


RUNS = (("grpo", [0.1, 0.5], 1e-6), ("raft", [0.1, 0.6], 1e-5))


def test_runs_that_differ_in_their_seed_are_one_curve_with_its_spread(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"grpo-{seed}", seed, [0.1 * seed, 0.5, 0.7][: 2 + seed]) for seed in (0, 1)]
    runs.append(write_run(tmp_path / "raft", 0, [0.0, 0.2], lr=1e-5))
    grpo, raft = read_run_groups([*runs, runs[0]])
    assert (grpo.label, raft.label) == ("grpo-0 and its seeds (2 runs)", "raft")
    assert grpo.series("reward/mean") == [
        (1, pytest.approx(0.05), pytest.approx(0.1 / 2**0.5), 2),
        (2, 0.5, 0.0, 2),
        (3, 0.7, 0.0, 1),
    ]
    figure = training_picture([grpo, raft])
    assert figure is not None and [axes.get_ylabel() for axes in figure.axes] == ["mean reward", "token entropy, nats"]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0.05, 0.5, 0.7])
    with pytest.raises(ConfigError, match="no run there"):
        read_run_groups([tmp_path])


def test_the_run_that_made_an_evaluated_model_is_drawn(folders: list[Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "made", 3, [0.1, 0.2])
    made = write_evaluation(tmp_path, "made-model", TRAINED, path=str(run / "model"))
    found = runs_of(read_comparisons([folders[0], made]))
    assert found == [run]
    section = training_section(found, tmp_path / "report")
    assert section is not None and (tmp_path / "report" / "training.svg").is_file()
    grid = section.tables[0].grid
    assert grid.heads[3:] == ["mean reward", "token entropy, nats"], "what no run has is left out"
    assert grid.rows == [["made", "1", "2", "0.2000", "1.0000"]]
    assert training_section([], tmp_path) is None


def test_token_entropy_and_kl_come_from_the_training_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "far", 0, [0.1, 0.2], **{"loss/entropy": 0.75, "kl/reference": 0.03})
    section = training_section([run], tmp_path / "report")
    assert section is not None and section.tables[0].grid.rows == [["far", "1", "2", "0.2000", "0.7500", "0.0300"]]
    drawn = section.pictures[0].content.decode()
    assert "token entropy, nats" in drawn and "KL to the initial model, nats" in drawn


def test_every_figure_that_a_run_has_gets_a_panel(tmp_path: Path) -> None:
    everything = write_run(tmp_path / "all", 0, [0.1, 0.2], **dict.fromkeys(PANELS, 25.0))
    supervised = write_run(tmp_path / "sft", 0, [0.3], lr=1e-5, **{"reward/mean": None, "loss/policy": 2.0})
    groups = read_run_groups([everything, supervised])
    figure = training_picture(groups)
    assert figure is not None and [axes.get_ylabel() for axes in figure.axes] == list(PANELS.values())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "sft"], "sft has no mean reward"
    assert training_grid(groups).rows[1] == ["sft", "1", "1", "-", "-", "-", "1.0000", "-", "-", "-", "2.0000"]
    assert training_grid(groups).rows[0] == ["all", "1", "2", *["25.0"] * 8]


def test_held_out_accuracy_begins_before_the_first_step(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"grpo-{seed}", seed, [0.1, 0.2, 0.3], **{"eval/accuracy": None}) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        evals = {
            name: {"accuracy": value + 0.2 * seed, "standard_error": 0.01}
            for name, value in (("before", 0.0), ("after", 0.6))
        }
        write_summary(run / "summary.json", {"evals": evals})
    (group,) = read_run_groups(runs)
    assert [(step, mean) for step, mean, *_ in group.series("eval/accuracy")] == [
        (0, pytest.approx(0.1)),
        (3, pytest.approx(0.7)),
    ]
    assert "0.7000 ± 0.1414" in training_grid([group]).rows[0]


def test_training_runs_alone_can_be_compared(tmp_path: Path, capsys) -> None:
    runs = [write_run(tmp_path / name, 0, rewards, lr=lr) for name, rewards, lr in RUNS]
    out = tmp_path / "report"
    assert main(["report", "compare", "--out", str(out), "--runs", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    assert "raft" in printed and "0.6000" in printed
    assert {path.name for path in out.iterdir()} == {
        *("index.html", "tables.md", "tables.tex", "training.png", "training.svg")
    }
    assert "| raft | 1 | 2 | 0.6000 |" in (out / "tables.md").read_text()
    page = (out / "index.html").read_text()
    assert "<h1>Training: grpo, raft</h1>" in page and "<td>0.6000</td>" in page and 'id="samples">[]<' in page


def test_nothing_to_compare_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["report", "compare", "--out", str(tmp_path / "report")]) == 2
    assert "nothing to compare. Name folders that fastreason eval wrote" in capsys.readouterr().err
    run = write_run(tmp_path / "grpo", 0, [0.1])
    assert main(["report", "compare", "--runs", str(run), "--n", "4", "--out", str(tmp_path / "report")]) == 2
    assert "--n 4: training runs alone" in capsys.readouterr().err and not (tmp_path / "report").exists()


def test_a_page_escapes_everything() -> None:
    grid = Grid("<b>title</b>", ["<i>head</i>"], [['"<em>cell</em>']])
    page = render_page(
        Page("<u>page</u>", [Section("<s>part</s>", ["<q>note</q>"], [Table(grid)])], [{"x": "</script>"}])
    )
    for tag in ("b", "i", "em", "u", "s", "q"):
        assert f"<{tag}>" not in page and f"&lt;{tag}&gt;" in page, tag
    assert "&quot;&lt;em" in page and page.count("</script>") == 2
