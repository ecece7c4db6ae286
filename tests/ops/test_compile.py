"""The operations under torch.compile, autocast, activation checkpointing and dispatch modes: what they give eagerly."""

import shutil

import pytest
import torch
from fastreason_kernels import LoraHead, PolicyLossSpec, linear_divergence, linear_logprob, linear_policy_loss
from fastreason_kernels.head import head_arguments
from fastreason_kernels.testing import Recorder, head_case
from torch.utils import checkpoint as checkpointing
from torch.utils.flop_counter import FlopCounterMode

NUM_TOKENS, VOCAB, WIDTH, RANK = 20, 50, 16, 3
LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")

# Options of a head, where True stands for the tensor of that name; "frozen" and "frozen_body" are about its leaves.
HEADS = {
    "plain": {},
    "chunks": {"chunk_tokens": 7},
    "columns": {"chunk_tokens": 7, "chunk_vocab": 13},
    "no entropy": {"entropy_grad": False},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": True},
    "softcap": {"softcap": 5.0, "logit_scale": 0.6},
    "lora": {"lora": True},
    "ignore": {"ignore_index": -100},
    "everything": {
        "bias": True,
        "temperature": True,
        "softcap": 5.0,
        "lora": True,
        "ignore_index": -100,
        "chunk_tokens": 7,
    },
    "F": {"strategy": "F", "frozen": True},
    "F no entropy": {"strategy": "F", "frozen": True, "entropy_grad": False, "ignore_index": -100, "bias": True},
    "auto F": {"frozen": True, "entropy_grad": False, "softcap": 5.0, "temperature": True},
    "body frozen": {"frozen_body": True, "lora": True},
    "no gradient": {"frozen_body": True, "frozen": True},
}

FULL = {"bias": True, "lora": True, "temperature": True, "softcap": 5.0}

POLICIES = {
    "nll": ({"ratio": "none"}, {}),
    "ppo": ({}, {"mask": True}),
    "no behaviour": ({}, {"behaviour_logp": None}),
    "dual clip": ({"dual_clip": 3.0, "clip_high": 0.28}, {}),
    "cispo": ({"gate": "cispo"}, {"bias": True}),
    "sapo": ({"gate": "sapo"}, {"temperature": True}),
    "k1": ({"kl": "k1", "kl_coef": 0.3}, {"statistics": "active"}),
    "k2": ({"kl": "k2", "kl_coef": 0.3}, {"softcap": 5.0}),
    "k3": ({"kl": "k3", "kl_coef": 0.3}, {"lora": True}),
    "entropy": ({"entropy_coef": 0.2}, {"mask": True, "chunk_tokens": 7}),
    "truncate": ({"importance": "truncate"}, {}),
    "mask": ({"importance": "mask"}, {"statistics": "active", "mask": True}),
    "sequence": ({"ratio": "sequence"}, {"mask": True}),
    "sequence, 1": ({"ratio": "sequence", "importance": "truncate"}, {"behaviour_logp": None}),
    "sequence, on-policy": ({"ratio": "sequence", "kl": "k3", "kl_coef": 0.1}, {"behaviour_logp": None, "mask": True}),
    "sequence cispo": ({"ratio": "sequence", "gate": "cispo"}, {"behaviour_logp": None}),
    "sequence, [S]": ({"ratio": "sequence"}, {"per_sequence": True}),
    "weighed": ({"importance": "mask", "importance_level": "sequence", "importance_floor": 0.1}, {"mask": True}),
    "weighed B": ({"importance": "truncate", "importance_level": "geometric"}, {"behaviour_logp": None, "mask": True}),
    "no weight": ({}, {"token_weight": None}),
    "A frozen": ({"entropy_coef": 0.2}, {"strategy": "A", "frozen": True}),
    "B": ({"entropy_coef": 0.2, "kl": "k3", "kl_coef": 0.1}, {"strategy": "B", "mask": True, "bias": True}),
    "B active": ({"importance": "truncate"}, {"strategy": "B", "statistics": "active", "lora": True}),
    "F": ({"entropy_coef": 0.2, "ratio": "sequence"}, {"strategy": "F", "frozen": True, "mask": True}),
    "F active": ({}, {"strategy": "F", "frozen": True, "statistics": "active", "mask": True}),
    "auto F": ({"ratio": "sequence"}, {"frozen": True, "temperature": 0.7}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request):
    if request.param == "inductor" and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler, and there is none")
    return request.param


def tensors(num_tokens=NUM_TOKENS, *, frozen=False, frozen_body=False, dtype=torch.float32):
    """Leaves and columns by name; ratios stay far from every bound."""
    case = head_case(num_tokens, VOCAB, width=WIDTH, dtype=dtype)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    found = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    found |= {"lora_a": normal(RANK, WIDTH), "lora_b": normal(VOCAB, RANK)}
    found = {
        name: x.detach().requires_grad_(not (frozen_body if name == "hidden" else frozen)) for name, x in found.items()
    }
    behaviour = -5 + 2 * torch.rand(num_tokens, generator=generator)
    return {
        **found,
        "ids": case.ids,
        "temperature": case.temperature,
        "advantages": torch.randn(num_tokens, generator=generator) * (torch.arange(num_tokens) % 4 > 0),
        "behaviour_logp": behaviour,
        "ref_logp": -4 + torch.rand(num_tokens, generator=generator),
        "sampler_logp": behaviour + 0.8 * torch.rand(num_tokens, generator=generator) - 0.6,
        "token_weight": torch.rand(num_tokens, generator=generator) + 0.2,
        "sequence_ids": torch.arange(num_tokens) // 6,
        "mask": torch.arange(num_tokens) % 5 > 0,
    }


def head_options(x, settings):
    """The keyword arguments of a head: a setting of True takes the tensor of that name."""
    options = {name: value for name, value in settings.items() if not name.startswith("frozen")}
    for name in ("bias", "temperature"):
        if options.get(name) is True:
            options[name] = x[name]
    if options.pop("lora", False):
        options["lora"] = LoraHead(x["lora_a"], x["lora_b"], 0.5)
    return options


def logprob_function(settings):
    def function(x):
        ids = x["ids"]
        if "ignore_index" in settings:
            ids = torch.where(x["mask"], ids, settings["ignore_index"])
        logp, entropy, lse = linear_logprob(x["hidden"], x["weight"], ids, **head_options(x, settings))
        # Every token has gradients of its own, and one in four none.
        loss = (x["advantages"] * logp).sum() + (x["token_weight"] * entropy).sum()
        return loss, logp.detach(), entropy.detach(), lse

    return function


def policy_function(spec, settings):
    settings = dict(settings)
    left_out = [name for name, value in settings.items() if value is None]
    with_mask, per_sequence = settings.pop("mask", False), settings.pop("per_sequence", False)
    settings = {name: value for name, value in settings.items() if value is not None}
    names = ("behaviour_logp", "ref_logp", "sampler_logp", "token_weight", "sequence_ids")

    def function(x):
        columns = {name: x[name] for name in names if name not in left_out}
        if with_mask:
            columns["mask"] = x["mask"]
        advantages = x["advantages"][:4] if per_sequence else x["advantages"]
        return linear_policy_loss(
            x["hidden"], x["weight"], x["ids"], advantages, spec, **columns, **head_options(x, settings)
        )

    return function


def measure(function, x):
    """The function's tensors, and the gradients of three times the first with respect to every leaf it depends on."""
    values = function(x)
    leaves = {name: x[name] for name in LEAVES if x[name].requires_grad}
    grads = [None] * len(leaves)
    if values[0].requires_grad:
        grads = torch.autograd.grad(3 * values[0], list(leaves.values()), allow_unused=True)
    return [x.detach() for x in values], dict(zip(leaves, grads, strict=True))


def assert_same(actual, expected, **close):
    torch.testing.assert_close(actual, expected, equal_nan=True, **close)


def frozen_parts(settings):
    return {name: value for name, value in settings.items() if name.startswith("frozen")}


def check_compiled(function, x, backend="aot_eager"):
    expected = measure(function, x)
    compiled = measure(torch.compile(function, fullgraph=True, backend=backend), x)
    assert_same(compiled, expected)
    return expected[1]


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS.keys())
def test_linear_logprob_compiles(settings):
    x = tensors(**frozen_parts(settings))
    grads = check_compiled(logprob_function(settings), x)
    used = {"hidden", "weight", *(["bias"] if settings.get("bias") else [])}
    used |= {"lora_a", "lora_b"} if settings.get("lora") else set()
    # A gradient that is missing on both sides would compare equal.
    expected = {name for name in used if x[name].requires_grad}
    assert {name for name, grad in grads.items() if grad is not None and grad.any()} == expected


@pytest.mark.parametrize(("spec", "settings"), POLICIES.values(), ids=POLICIES.keys())
def test_linear_policy_loss_compiles(spec, settings):
    grads = check_compiled(policy_function(PolicyLossSpec(**spec), settings), tensors(**frozen_parts(settings)))
    assert grads["hidden"].any() and (settings.get("frozen") or grads["weight"].any())


@pytest.mark.parametrize("spec", [{"entropy_coef": 0.2, "dual_clip": 3.0}, {"ratio": "sequence"}], ids=["A", "B"])
def test_compiles_with_a_body_around_it(spec, backend):
    """What a compiler fuses around the operation, its gradient included; the spec arrives as an argument."""
    loss = policy_function(PolicyLossSpec(**spec), {"mask": True, "lora": True})
    x = tensors()

    def function(x):
        out = loss({**x, "hidden": torch.nn.functional.silu(x["hidden"] * 2)})
        return out.loss_sum / x["token_weight"].sum(), *out[1:]

    check_compiled(function, x, backend)


# (tokens, spec, temperature, softcap, chunk_tokens) of successive calls, and which of them must compile nothing new.
TOKEN, SEQUENCE = PolicyLossSpec(), PolicyLossSpec(ratio="sequence", clip_high=0.4)
CALLS = {
    "tokens": ([(n, TOKEN, 0.8, None, 7) for n in (20, 13, 31, 1, 0)], 2),
    "temperature": ([(20, TOKEN, t, None, 7) for t in (0.8, 1.3, 0.6, 1.0)], 2),
    "spec": ([(20, spec, 0.8, None, 7) for spec in (TOKEN, SEQUENCE, TOKEN)], 2),
    "constants": ([(20, TOKEN, 0.8, cap, n) for cap, n in ((5.0, 7), (7.0, 5), (9.0, 30), (None, 3))], None),
}


@pytest.mark.parametrize(("calls", "known"), CALLS.values(), ids=CALLS.keys())
def test_what_may_change_between_calls(calls, known):
    def function(x, spec, temperature, softcap, chunk_tokens):
        options = {"temperature": temperature, "softcap": softcap, "chunk_tokens": chunk_tokens}
        columns = {name: x[name] for name in ("behaviour_logp", "sequence_ids")}
        out = linear_policy_loss(x["hidden"], x["weight"], x["ids"], x["advantages"], spec, **columns, **options)
        logp, entropy, _ = linear_logprob(x["hidden"], x["weight"], x["ids"], **options)
        return out.loss_sum + (x["token_weight"] * entropy).sum(), logp.detach(), *out[1:]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for index, (num_tokens, *rest) in enumerate(calls):
        x = tensors(num_tokens)
        with torch._dynamo.config.patch(error_on_recompile=index == known):
            actual = measure(lambda x, rest=rest: compiled(x, *rest), x)
        assert_same(actual, measure(lambda x, rest=rest: function(x, *rest), x))


def operator_arguments(settings):
    """(inputs, head tensors as leaves, encoded options) for a direct call of an operator; a bias is frozen."""
    x = tensors(9, **frozen_parts(settings))
    x["bias"].requires_grad_(False)
    head, options = head_arguments(x["hidden"], x["weight"], x["ids"], **head_options(x, settings), chunk_tokens=4)
    leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in head]
    return x, leaves, options.encode()


@pytest.mark.parametrize("settings", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("strategy", ["B", "F"])
def test_opcheck_linear_logprob(strategy, settings):
    if strategy == "F":
        settings = {name: value for name, value in settings.items() if name != "lora"} | {"frozen": True}
    x, head, options = operator_arguments(settings)
    needs = [t is not None and t.requires_grad for t in head[:5]]
    rows = x["mask"] if settings else None
    arguments = (*head, rows, rows, options, strategy, True, needs)
    torch.library.opcheck(torch.ops.fastreason.linear_logprob.default, arguments)


@pytest.mark.parametrize("settings", [{}, FULL], ids=["plain", "full"])
def test_opcheck_linear_logprob_backward(settings):
    x, head, options = operator_arguments(settings)
    with torch.no_grad():
        statistics = linear_logprob(x["hidden"], x["weight"], x["ids"], **head_options(x, settings))
    needs = [t is not None and t.requires_grad for t in head[:5]]
    head = [None if t is None else t.detach() for t in head]
    g_entropy = x["token_weight"] if settings else None
    arguments = (*head, *statistics, x["advantages"], g_entropy, options, needs)
    torch.library.opcheck(torch.ops.fastreason.linear_logprob_backward.default, arguments)


@pytest.mark.parametrize("settings", [{}, FULL], ids=["plain", "full"])
def test_opcheck_linear_policy_loss(settings):
    x, head, options = operator_arguments(settings)
    spec = (
        PolicyLossSpec(entropy_coef=0.1, kl="k3", kl_coef=0.1, importance="truncate") if settings else PolicyLossSpec()
    )
    names = ("behaviour_logp", "ref_logp", "sampler_logp", "token_weight")
    columns = [x[name] if settings else None for name in names]
    needs = [t is not None and t.requires_grad for t in head[:5]]
    # opcheck's own comparison takes no NaN, which skipped tokens report.
    mask = torch.ones_like(x["mask"]) if settings else None
    statistics = "active" if settings else "all"
    arguments = (*head, x["advantages"], *columns, None, mask, options, spec.encoded, statistics, needs)
    torch.library.opcheck(torch.ops.fastreason.linear_policy_loss.default, arguments)


@pytest.mark.parametrize("settings", [{}, FULL], ids=["plain", "full"])
def test_opcheck_linear_divergence(settings):
    x, head, options = operator_arguments(settings)
    teacher = x["hidden"].detach().flip(0), x["weight"].detach().roll(1, 1), None, head[-1]
    needs = [t is not None and t.requires_grad for t in head[:5]]
    columns = (None, None, x["token_weight"] if settings else None, None)
    arguments = (*head, *teacher, *columns, options, options, "jsd" if settings else "reverse", 0.3, "bucket", needs)
    torch.library.opcheck(torch.ops.fastreason.linear_divergence.default, arguments)


def wrap(function, **changes):
    """The same function of changed inputs."""
    return lambda x: function({**x, **{name: change(x[name]) for name, change in changes.items()}})


def divergence(x):
    """From a teacher that is the student, shuffled."""
    teacher = x["hidden"].detach().flip(0), x["weight"].detach().roll(1, 1)
    options = {"token_weight": x["token_weight"], "mask": x["mask"], "bias": x["bias"], "chunk_tokens": 7}
    return linear_divergence(x["hidden"], x["weight"], *teacher, **options)


SURROUNDED = {
    "divergence": divergence,
    "B": logprob_function({"chunk_tokens": 7, "bias": True}),
    "A": policy_function(PolicyLossSpec(entropy_coef=0.2, dual_clip=3.0), {"mask": True, "chunk_tokens": 7}),
    "A, sequence of ratio 1": policy_function(PolicyLossSpec(ratio="sequence"), {"behaviour_logp": None}),
    "policy loss by B": policy_function(PolicyLossSpec(ratio="sequence", entropy_coef=0.1), {"mask": True}),
    "lora": policy_function(PolicyLossSpec(kl="k3", kl_coef=0.1), {"lora": True, "bias": True}),
    "F": logprob_function({"strategy": "F", "frozen": True}),
    "policy loss by F": policy_function(PolicyLossSpec(ratio="sequence"), {"strategy": "F", "frozen": True}),
}
surrounded = pytest.mark.parametrize("name", SURROUNDED)


def surrounded_case(name, **options):
    return SURROUNDED[name], tensors(frozen=name.endswith("F"), **options)


@surrounded
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_is_an_explicit_cast(name, compiled):
    function, x = surrounded_case(name)

    def cast(x):
        return function({k: v.to(torch.bfloat16) if k in LEAVES else v for k, v in x.items()})

    def autocast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(x)

    expected = measure(cast, x)
    actual = measure(torch.compile(autocast, fullgraph=True, backend="aot_eager") if compiled else autocast, x)
    assert_same(actual, expected, rtol=0, atol=0)
    assert actual[1]["hidden"].dtype == torch.float32 and actual[1]["hidden"].any()
    _, whole = measure(function, x)
    assert not torch.equal(actual[1]["hidden"], whole["hidden"])


@surrounded
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "compiled"])
def test_activation_checkpointing(name, kind):
    """Around a body and the operation: the backward runs both again."""
    function, x = surrounded_case(name)
    runs = []

    def body(hidden):
        if not torch.compiler.is_compiling():
            runs.append(torch.is_grad_enabled())
        return torch.nn.functional.silu(hidden * 2)

    inner = wrap(function, hidden=body)

    def whole(hidden, x):
        return tuple(inner({**x, "hidden": hidden}))

    def checkpointed(x):
        return checkpointing.checkpoint(whole, x["hidden"], x, use_reentrant=kind == "reentrant")

    expected = measure(inner, x)
    runs.clear()
    if kind == "reentrant":
        # Reentrant checkpoints allow backward() only, not autograd.grad.
        values = checkpointed(x)
        (3 * values[0]).backward()
        leaves = {leaf: x[leaf].grad for leaf in LEAVES if x[leaf].requires_grad}
        actual = [value.detach() for value in values], leaves
    else:
        compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
        actual = measure(compiled if kind == "compiled" else checkpointed, x)
    assert_same(actual, expected)
    assert len(runs) == (0 if kind == "compiled" else 2)


@surrounded
def test_a_dispatch_mode_around_it(name):
    function, x = surrounded_case(name)
    expected = measure(function, x)
    with FlopCounterMode(display=False):
        actual = measure(function, x)
    assert_same(actual, expected, rtol=0, atol=0)


@surrounded
@pytest.mark.parametrize("saved", [False, True], ids=["recomputed", "saved"])
def test_selective_checkpointing(name, saved):
    """A policy may keep the operator's results, and then it does not run again."""
    function, x = surrounded_case(name)
    names = ("linear_logprob", "linear_policy_loss", "linear_divergence")
    operators = [getattr(torch.ops.fastreason, name).default for name in names]

    def contexts():
        return checkpointing.create_selective_checkpoint_contexts(operators if saved else [])

    def body(hidden):
        return torch.nn.functional.silu(hidden * 2)

    inner = wrap(function, hidden=body)

    def checkpointed(x):
        return checkpointing.checkpoint(
            lambda hidden: tuple(inner({**x, "hidden": hidden})), x["hidden"], use_reentrant=False, context_fn=contexts
        )

    with Recorder() as plain:
        expected = measure(inner, x)
    with Recorder() as recorder:
        actual = measure(checkpointed, x)
    assert_same(actual, expected)
    # Products with the vocabulary; what makes the inputs runs again in any case.
    counts = [sum(VOCAB in a + b for a, b in each.products) for each in (recorder, plain)]
    assert (counts[0] == counts[1]) == saved and counts[1] >= 2


def test_shapes_without_values():
    """Under fake tensors, as memory estimators run a step, gradients of the right shapes come out."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = tensors()
        out = policy_function(PolicyLossSpec(), {"lora": True})(x)
        out.loss_sum.backward()
    assert x["weight"].grad.shape == (VOCAB, WIDTH) and x["lora_b"].grad.shape == (VOCAB, RANK)


@surrounded
def test_inference_mode(name):
    """Inside of it values come out; and log-probabilities from inside of it can be a training step's columns."""
    function, x = surrounded_case(name)
    expected = measure(function, x)
    with torch.inference_mode():
        actual = [value.clone() for value in function(x)]
        from_inside = {key: x[key].clone() for key in ("behaviour_logp", "ref_logp", "sampler_logp")}
    assert_same(actual, expected[0])
    assert_same(measure(function, {**x, **from_inside}), expected)
