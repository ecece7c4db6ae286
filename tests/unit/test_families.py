"""Families of models: the trainer's log-probabilities are those of transformers' own forward, in every layout."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from fastreason_kernels import PolicyLossSpec
from fastreason_kernels.transform import Transform
from transformers import AutoModelForCausalLM

from fastreason.config import ModelConfig
from fastreason.errors import ModelError
from fastreason.families import head_transform, layer_masks
from fastreason.frozen import FrozenModel, FrozenScorer, HeadDivergence
from fastreason.packing import Row, collate, units_of
from fastreason.policy import load_policy

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 5}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# (class of the config, its own keys). An odd vocabulary is one that no block of a kernel divides.
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "vocab_size": 113}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3_window": ("Qwen3Config", {"head_dim": 16, "use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "gemma": ("GemmaConfig", {"head_dim": 8, "vocab_size": 101}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, **MIXED}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, **MIXED},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None, "vocab_size": 127}),
    "mistral_window": ("MistralConfig", WINDOW),
    "phi": ("PhiConfig", {"vocab_size": 131}),
    "phi3": ("Phi3Config", {"sliding_window": 5, "bos_token_id": 1, "eos_token_id": 2}),
    "olmo2": ("Olmo2Config", {"eos_token_id": 2}),
    "olmo3": ("Olmo3Config", {"eos_token_id": 2, **MIXED}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0], "bos_token_id": 1, "eos_token_id": 2}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.25, "head_dim": 8, **MIXED}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "hyperclovax": ("HyperCLOVAXConfig", {"logits_scaling": 0.5}),
}
PROMPT, RESPONSES = [3, 1, 4, 1], [[5, 9, 2, 6, 5], [3, 5, 8], [9, 7, 9, 3, 2, 3, 8, 4]]
TEMPERATURE = 0.7


def save_family(name, folder):
    torch.manual_seed(0)
    kind, keys = FAMILIES[name]
    config = getattr(transformers, kind)(**{**SIZES, **keys})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms start as 0 and 1, where a wrong use of them would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_family(request.param, tmp_path_factory.mktemp("families") / request.param)


def load(folder, attention="sdpa", **keys):
    return load_policy(folder, ModelConfig(path=str(folder), dtype="float32", **keys), "cpu", attention, False)


def batch_of(layout):
    rows = [Row(PROMPT, response, [-4.0] * len(response), 1.0, index=i) for i, response in enumerate(RESPONSES)]
    return collate(units_of(rows, layout), layout)


def whole_logp(folder):
    """Of transformers' own forward in float64: the log-probabilities [N] of the response tokens, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    found = []
    for response in RESPONSES:
        ids = torch.tensor([PROMPT + response])
        logp_TV = (model(ids, use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        found.append(logp_TV[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None]).squeeze(1))
    return torch.cat(found)


def test_log_probabilities_and_gradients_are_those_of_transformers_own_forward(folder):
    expected_N = whole_logp(folder).detach()
    gradients = []
    for layout, attention in (("padded", "sdpa"), ("shared", "sdpa"), ("shared", "eager")):
        policy = load(folder, attention)
        batch = batch_of(layout)
        logp_N = policy(batch, None, TEMPERATURE)[0]
        torch.testing.assert_close(logp_N.double(), expected_N, rtol=1e-4, atol=1e-4)
        output = policy(batch, PolicyLossSpec(), TEMPERATURE)
        torch.testing.assert_close(output.logp.double(), expected_N, rtol=1e-4, atol=1e-4)
        output.loss_sum.backward()
        gradients.append({name: p.grad for name, p in policy.model.named_parameters()})
    assert all(bool(gradient.isfinite().all()) for gradient in gradients[0].values())
    for others in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


def test_a_gradient_is_that_of_transformers_own_loss(folder):
    policy, batch = load(folder, "eager"), batch_of("padded")
    policy(batch, None, TEMPERATURE)[0].sum().backward()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for response in RESPONSES:
        ids = torch.tensor([PROMPT + response])
        logp_TV = (model(ids, use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        logp_TV[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None]).sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("top_k", [None, 5])
def test_the_divergence_of_a_capped_student_from_a_scaled_teacher_is_that_of_whole_logits(tmp_path, top_k):
    student = load(save_family("gemma2", tmp_path / "gemma2"), "eager")
    teacher = load(save_family("cohere", tmp_path / "cohere"))
    batch = batch_of("padded")
    scorer = FrozenScorer(teacher)
    batch.divergence = HeadDivergence(FrozenModel(scorer, torch.device("cpu")), 1.0, top_k)
    batch.advantages_N = torch.zeros_like(batch.advantages_N)
    output = student(batch, PolicyLossSpec(), TEMPERATURE)
    output.loss_sum.backward()
    found = {name: p.grad.clone() for name, p in student.model.named_parameters()}
    student.zero_grad()

    def log_probs(policy, transform):
        raw_NV = policy.hidden(batch).double() @ policy.head.weight.double().T
        return (transform.apply(raw_NV) / TEMPERATURE).log_softmax(-1)

    logp_NV, teacher_NV = log_probs(student, Transform(1.0, 3.0)), log_probs(teacher, Transform(0.25)).detach()
    if top_k is not None:
        known_NK, ids_NK = teacher_NV.topk(top_k)
        pairs = [(x, (1 - x.exp().sum(-1, keepdim=True)).log()) for x in (logp_NV.gather(1, ids_NK), known_NK)]
        logp_NV, teacher_NV = (torch.cat(pair, 1) for pair in pairs)
    expected_N = (logp_NV.exp() * (logp_NV - teacher_NV)).sum(-1)
    torch.testing.assert_close(output.kl.double(), expected_N.detach(), rtol=1e-4, atol=1e-4)
    expected_N.sum().backward()
    for name, parameter in student.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("kind", "keys", "transform"),
    [
        ("LlamaConfig", {}, Transform()),
        ("LlamaConfig", {"logits_scaling": 1.0, "final_logit_softcapping": None}, Transform()),
        ("Gemma2Config", {"final_logit_softcapping": 30.0}, Transform(1.0, 30.0)),
        ("CohereConfig", {"logit_scale": 0.0625}, Transform(0.0625)),
        ("GraniteConfig", {"logits_scaling": 8.0}, Transform(0.125)),
        ("HyperCLOVAXConfig", {"logits_scaling": 8.0}, Transform(8.0)),
        ("FalconH1Config", {"lm_head_multiplier": 0.5}, Transform(0.5)),
    ],
)
def test_what_a_config_says_of_its_head(kind, keys, transform):
    assert head_transform(getattr(transformers, kind)(**keys)) == transform


@pytest.mark.parametrize("value", ["inv_sqrt_d_model", 0.0, -1.0])
def test_a_scale_that_is_no_number_above_0_is_refused(value):
    config = transformers.PretrainedConfig(logit_scale=value)
    with pytest.raises(ModelError, match=r"model\.path: logit_scale="):
        head_transform(config)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier"])
def test_a_key_that_the_model_itself_does_not_heed_is_refused(tmp_path, key):
    path = save_family("qwen2", tmp_path / "m") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 30.0}))
    with pytest.raises(ModelError, match="whose logits are not those of Transform"):
        load(tmp_path / "m")


@pytest.mark.parametrize("what", ["cap", "scale"])
def test_what_a_model_does_to_its_logits_without_saying_so_is_found(tmp_path, monkeypatch, what):
    """A cap of 90 changes none of a small model's logits; the test makes them large."""
    forward = transformers.Qwen2ForCausalLM.forward

    def changed(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.logits = 90 * torch.tanh(output.logits / 90) if what == "cap" else output.logits * 1.1
        return output

    folder = save_family("qwen2", tmp_path / "m")
    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "forward", changed)
    with pytest.raises(ModelError, match="whose logits are not those of Transform"):
        load(folder)


def test_a_model_that_scales_its_states_before_the_head_is_refused(tmp_path, monkeypatch):
    folder = save_family("qwen2", tmp_path / "m")

    def changed(self, input_ids, **options):
        states = self.model(input_ids, use_cache=False).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(states / 2))

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "forward", changed)
    with pytest.raises(ModelError, match="reads something else than its body's last states"):
        load(folder)


def test_capped_attention_scores_take_eager_attention_unless_sdpa_was_asked_for(tmp_path):
    folder = save_family("gemma2", tmp_path / "m")
    assert load(folder, "sdpa").model.config._attn_implementation == "unpadded_eager"
    with pytest.raises(ModelError, match=r"model\.attn_implementation=sdpa: .* caps its attention scores"):
        load(folder, "sdpa", attn_implementation="sdpa")


def test_a_window_counts_positions_and_not_places_in_a_line():
    """Two responses of 3 after a prompt of 2, window 3: the second's first token is 1 from the prompt's end, not 4."""
    rows = [Row([1, 2], [3, 4, 5], [0.0] * 3, 1.0), Row([1, 2], [6, 7, 8], [0.0] * 3, 1.0)]
    batch = collate([rows], "shared")
    config = transformers.MistralConfig(sliding_window=3)
    mask = layer_masks(config, batch.mask_B1LL, batch.position_ids_BL)
    seen = [[i for i in range(8) if mask[0, 0, query, i]] for query in range(8)]
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 1, 5], [1, 5, 6], [5, 6, 7]]
    assert layer_masks(transformers.MistralConfig(sliding_window=8), batch.mask_B1LL, None) is batch.mask_B1LL


def test_layers_that_remember_cannot_share_a_line():
    config = transformers.PretrainedConfig(layer_types=["linear_attention", "full_attention"])
    batch = batch_of("shared")
    with pytest.raises(ModelError, match=r"layers of linear_attention.* Pass train\.share_prompts=off"):
        layer_masks(config, batch.mask_B1LL, batch.position_ids_BL)
