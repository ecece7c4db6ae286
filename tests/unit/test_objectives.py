"""Offline objectives against float64 by hand, against each other, against TRL's own values; keys that could have no effect."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastreason.config import load_config, parse_config
from fastreason.data.traces import Trace
from fastreason.errors import ConfigError
from fastreason.losses.preference import PairSpec, pair_loss
from fastreason.objectives import OBJECTIVES, resolve_objective
from fastreason.offline import example_figures, response_sums, rows_of_examples
from fastreason.packing import micro_batches_of
from fastreason.policy import Policy
from fastreason.ranks import Ranks

VOCAB = 61


def tiny_model(seed=11, dtype=torch.float64):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **sizes)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).to(dtype)


def make_traces(pairs=True, num=6):
    generator = torch.Generator().manual_seed(3)

    def tokens(count):
        return torch.randint(1, VOCAB, (count,), generator=generator).tolist()

    rows = []
    for i in range(num):
        prompt, first, second = tokens(2 + i % 3), tokens(3 + i), tokens(8 - i % 4)
        rows.append(Trace(str(i), prompt, [first, second] if pairs else [first], None, 1.0))
    return rows


def config_of(objective, **offline):
    sections = {"model": {"path": "some/model"}, "train": {"steps": 1, "prompts_per_step": 6}}
    return parse_config(sections | {"offline": {"objective": objective, "path": "x.jsonl", **offline}})


def row_of(objective, **offline):
    return resolve_objective(config_of(objective, **offline))


def reference_scores(model, traces):
    return torch.tensor([[sum_by_hand(model, t.prompt, r)[0] for r in t.responses] for t in traces]).double().numpy()


def sum_by_hand(model, prompt, response):
    """(log pi(response | prompt), differentiable; its tokens), from whole logits of one sequence."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum(), len(response)


def ours(objective, traces, layout="padded", budget=10**6, num_ranks=1, reference=None, model=None):
    """(loss, gradients, figures) as an update divides it, its rows shared among so many ranks."""
    policy = Policy(copy.deepcopy(model or tiny_model()))
    rows = rows_of_examples(objective, traces, range(len(traces)), reference)
    total, batches, logp = 0.0, [], []
    for rank in range(num_ranks):
        for batch in micro_batches_of(rows, layout, budget, rank, num_ranks, pairs=objective.coupled):
            output = policy(batch, objective.spec, 1.0)
            total = total + output.loss_sum
            batches.append(batch)
            logp.append(output.logp)
    loss = total / objective.denominator(len(traces), [row.num_trained for row in rows])
    loss.backward()
    sums = response_sums(batches, logp, len(rows), Ranks())
    gradients = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, example_figures(objective, rows, sums)


def by_hand(loss_of, traces, model=None):
    """(loss, gradients) of the mean over examples of `loss_of(policy's (sum, length) of each response)`."""
    model = copy.deepcopy(model or tiny_model())
    loss = torch.stack([loss_of(*[sum_by_hand(model, t.prompt, r) for r in t.responses]) for t in traces]).mean()
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}


def assert_same(found, expected, rtol=2e-6):
    assert found[0] == pytest.approx(expected[0], rel=max(rtol, 2e-6))
    for name, gradient in found[1].items():
        # The summed loss and the norms of the model are fp32 all the same.
        torch.testing.assert_close(gradient, expected[1][name], rtol=max(rtol, 1e-4), atol=1e-5, msg=name)


def test_redi_is_the_papers_formula():
    expected = by_hand(lambda w, r: -0.7 * w[0] / w[1] + 0.3 * r[0] / r[1], make_traces())
    assert_same(ours(row_of("redi", c=0.7, alpha=0.3), make_traces()), expected)


def test_redi_with_alpha_0_is_sft_with_sequence_means_and_with_alpha_1_the_symmetric_loss():
    pairs = make_traces()
    chosen = [trace._replace(responses=trace.responses[:1]) for trace in pairs]
    zero = ours(row_of("redi", alpha=0.0), pairs)
    assert_same(ours(row_of("sft", aggregation="sequence_mean"), chosen), zero)
    one, symmetric = ours(row_of("redi", alpha=1.0), pairs), ours(row_of("symmetric"), pairs)
    assert_same(symmetric, one)
    assert zero[0] != pytest.approx(one[0], rel=1e-2)


def test_sft_is_the_mean_over_tokens():
    traces = make_traces(pairs=False)
    num = sum(len(t.responses[0]) for t in traces)
    expected = by_hand(lambda w: -w[0] * len(traces) / num, traces)
    assert_same(ours(row_of("sft"), traces), expected)


def test_dpo_is_the_papers_formula_against_another_model():
    traces, other = make_traces(), tiny_model(seed=5)
    with torch.no_grad():
        reference = reference_scores(other, traces)
    refs = iter(torch.tensor(reference))

    def loss(w, r):
        ref = next(refs)
        return -torch.nn.functional.logsigmoid(0.3 * ((w[0] - ref[0]) - (r[0] - ref[1])))

    expected = by_hand(loss, traces)
    found = ours(row_of("dpo", beta=0.3), traces, reference=reference)
    assert_same(found, expected)
    margins = [
        0.3 * float(a[0] - a[1] - r[0] + r[1])
        for a, r in zip(reference_scores_of(tiny_model(), traces), reference, strict=True)
    ]
    assert found[2]["pairs/margin"] == pytest.approx(sum(margins) / 6)
    assert found[2]["pairs/accuracy"] == sum(m > 0 for m in margins) / 6
    assert found[2]["logp/chosen_sum_change"] == pytest.approx(
        float((reference_scores_of(tiny_model(), traces) - reference)[:, 0].mean())
    )


def reference_scores_of(model, traces):
    with torch.no_grad():
        return reference_scores(model, traces)


def test_simpo_is_the_papers_formula():
    def loss(w, r):
        return -torch.nn.functional.logsigmoid(2.5 * (w[0] / w[1] - r[0] / r[1]) - 0.4)

    assert_same(ours(row_of("simpo", beta=2.5, gamma=0.4), make_traces()), by_hand(loss, make_traces()))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_a_weight_multiplies_its_rows_loss_in_sft_and_not_what_it_is_divided_by(aggregation):
    weights = [3.0, 0.0, 0.5, 1.0, 1.0, 2.0]
    traces = [t._replace(weight=w) for t, w in zip(make_traces(pairs=False), weights, strict=True)]
    num = sum(len(t.responses[0]) for t in traces)
    shares = iter(weights)

    def loss(w):
        divisor = num / len(traces) if aggregation == "token_mean" else w[1]
        return -next(shares) * w[0] / divisor

    assert_same(ours(row_of("sft", aggregation=aggregation), traces), by_hand(loss, traces))


def test_a_weight_multiplies_its_pairs_loss():
    pairs = make_traces()
    for name in ("redi", "simpo"):
        alone = ours(row_of(name), pairs[:1])[0]
        weighted = [trace._replace(weight=3.0 * (i == 0)) for i, trace in enumerate(pairs)]
        assert ours(row_of(name), weighted)[0] == pytest.approx(3 * alone / len(pairs), rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_layout_micro_batches_and_ranks_change_nothing(name):
    objective = row_of(name)
    traces = make_traces(pairs=objective.pairs, num=5)
    reference = reference_scores_of(tiny_model(seed=5), traces) if objective.needs_reference else None
    expected = ours(objective, traces, reference=reference)
    layouts = [("padded", 30, 1), ("padded", 1, 2), ("padded", 10**6, 3)]
    # Without a mask transformers reads from the position ids where a packed row begins, as flash-attn does.
    layouts += [("packed", 30, 1), ("packed", 1, 2), ("packed", 10**6, 3)]
    if objective.pairs:  # single rows of another prompt each would share nothing
        layouts += [("shared", 10**6, 1), ("shared", 1, 2), ("shared", 40, 4)]
    for layout, budget, num_ranks in layouts:
        found = ours(objective, traces, layout, budget, num_ranks, reference)
        assert_same(found, expected)
        assert found[2] == pytest.approx(expected[2], rel=2e-6)


def test_only_trained_tokens_of_a_conversation_count():
    trace = Trace("0", [1, 2], [[3, 4, 5, 6, 7]], [True, False, False, True, True], 1.0)
    model = tiny_model()
    logits = model(torch.tensor([trace.prompt + trace.responses[0]])).logits[0, 1:-1].log_softmax(-1)
    logp = logits.gather(-1, torch.tensor(trace.responses[0])[:, None])[:, 0][torch.tensor(trace.trained)]
    for layout in ("padded", "shared", "packed"):
        found = ours(row_of("sft"), [trace], layout)
        assert found[0] == pytest.approx(-float(logp.mean().detach()), rel=1e-6)
        assert found[2]["logp/chosen_sum"] == pytest.approx(float(logp.sum().detach()), rel=1e-6)


def test_a_pair_loss_refuses_what_makes_no_pairs():
    three = torch.ones(3)
    with pytest.raises(ValueError, match="got 3 rows"):
        pair_loss(three, three, three, PairSpec("mean", 1.0))
    with pytest.raises(ValueError, match="ref_logp_B"):
        pair_loss(torch.ones(2), torch.ones(2), torch.ones(2), PairSpec("reference", 1.0))


def test_dpo_and_simpo_give_the_values_of_trl(tmp_path):
    pytest.importorskip("trl", reason="the trainer to compare with is not installed: make bench-setup")
    from conftest import build_tokenizer
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOTrainer

    tokenizer, model, other = build_tokenizer(), None, None
    tokenizer.chat_template = None
    model, other = (tiny_model(seed, torch.float32) for seed in (11, 5))
    for each in (model, other):
        each.resize_token_embeddings(len(tokenizer))
    rows = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i} is right", "rejected": f"no{'!' * i}"} for i in range(3)]
    arguments = {"per_device_train_batch_size": 3, "report_to": "none", "bf16": False, "use_cpu": True, "beta": 0.2}
    trainer = DPOTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(other),
        args=DPOConfig(str(tmp_path), disable_dropout=True, gradient_checkpointing=False, **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    traces = []
    for place in range(3):
        found = []
        for line in (place, place + 3):
            ids, mask, real = (inputs[k][line] for k in ("input_ids", "completion_mask", "attention_mask"))
            found.append((ids[(real == 1) & (mask == 0)].tolist(), ids[(real == 1) & (mask == 1)].tolist()))
        traces.append(Trace(str(place), found[0][0], [found[0][1], found[1][1]], None, 1.0))
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    expected = float(theirs.detach()), {n: p.grad for n, p in trainer.model.named_parameters()}
    reference = reference_scores_of(other, traces)
    assert_same(ours(row_of("dpo", beta=0.2), traces, reference=reference, model=model), expected, rtol=1e-3)

    logps = []
    for side in (0, 1):
        lengths = [len(t.prompt) + len(t.responses[side]) for t in traces]
        ids, labels = torch.zeros(3, max(lengths), dtype=torch.long), torch.full((3, max(lengths)), -100)
        for line, trace in enumerate(traces):
            whole = torch.tensor(trace.prompt + trace.responses[side])
            ids[line, : len(whole)] = whole
            labels[line, len(trace.prompt) : len(whole)] = whole[len(trace.prompt) :]
        with torch.no_grad():
            logps.append(CPOTrainer.get_batch_logps(model(ids).logits, labels, average_log_prob=True))
    settings = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.4, beta=2.5, label_smoothing=0.0, accelerator=trainer.accelerator
    )
    losses = CPOTrainer.cpo_loss(settings, *logps)[0]
    assert ours(row_of("simpo", beta=2.5, gamma=0.4), traces, model=model)[0] == pytest.approx(
        float(losses.mean()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("objective", "offline", "parts"),
    [
        ("redy", {}, ["offline.objective='redy'", "Did you mean 'redi'?", "simpo"]),
        ("redi", {"path": None}, ["offline.path: missing", "pairs"]),
        ("sft", {"alpha": 0.5}, ["offline.alpha=0.5", "offline.objective=sft", "redi"]),
        ("symmetric", {"alpha": 0.5}, ["offline.alpha=0.5", "redi"]),
        ("redi", {"beta": 0.5}, ["offline.beta=0.5", "dpo, simpo"]),
        ("dpo", {"gamma": 0.5}, ["offline.gamma=0.5", "simpo"]),
        ("dpo", {"aggregation": "token_mean"}, ["offline.aggregation=token_mean", "sft"]),
        ("dpo", {"messages_column": "m"}, ["offline.messages_column=m", "offline.objective=dpo"]),
        ("sft", {"chosen_column": "m"}, ["offline.chosen_column=m"]),
        ("sft", {"messages_column": "m", "response_column": "r"}, ["offline.response_column=r"]),
    ],
)
def test_keys_that_cannot_work_name_key_value_and_what_is_allowed(objective, offline, parts):
    with pytest.raises(ConfigError) as error:
        row_of(objective, **offline)
    assert not [part for part in parts if part not in str(error.value)], error.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout.samples_per_prompt", 4),
        ("algorithm.kl", "k3"),
        ("reward.workers", 2),
        ("eval.num_prompts", 5),
        ("data.path", "x"),
        ("train.prompts_per_update", 3),
        ("teacher.path", "x"),
        ("data.id_column", "x"),
        ("data.allow_download", True),
        ("run.max_restarts", 5),
        ("checkpoint.keep_best", False),
    ],
)
def test_keys_of_online_runs_are_refused(key, value):
    section, name = key.split(".")
    raw = config_of("sft").model_dump()
    raw[section][name] = value
    with pytest.raises(ConfigError, match=rf"{key}={value}: has no effect in an offline run"):
        resolve_objective(parse_config(raw))


def test_offline_keys_and_missing_steps_are_refused(tmp_path):
    raw = {"model": {"path": "a/b"}, "data": {"task": "chain_sum"}, "train": {"steps": 1, "prompts_per_step": 8}}
    with pytest.raises(ConfigError, match=r"offline\.alpha=0\.3: has no effect without offline\.objective"):
        parse_config(raw | {"offline": {"alpha": 0.3}})
    with pytest.raises(ConfigError, match=r"train\.steps: missing.*offline\.epochs"):
        parse_config(raw | {"train": {"prompts_per_step": 8}, "offline": {"objective": "sft", "path": "x"}})
    with pytest.raises(ConfigError, match=r"train\.warmup_share=0\.1 beside train\.warmup_steps=1"):
        parse_config(raw | {"train": {"steps": 2, "prompts_per_step": 8, "warmup_steps": 1, "warmup_share": 0.1}})


def test_a_run_without_steps_is_written_and_read_back(tmp_path):
    from fastreason.config import dump_config

    config = config_of("sft", epochs=2.0).model_dump()
    del config["train"]["steps"]
    parsed = parse_config(config)
    (tmp_path / "c.yaml").write_text(dump_config(parsed))
    assert load_config(tmp_path / "c.yaml") == parsed and parsed.train.steps == 0
    assert math.isclose(parsed.offline.epochs or 0, 2.0)
