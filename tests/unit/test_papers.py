"""bench/papers: what counts as a finding, on made-up curves; how runs are made, kept and gone on with, by a stand-in."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastreason.config import load_config

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "papers"
MODULES = ("arms", "base", "curves", "findings", "report", "run", "store")

# Takes the arguments of `fastreason train` and writes what such a run leaves. FAKE_PACE: seconds a step. It fails in arms
# named in FAKE_FAILS, and when told to stop it saves a checkpoint, as the real one does. FAKE_LINGERS: it is not done after
# its last step until it is told to stop: "end": everything is written, "eval": its last evaluation is not.
STAND_IN = """
import json, os, signal, sys, time
from dataclasses import asdict
from pathlib import Path
from fastreason.checkpoint import CheckpointStore, TrainerState
from fastreason.config import dump_config, load_config

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
arguments = sys.argv[2:]
done, resumed = 0, arguments[0] == "--resume"
if resumed:
    folder = Path(arguments[1])
    done = CheckpointStore(folder, 1, False).latest()[1].step
else:
    keys = dict(item.split("=", 1) for item in arguments[1:])
    folder = Path(keys["run.dir"]) / keys["run.name"]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(load_config(arguments[0], arguments[1:])))
with open(folder.parent.parent / "calls.jsonl", "a") as file:
    file.write(json.dumps([folder.name, resumed, done, arguments]) + "\\n")
if any(folder.name.startswith(name) for name in os.environ.get("FAKE_FAILS", "").split(",") if name):
    sys.exit("broken on purpose")
for step in range(done + 1, 17):
    time.sleep(float(os.environ.get("FAKE_PACE", "0")))
    if stopped:
        store = CheckpointStore(folder, 1, False)
        store.aside(step - 1)
        store.commit(TrainerState(step=step - 1, version=step - 1, num_groups=0, score=0.0), b"")
        sys.exit(143)
    with open(folder / "metrics.jsonl", "a") as file:
        line = {"step": step, "reward/mean": step / 20, "loss/entropy": 1.0, "kl/reference": 0.01 * step}
        file.write(json.dumps(line) + "\\n")
lingers = os.environ.get("FAKE_LINGERS", "")
for name, right in (("before", 1), ("after", 12))[: 1 if lingers == "eval" else 2]:
    rows = [{"prompt_id": p, "correct": n < right} for p in range(100) for n in range(16)]
    (folder / f"eval-{name}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "summary.json").write_text(json.dumps({"finished": True, "steps": 16, "train_wall_s": 60.0}))
while lingers and not stopped:
    time.sleep(0.05)
sys.exit(143 if stopped else 0)
"""


@pytest.fixture(scope="module")
def papers():
    """The bench's modules by name, found as the command finds them, and not left where others may import them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def line(start, end, steps=16, half=None):
    """A curve of `steps` values that has come half of the way at step `half` (default: in the middle)."""
    half = half or steps / 2
    return tuple(
        start + (end - start) * (0.5 * t / half if t < half else 0.5 + 0.5 * (t - half) / (steps - 1 - half))
        for t in range(steps)
    )


@pytest.fixture
def made(papers):
    def build(reward=(-0.8, 0.2), entropy=(1.0, 0.5), kl=(0.0, 0.1), half=None, before=(), after=()):
        return papers["curves"].Curve(line(*reward, half=half), line(*entropy), line(*kl), before, after)

    return build


def over_seeds(build, wobble=0.01, seeds=3):
    """{seed: curve} of build(small number)."""
    return {seed: build(wobble * (seed - 1)) for seed in range(seeds)}


def showed(papers, letter, **arms):
    found = papers["findings"].answer(letter, arms)
    return found.showed, [claim.verdict for claim in found.claims]


def test_a_claim_is_answered_only_where_the_seeds_agree(papers):
    claim = papers["findings"].Claim
    assert claim("x", (0.30, 0.32, 0.28), 0.05).verdict == "yes"
    assert claim("x", (-0.30, -0.32, -0.28), 0.05).verdict == "no"
    assert claim("x", (0.01, 0.012, 0.008), 0.05).verdict == "no", "surely there, and too small to matter"
    assert claim("x", (0.3, -0.2, 0.2), 0.05).verdict == "unclear"
    assert claim("x", (0.3,), 0.05).verdict == "unclear", "one seed has no spread"
    assert claim("x", (0.3, math.nan), 0.05).verdict == "unclear"
    # By hand: mean 0.2, deviation 0.1, half-width 2.920 x 0.1 / sqrt(3) = 0.169; with deviation 0.12 it is 0.202.
    assert claim("x", (0.1, 0.2, 0.3), 0.0).verdict == "yes"
    assert claim("x", (0.08, 0.2, 0.32), 0.0).verdict == "unclear"


def test_a_raft_pp_must_rise_first_and_lose_entropy_first(papers, made):
    others = {"grpo": over_seeds(lambda e: made(half=8 + e)), "reinforce": over_seeds(lambda e: made(half=8 - e))}
    early = over_seeds(lambda e: made(half=3, entropy=(1.0, 0.2 + e)))
    late = over_seeds(lambda e: made(half=12, entropy=(1.0, 0.2 + e)))
    torn = dict(enumerate(made(half=h, entropy=(1.0, 0.2)) for h in (2, 12, 4)))
    assert showed(papers, "a", raft_pp=early, **others) == ("yes", ["yes", "yes"])
    assert showed(papers, "a", raft_pp=late, **others) == ("no", ["no", "yes"])
    assert showed(papers, "a", raft_pp=torn, **others) == ("unclear", ["unclear", "yes"])
    # Above one of the two only: "fastest" is above all.
    others["reinforce"] = over_seeds(lambda e: made(half=2 + e))
    assert showed(papers, "a", raft_pp=early, **others)[1][0] == "no"


def test_b_less_kl_at_equal_reward_and_no_less_reward(papers, made):
    grpo = over_seeds(lambda e: made(kl=(0.0, 0.2 + e)))
    assert showed(papers, "b", grpo=grpo, reinforce_rej=over_seeds(lambda e: made(kl=(0.0, 0.1 + e))))[0] == "yes"
    same_kl = over_seeds(lambda e: made(kl=(0.0, 0.2 + e)))
    assert showed(papers, "b", grpo=grpo, reinforce_rej=same_kl) == ("no", ["yes", "no"])
    worse = over_seeds(lambda e: made(reward=(-0.8, -0.3 + e), kl=(0.0, 0.05)))
    assert showed(papers, "b", grpo=grpo, reinforce_rej=worse) == ("no", ["no", "yes"])
    torn = dict(enumerate(made(kl=(0.0, kl)) for kl in (0.05, 0.3, 0.15)))
    assert showed(papers, "b", grpo=grpo, reinforce_rej=torn) == ("unclear", ["yes", "unclear"])
    flat = over_seeds(lambda e: made(reward=(-0.8, -0.78 + e)))
    assert showed(papers, "b", grpo=flat, reinforce_rej=flat) == ("unclear", ["yes", "unclear"]), "nothing was learnt"


def test_b_compares_kl_where_both_have_the_same_reward_not_at_the_end(papers, made):
    """Half of the KL at the end, but also half of the way in reward: nothing was saved."""
    grpo, rej = made(reward=(-0.8, 0.2), kl=(0.0, 0.2)), made(reward=(-0.8, -0.3), kl=(0.0, 0.1))
    saved = papers["findings"].kl_saved({"grpo": grpo, "reinforce_rej": rej}, "reinforce_rej", "grpo")
    assert saved == pytest.approx(0.0, abs=0.05)


def test_c_removal_must_bring_more_than_half_of_a_gain_that_is_there(papers, made):
    reinforce = over_seeds(lambda e: made(reward=(-0.8, -0.4)))
    grpo = over_seeds(lambda e: made(reward=(-0.8, 0.2 + e)))
    most = over_seeds(lambda e: made(reward=(-0.8, 0.1 + e)))
    little = over_seeds(lambda e: made(reward=(-0.8, -0.3 + e)))
    torn = dict(enumerate(made(reward=(-0.8, end)) for end in (0.2, -0.4, 0.1)))
    assert showed(papers, "c", grpo=grpo, reinforce=reinforce, drop_all_wrong=most) == ("yes", ["yes", "yes"])
    assert showed(papers, "c", grpo=grpo, reinforce=reinforce, drop_all_wrong=little) == ("no", ["yes", "no"])
    assert showed(papers, "c", grpo=grpo, reinforce=reinforce, drop_all_wrong=torn)[0] == "unclear"
    assert showed(papers, "c", grpo=reinforce, reinforce=reinforce, drop_all_wrong=most)[0] == "no", (
        "no gain to explain"
    )


def test_d_kdrl_must_be_there_before_both(papers, made):
    fast, middle, slow = (over_seeds(lambda e, half=half: made(half=half + e)) for half in (3, 6, 9))
    assert showed(papers, "d", kdrl=fast, rlvr=middle, kd_rkl=slow) == ("yes", ["yes", "yes"])
    assert showed(papers, "d", kdrl=middle, rlvr=slow, kd_rkl=fast) == ("no", ["yes", "no"])
    torn = dict(enumerate(made(half=half) for half in (2, 12, 5)))
    assert showed(papers, "d", kdrl=torn, rlvr=middle, kd_rkl=slow)[0] == "unclear"
    # The level is one that all reach: a student of the teacher alone that ends lower does not make the answer infinite.
    low = over_seeds(lambda e: made(reward=(-0.8, -0.2 + e)))
    claims = papers["findings"].answer("d", {"kdrl": fast, "rlvr": middle, "kd_rkl": low}).claims
    assert all(math.isfinite(claim.mean) for claim in claims)


def test_e_accuracy_against_pass_at_k(papers, made):
    def arm(right_before, right_after, seeds=3):
        """Of 16 responses to each of the held-out prompts, the right ones; one more with each seed."""
        grown = ([min(16, n + seed) for n in right_after] for seed in range(seeds))
        return {
            seed: made(before=tuple((16, n) for n in right_before), after=tuple((16, n) for n in after))
            for seed, after in enumerate(grown)
        }

    # What was found now and then is found always; what never was stays so.
    assert showed(papers, "e", rlvr=arm([4, 4, 4, 0], [13, 13, 13, 0])) == ("yes", ["yes", "yes"])
    # Every prompt is found once more in a while: pass@8 by 0.5 or more, accuracy by 0.06.
    assert showed(papers, "e", rlvr=arm([0, 0, 0, 0], [1, 1, 1, 1])) == ("no", ["yes", "no"])
    torn = dict(enumerate(made(before=((16, 2),) * 4, after=after) for after in [((16, 3),) * 4, ((16, 16),) * 4]))
    assert showed(papers, "e", rlvr=torn)[0] == "unclear"
    assert showed(papers, "e", rlvr=arm([4, 4, 4, 4], [4, 4, 4, 4], seeds=1))[0] == "unclear"


def test_seeds_without_all_arms_are_left_out(papers, made):
    arms = {"reinforce_rej": over_seeds(lambda e: made(), seeds=3), "grpo": {1: made(), 7: made()}}
    found = papers["findings"].answer("b", arms)
    assert found.seeds == (1,)
    assert papers["findings"].answer("c", arms).seeds == ()
    assert papers["findings"].answer("c", arms).showed == "unclear"


def test_pass_at_k_is_the_unbiased_estimate(papers):
    curves = papers["curves"]
    # 1 - C(2, 2) / C(4, 2) = 5/6 with two of four right, 0 with none.
    assert curves.pass_at_k(((4, 2), (4, 0)), 2) == pytest.approx(5 / 12)
    assert curves.pass_at_k(((4, 2), (4, 0)), 1) == pytest.approx(curves.accuracy(((4, 2), (4, 0)))) == 0.25
    with pytest.raises(ValueError, match=r"pass@8.* 4 responses.*samples_per_prompt"):
        curves.pass_at_k(((16, 1), (4, 2)), 8)


def test_a_level_is_reached_between_two_steps(papers):
    curves = papers["curves"]
    assert curves.first_reach([0.0, 0.2, 0.6], 0.3) == pytest.approx(1.25)
    assert curves.value_at([0.0, 1.0, 3.0], 1.25) == pytest.approx(1.5)
    assert curves.first_reach([0.5, 0.2], 0.3) == 0
    assert curves.first_reach([0.0, 0.2], 0.3) == math.inf


def test_every_arm_is_a_config_whose_figures_are_over_all_of_its_responses(papers):
    from fastreason.algorithms import resolve_algorithm

    arms, job = papers["arms"], papers["run"].JOB
    for name, arm in arms.ARMS.items():
        teacher = ["teacher.path=somewhere"] if arm.taught else []
        config = load_config(job, [*arms.arm_overrides(name, []), *teacher])
        algorithm = resolve_algorithm(config)
        assert config.reward.range == "plus_minus_one"
        if arm.taught:
            assert algorithm.compares_with_teacher
        elif name != arms.TEACHER:
            assert algorithm.kl.target == "reference" and 0 < algorithm.kl.coef < 1e-9
            assert not algorithm.zero_advantage_is_zero_gradient, "else rows without a gradient are in no figure"
            assert algorithm.filtered == "zero"
        updates = config.train.prompts_per_step // (config.train.prompts_per_update or config.train.prompts_per_step)
        assert updates == (1 if name in ("rlvr", "kdrl", "kd_rkl", arms.TEACHER) else 4)
        assert config.checkpoint.save_model == (name == arms.TEACHER)


def test_what_is_compared_differs_in_the_algorithm_alone(papers):
    arms, findings, job = papers["arms"], papers["findings"], papers["run"].JOB
    for finding in findings.FINDINGS.values():
        configs = [load_config(job, arms.arm_overrides(name, [])) for name in finding.arms]
        same = {config.model_copy(update={"algorithm": None}).model_dump_json() for config in configs}
        assert len(same) == 1
        assert {config.algorithm.ratio_against for config in configs} == {"trainer"}


def test_runs_come_seed_by_seed_after_the_teacher(papers):
    arms = papers["arms"]
    names = [run.name for run in arms.runs_wanted(["kdrl", "rlvr", "kdrl"], [3, 0])]
    assert names == ["teacher-seed1000", "kdrl-seed3", "rlvr-seed3", "kdrl-seed0", "rlvr-seed0"]
    assert arms.TEACHER_RUN not in arms.runs_wanted(["grpo"], [0])


def test_the_expected_time_is_the_arms_own_else_the_guess_corrected_by_others(papers):
    arms = papers["arms"]
    guess = arms.ARMS["grpo"].guess_s
    assert arms.expected_s("grpo", {}) == (guess, False)
    assert arms.expected_s("grpo", {"grpo": [200.0, 220.0]}) == (220.0, True)
    assert arms.expected_s("grpo", {"raft_pp": [arms.ARMS["raft_pp"].guess_s * 2]}) == (guess * 2, False)


@pytest.fixture
def made_by_stand_in(papers, tmp_path, monkeypatch):
    """main() of run.py with the stand-in as its trainer, and what the stand-in was asked for."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    (tmp_path / "out" / "base" / "run" / "model").mkdir(parents=True)  # made before: every run asks for it

    def call(*arguments, **environment):
        for key, usual in (("FAKE_PACE", "0"), ("FAKE_FAILS", ""), ("FAKE_LINGERS", "")):
            monkeypatch.setenv(key, environment.get(key, usual))
        out = tmp_path / "out"
        steps = (
            [] if any("train.steps" in argument for argument in arguments) else ["train.steps=16"]
        )  # as the stand-in
        return papers["run"].main(["--out", str(out), *arguments, *steps], [sys.executable, str(script)])

    def calls():
        path = tmp_path / "out" / "calls.jsonl"
        return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []

    call.calls, call.out, call.script = calls, tmp_path / "out", script
    return call


def test_the_texts_of_the_base_go_four_ways_and_one_is_right(papers, tmp_path):
    base = papers["base"]
    base.write_texts(tmp_path)
    texts, problems = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("texts", "problems")
    )
    right: dict[str, list[bool]] = {}
    for text in texts:
        a, b = map(int, text["problem"].removesuffix("=").split("+"))
        right.setdefault(text["response"][0], []).append(text["response"][2:] == str(a + b))
        assert text["response"][1] == " " and set(text["problem"] + text["response"]) <= set(base.SYMBOLS)
    shares = {way: len(found) / len(texts) for way, found in right.items()}
    assert shares == pytest.approx(base.SHARES, abs=0.01)
    assert all(right["a"]) and not any(right["k"]) and 0.4 < sum(right["b"]) / len(right["b"]) < 0.7
    assert len({row["problem"] for row in problems}) == base.NUM_PROBLEMS, (
        "one that comes twice could be held out and trained"
    )
    for row in problems:
        a, b = map(int, row["problem"].removesuffix("=").split("+"))
        assert row["answer"] == str(a + b)


def test_a_base_that_is_there_is_not_made_again_and_one_that_fails_ends_all(papers, tmp_path):
    make_base = papers["base"].make_base
    with pytest.raises(SystemExit, match="base ended with 3"):
        make_base(tmp_path, [sys.executable, "-c", "raise SystemExit(3)"])
    model = tmp_path / "base" / "run" / "model"
    model.mkdir(parents=True)
    assert make_base(tmp_path, ["/no/such/program"]) == model


def test_finished_runs_are_kept_and_skipped(made_by_stand_in, capsys):
    assert made_by_stand_in("--findings", "e", "--seeds", "0,1", "--json", str(made_by_stand_in.out / "my.json")) == 0
    assert [call[:3] for call in made_by_stand_in.calls()] == [["rlvr-seed0", False, 0], ["rlvr-seed1", False, 0]]
    lines = [json.loads(text) for text in (made_by_stand_in.out / "finished.jsonl").read_text().splitlines()]
    assert [(each["arm"], each["seed"], each["resumed"]) for each in lines] == [("rlvr", 0, False), ("rlvr", 1, False)]
    (record,) = json.loads((made_by_stand_in.out / "my.json").read_text())
    # Accuracy from 1/16 to 12/16; pass@8 from 8/16 to 1: 0.6875 - 0.5. Without any spread between seeds it is certain.
    assert [claim["mean"] for claim in record["claims"]] == pytest.approx([0.6875, 0.1875])
    assert record["showed"] == "yes" and "| e: RLVR" in capsys.readouterr().out
    assert (made_by_stand_in.out / "curves.png").stat().st_size > 10_000
    made_by_stand_in("--findings", "e", "--seeds", "0,1,2")
    assert [call[0] for call in made_by_stand_in.calls()][2:] == ["rlvr-seed2"]


def test_a_run_gets_its_seed_its_place_and_its_teacher(made_by_stand_in):
    given = ("train.steps=16", "kdrl:algorithm.kl_coef=0.3")
    assert made_by_stand_in("--findings", "d", "--seeds", "4", *given) == 0
    asked = {name: arguments for name, _, _, arguments in made_by_stand_in.calls()}
    assert list(asked) == ["teacher-seed1000", "kdrl-seed4", "rlvr-seed4", "kd_rkl-seed4"]
    teacher = f"teacher.path={made_by_stand_in.out.resolve()}/runs/teacher-seed1000/model"
    assert [teacher in arguments for arguments in asked.values()] == [False, True, False, True]
    assert ["algorithm.kl_coef=0.3" in arguments for arguments in asked.values()] == [False, True, False, False]
    assert ["train.steps=16" in arguments for arguments in asked.values()] == [False, True, True, True]
    assert "run.seed=4" in asked["kdrl-seed4"]


def test_a_budget_starts_nothing_that_does_not_fit(made_by_stand_in, capsys):
    assert made_by_stand_in("--findings", "e", "--seeds", "0", "--budget-min", "1.9") == 0
    assert made_by_stand_in.calls() == []
    assert "2.0 min (a guess" in capsys.readouterr().out
    assert made_by_stand_in("--findings", "e", "--seeds", "0", "--budget-min", "2.1") == 0
    # By now it is known that a run takes a second or two.
    assert made_by_stand_in("--findings", "e", "--seeds", "0,1", "--budget-min", "0.5") == 0
    assert [call[0] for call in made_by_stand_in.calls()] == ["rlvr-seed0", "rlvr-seed1"]
    assert "as measured" in capsys.readouterr().out


def test_a_run_that_outlasts_the_budget_saves_itself_and_is_gone_on_with(made_by_stand_in, papers, rlvr_within_seconds):
    assert made_by_stand_in("--findings", "e", "--seeds", "0", "--budget-min", "0.25", FAKE_PACE="1.5") == 0
    folder = made_by_stand_in.out / "runs" / "rlvr-seed0"
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    assert 0 < done < 16 and not (made_by_stand_in.out / "finished.jsonl").exists()
    assert made_by_stand_in("--findings", "e", "--seeds", "0") == 0
    assert [call[:3] for call in made_by_stand_in.calls()] == [["rlvr-seed0", False, 0], ["rlvr-seed0", True, done]]
    (kept,) = (made_by_stand_in.out / "finished.jsonl").read_text().splitlines()
    assert json.loads(kept)["resumed"]
    assert not (folder / "checkpoints").exists()
    # Its seconds are those of a part: no measure of the arm.
    assert papers["store"].Store(made_by_stand_in.out).seconds() == {}


@pytest.fixture
def rlvr_within_seconds(papers, monkeypatch):
    """The arm's guess is a second, so that it starts within a budget that ends before it does."""
    quick = papers["arms"].Arm("quick", papers["arms"].ARMS["rlvr"].overrides, guess_s=1.0)
    monkeypatch.setitem(papers["arms"].ARMS, "rlvr", quick)


def test_a_run_that_has_trained_to_its_end_is_kept_when_the_budget_ends(made_by_stand_in, rlvr_within_seconds, capsys):
    """Told to stop while its processes end: hours of training are there, and so is the evaluation."""
    given = ("--findings", "e", "--seeds", "0", "--budget-min", "0.25")
    assert made_by_stand_in(*given, FAKE_LINGERS="end") == 0
    (kept,) = (made_by_stand_in.out / "finished.jsonl").read_text().splitlines()
    assert json.loads(kept)["arm"] == "rlvr" and "rlvr-seed0: done" in capsys.readouterr().out
    assert made_by_stand_in("--findings", "e", "--seeds", "0") == 0
    assert len(made_by_stand_in.calls()) == 1


def test_a_run_that_lacks_its_last_evaluation_is_not_kept_and_says_so(made_by_stand_in, rlvr_within_seconds, capsys):
    given = ("--findings", "e", "--seeds", "0", "--budget-min", "0.25")
    assert made_by_stand_in(*given, FAKE_LINGERS="eval") == 0
    assert not (made_by_stand_in.out / "finished.jsonl").exists()
    assert "rlvr-seed0: stopped; the same command starts it again, as it has no" in capsys.readouterr().out
    assert made_by_stand_in("--findings", "e", "--seeds", "0") == 0
    assert [call[1:3] for call in made_by_stand_in.calls()] == [[False, 0], [False, 0]]


def test_a_run_that_goes_on_is_charged_for_the_steps_that_are_left(made_by_stand_in, papers, capsys):
    from fastreason.checkpoint import CheckpointStore, TrainerState
    from fastreason.config import dump_config

    arms, store = papers["arms"], papers["store"].Store(made_by_stand_in.out)
    run = arms.Run("rlvr", 0)
    folder, runner = store.path(run), papers["run"].Runner(store)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        dump_config(load_config(papers["run"].JOB, arms.arm_overrides("rlvr", ["train.steps=16"])))
    )
    for done, share in ((12, 4 / 16), (16, 1.0)):
        checkpoints = CheckpointStore(folder, 1, False)
        checkpoints.aside(done)
        checkpoints.commit(TrainerState(step=done, version=done, num_groups=0, score=0.0), b"")
        assert runner.expected(run) == (arms.ARMS["rlvr"].guess_s * share, False)
        if share < 1:
            given = ("--findings", "e", "--seeds", "0", "--budget-min")
            assert made_by_stand_in(*given, "0.4") == 0 and made_by_stand_in.calls() == []
            assert "0.5 min (a guess" in capsys.readouterr().out


def interrupt(made_by_stand_in, name, **environment):
    """The command in a process of its own, sent SIGINT once rlvr-seed0 has written the file `name`; what it said."""
    paths = os.pathsep.join(map(str, (FOLDER, *sys.path)))
    code = f"import sys, run; sys.exit(run.main(sys.argv[1:], [sys.executable, {str(made_by_stand_in.script)!r}]))"
    command = [sys.executable, "-P", "-c", code, "--out", str(made_by_stand_in.out), "--findings", "e", "--seeds", "0"]
    command.append("train.steps=16")
    bench = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    file = made_by_stand_in.out / "runs" / "rlvr-seed0" / name
    try:
        deadline = time.monotonic() + 30
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        bench.send_signal(signal.SIGINT)
        said, _ = bench.communicate(timeout=30)
    finally:
        bench.kill()
    assert bench.returncode == 130 and "the same command goes on from here" in said
    return said


def test_ctrl_c_keeps_a_run_that_has_trained_to_its_end(made_by_stand_in):
    assert "rlvr-seed0: done" in interrupt(made_by_stand_in, "summary.json", FAKE_LINGERS="end")
    (kept,) = (made_by_stand_in.out / "finished.jsonl").read_text().splitlines()
    assert json.loads(kept)["arm"] == "rlvr"


def test_ctrl_c_ends_the_child_and_the_same_command_goes_on(made_by_stand_in):
    said = interrupt(made_by_stand_in, "metrics.jsonl", FAKE_PACE="0.5")
    assert "rlvr-seed0: stopped; the same command goes on from its checkpoint" in said
    metrics = made_by_stand_in.out / "runs" / "rlvr-seed0" / "metrics.jsonl"
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(made_by_stand_in.script).encode() in _read(p)]
    assert left == []
    done = len(metrics.read_text().splitlines())
    assert made_by_stand_in("--findings", "e", "--seeds", "0") == 0
    assert [call[1:3] for call in made_by_stand_in.calls()] == [[False, 0], [True, done]]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_killed_run_without_a_checkpoint_is_started_anew(made_by_stand_in):
    folder = made_by_stand_in.out / "runs" / "rlvr-seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 9.0}\n')
    assert made_by_stand_in("--findings", "e", "--seeds", "0") == 0
    assert [call[:3] for call in made_by_stand_in.calls()] == [["rlvr-seed0", False, 0]]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 16
    assert (folder.parent / "rlvr-seed0-given-up-1" / "metrics.jsonl").is_file()


def test_a_failed_run_is_said_and_the_others_go_on(made_by_stand_in, capsys):
    assert made_by_stand_in("--findings", "b", "--seeds", "0", FAKE_FAILS="reinforce_rej") == 1
    assert [call[0] for call in made_by_stand_in.calls()] == ["reinforce_rej-seed0", "grpo-seed0"]
    said = capsys.readouterr().out
    assert "broken on purpose" in said and "failed: reinforce_rej-seed0" in said
    assert "| unclear |" in said, "without one of its arms a finding has no answer"
    assert made_by_stand_in("--findings", "b", "--seeds", "0") == 0
    assert [call[0] for call in made_by_stand_in.calls()][2:] == ["reinforce_rej-seed0"]


def test_arms_that_need_a_teacher_wait_for_it(made_by_stand_in):
    assert made_by_stand_in("--findings", "d", "--seeds", "0", FAKE_FAILS="teacher") == 1
    assert [call[0] for call in made_by_stand_in.calls()] == ["teacher-seed1000", "rlvr-seed0"]


def test_runs_with_other_settings_are_not_mixed_in(made_by_stand_in):
    assert made_by_stand_in("--findings", "e", "--seeds", "0") == 0
    with pytest.raises(SystemExit, match="rlvr there have other settings"):
        made_by_stand_in("--findings", "e", "--seeds", "1", "train.lr=1e-4")
    assert len(made_by_stand_in.calls()) == 1


def test_two_commands_do_not_share_a_folder(made_by_stand_in, papers):
    store = papers["store"].Store(made_by_stand_in.out)
    with store.alone(), pytest.raises(SystemExit, match="another process"):
        made_by_stand_in("--findings", "e", "--seeds", "0")
    assert made_by_stand_in.calls() == []


def test_typing_errors_are_found_before_any_run(made_by_stand_in, capsys):
    from fastreason.errors import ConfigError

    with pytest.raises(ConfigError, match=r"train\.lrr"):
        made_by_stand_in("--findings", "e", "train.lrr=1")
    with pytest.raises(SystemExit):
        made_by_stand_in("--findings", "z")
    assert "no such finding: z" in capsys.readouterr().err
    assert made_by_stand_in.calls() == []
