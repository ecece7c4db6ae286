"""The Triton row kernels in Triton's interpreter, against float64 torch: every option, tile shape and way to alias."""

import math
import os
import subprocess
import sys

import pytest
import torch
from fastreason_kernels.partials import finish, merge
from fastreason_kernels.row_kernels import launch
from fastreason_kernels.testing import assert_no_worse
from fastreason_kernels.transform import Transform
from torch import Tensor

# -inf and -1e30 pass through NumPy in the branches that a select drops.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
INF = math.inf
# One column; far below, around and above a power of two; several blocks of 1024 to 4096 with a ragged last one.
COLUMNS = [1, 7, 127, 128, 129, 5003]
ROWS = 5
PLAIN, CAPPED = Transform(), Transform(scale=0.7, softcap=5.0)
OPTIONS = {"plain": (PLAIN, False), "temperature": (PLAIN, True), "capped": (CAPPED, True)}

INTERPRETED: dict[str, object] = {}


def of_triton(name: str) -> bool:
    return name.partition(".")[0] == "triton" and not name.startswith("triton._C")


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """A second copy of triton and of the kernels, decorated for the interpreter, whatever imported triton before.

    Whether a kernel is interpreted is decided where it is decorated, triton's own library functions included.
    """
    ours = {"fastreason_kernels.tiles", "fastreason_kernels.row_kernels.kernels"}
    compiled = {name: sys.modules.pop(name) for name in list(sys.modules) if of_triton(name) or name in ours}
    sys.modules.update(INTERPRETED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        launch.kernel_module()
        yield
    for name in [name for name in sys.modules if of_triton(name) or name in ours]:
        # Kept under another name: dropped modules would make the C++ extension complain of leaks at exit.
        INTERPRETED[name] = sys.modules[f"interpreted {name}"] = sys.modules.pop(name)
    sys.modules.update(compiled)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Whatever is read before it is written shows as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def logits_of(columns, dtype=FP32, *, rows=ROWS, shift=0.0, removed=False, seed=0, pad=3) -> Tensor:
    """[R, C] of standard deviation 3 inside a wider buffer, whose other columns are NaN; row 1 may lose every column."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((rows, columns + pad), math.nan, dtype=dtype)
    logits = buffer[:, :columns]
    logits.copy_(torch.randn(rows, columns, generator=generator) * 3 + shift)
    if removed:
        logits[:, 1::3] = -INF
    return logits


def rows_of(*, seed=1, rows=ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Two coefficients and a temperature for each row."""
    generator = torch.Generator().manual_seed(seed)
    g_logp, g_entropy = torch.randn(2, rows, generator=generator)
    return g_logp, g_entropy, torch.rand(rows, generator=generator) + 0.5


def ids_of(columns: int, rows=ROWS) -> Tensor:
    """The first and last column, one inside, and one on each side of the tile."""
    return torch.tensor([0, columns - 1, -1, columns, columns // 2] * (rows // ROWS))


def z_of(raw: Tensor, transform: Transform, temperature: Tensor | None) -> Tensor:
    """Logits after transform and temperature in raw's dtype; -1e30 for a removed column, so that autograd is finite."""
    z = transform.apply(raw).masked_fill(raw == -INF, -1e30)
    return z if temperature is None else z / temperature[:, None].to(raw.dtype)


def statistics(z: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """logp, entropy, lse of whole rows in plain torch, differentiable; logp of an id outside is that of no column."""
    log_probs = torch.log_softmax(z, -1)
    inside = (ids >= 0) & (ids < z.shape[1])
    logp = log_probs.gather(1, ids.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    # Only its gradient matters: d logp / d z is -p, as for a target in another tile of a row that this one dominates.
    logp = torch.where(inside, logp, -torch.logsumexp(z, -1))
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return {"logp": logp, "entropy": entropy, "lse": torch.logsumexp(z, -1)}


def parts(z: Tensor, ids: Tensor) -> Tensor:
    """[R, 4] in plain torch."""
    m = z.max(-1, keepdim=True).values
    e = (z - m).exp()
    inside = (ids >= 0) & (ids < z.shape[1])
    target = z.gather(1, ids.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1).masked_fill(~inside, -INF)
    target = target.masked_fill(target <= -1e29, -INF)
    return torch.stack([m.squeeze(1), e.sum(-1), target, (e * (z - m)).sum(-1)], 1)


def check_parts(name: str, actual: Tensor, raw: Tensor, ids: Tensor, transform=PLAIN, temperature=None) -> None:
    eager = parts(z_of(raw.float(), transform, temperature), ids)
    exact = parts(z_of(raw.double(), transform, temperature), ids)
    assert torch.equal(actual[:, 2].isinf(), exact[:, 2].isinf()), name
    for i, field in enumerate(("max", "sum", "target", "weighted")):
        columns = (
            x[:, i].masked_fill(exact[:, 2].isinf() if i == 2 else exact[:, i].isinf(), 0)
            for x in (actual, eager, exact)
        )
        assert_no_worse(f"{name} {field}", *columns, dtype=FP32)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_partials(columns, option, dtype):
    transform, has_temperature = OPTIONS[option]
    temperature = rows_of()[2] if has_temperature else None
    for shift in (0.0, -40.0):
        raw, ids = logits_of(columns, dtype, shift=shift), ids_of(columns)
        actual = launch.partials(raw, ids, temperature, transform)
        check_parts(f"shift {shift}", actual, raw, ids, transform, temperature)
        z = [z_of(raw.to(dtype), transform, temperature) for dtype in (FP32, FP64)]
        eager, exact = (statistics(z, ids) for z in z)
        for name, value in zip(("logp", "entropy", "lse"), finish(actual), strict=True):
            here = (ids >= 0) & (ids < columns) if name == "logp" else slice(None)
            assert_no_worse(name, value[here], eager[name][here], exact[name][here], dtype=FP32)


@pytest.mark.parametrize("transform", [PLAIN, CAPPED])
def test_removed_columns_add_nothing(transform):
    raw = logits_of(5003, removed=True)
    raw[1] = -INF
    ids = torch.tensor([1, 0, -1, 5003, 3])
    actual = launch.partials(raw, ids, None, transform)
    assert actual[0, 2] == -INF
    assert actual[1].tolist() == [-INF, 0, -INF, 0]
    rest = torch.tensor([0, 2, 3, 4])
    check_parts("removed", actual[rest], raw[rest], ids[rest], transform)
    kept = (raw[0] > -INF).nonzero().squeeze(1)
    dense = launch.partials(raw[rest][:, kept], torch.full((4,), -1), None, transform)
    assert torch.allclose(actual[rest][:, [0, 1, 3]], dense[:, [0, 1, 3]], rtol=1e-6)


def test_nan_comes_through():
    raw = logits_of(300)
    raw[2, 7] = math.nan
    assert launch.partials(raw, ids_of(300), None)[:, 1].isnan().tolist() == [False, False, True, False, False]


def joined(*parts):
    return merge(torch.stack(parts))


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_merge_of_tiles_is_the_whole(dtype):
    raw, ids, temperature = logits_of(5003), torch.tensor([0, 2999, 3000, 5002, 4000]), rows_of()[2]
    raw[3, :3000] = -INF
    cut = [launch.partials(raw[:, a:b], ids - a, temperature).to(dtype) for a, b in ((0, 3000), (3000, 5003))]
    empty = torch.tensor([[-INF, 0, -INF, 0]] * ROWS, dtype=dtype)
    for merged in (joined(*cut), joined(*reversed(cut)), joined(cut[0], empty, cut[1])):
        assert merged.dtype == dtype
        check_parts("merged", merged, raw, ids, temperature=temperature)
    assert torch.equal(joined(empty, empty), empty)
    exact = parts(z_of(raw.double(), PLAIN, None), ids)
    halves = (
        parts(z_of(half.double(), PLAIN, None), ids - a) for a, half in ((0, raw[:, :3000]), (3000, raw[:, 3000:]))
    )
    left, right = halves
    left[3] = torch.tensor([-INF, 0, -INF, 0])
    assert torch.allclose(joined(left, right), exact, rtol=1e-12)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype as the interpreter converts it: it cuts a bf16 off, where a GPU rounds to the nearest."""
    return x if dtype == FP32 else (x.view(torch.int32) & -65536).view(FP32).to(BF16)


def own(raw: Tensor, dtype) -> Tensor:
    return torch.empty(raw.shape[0], raw.shape[1] + 5, dtype=dtype)[:, : raw.shape[1]]


# Where the gradient goes: memory of its own in either dtype, the logits themselves, or bf16 in their fp32 rows.
PLACES = {
    "own fp32": (FP32, lambda raw: own(raw, FP32)),
    "own bf16": (FP32, lambda raw: own(raw, BF16)),
    "bf16 to own bf16": (BF16, lambda raw: own(raw, BF16)),
    "fp32 in place": (FP32, lambda raw: raw),
    "bf16 in place": (BF16, lambda raw: raw),
    "bf16 over fp32": (FP32, launch.gradient_view),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("columns", [1, 129, 9001])
@pytest.mark.parametrize("has_entropy", [False, True])
def test_dlogits(columns, option, place, has_entropy):
    (transform, has_temperature), (dtype, put) = OPTIONS[option], PLACES[place]
    raw, ids = (
        logits_of(columns, dtype, shift=-40.0 if option == "plain" else 0.0, removed=columns == 129),
        ids_of(columns),
    )
    g_logp, g_entropy, temperature = rows_of()
    temperature = temperature if has_temperature else None
    # Nine tenths of the last row's mass at its target.
    raw[4, columns // 2] = raw[4].max() + math.log(9 * columns)

    def gradient(wide: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        leaf = raw.to(wide, copy=True).requires_grad_()
        s = statistics(z_of(leaf, transform, temperature), ids)
        objective = (g_logp * s["logp"]).sum() + (g_entropy * s["entropy"]).sum() * has_entropy
        return torch.autograd.grad(objective, leaf)[0], s

    (exact, s), (eager, _) = gradient(FP64), gradient(FP32)
    exact, eager = (torch.where(raw == -INF, 0, g) for g in (exact, eager))
    lse, entropy = s["lse"].detach().float(), s["entropy"].detach().float()
    out = put(raw)
    launch.dlogits(raw, out, ids, temperature, transform, lse, entropy, g_logp, g_entropy if has_entropy else None)
    assert_no_worse("dlogits", out, rounded(eager, out.dtype), exact, dtype=out.dtype)


def test_first_half_of_a_row_holds_its_gradient():
    """Everything else of the buffer keeps its bits, and the view is what its name says."""
    buffer = torch.full((3, 9016), 7.0)
    raw = buffer[:, :9001]
    raw.copy_(logits_of(9001, rows=3))
    before, out = buffer.clone(), launch.gradient_view(raw)
    assert [out[r].data_ptr() for r in range(3)] == [raw[r].data_ptr() for r in range(3)]
    lse = torch.logsumexp(raw, 1)
    reference = torch.empty(3, 9001, dtype=BF16)
    arguments = (torch.tensor([0, 5, 9000]), None, PLAIN, lse, None, torch.tensor([1.0, 0.0, -2.0]), None)
    launch.dlogits(raw.clone(), reference, *arguments)
    launch.dlogits(raw, out, *arguments)
    assert torch.equal(out, reference)
    assert torch.equal(buffer[:, 4501:], before[:, 4501:])
    assert torch.equal(buffer.view(BF16)[:, 9001], before.view(BF16)[:, 9001])


def test_rows_without_gradient_are_zeros_and_not_read():
    raw = logits_of(4500)
    raw[1], raw[3] = math.nan, math.nan
    g_logp = torch.tensor([1.0, 0.0, 0.0, -0.0, 2.0])
    g_entropy = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    lse, entropy = torch.logsumexp(raw, 1), torch.ones(ROWS)
    launch.dlogits(raw, raw, ids_of(4500), None, PLAIN, lse, entropy, g_logp, g_entropy)
    assert (raw == 0).all(1).tolist() == [False, True, False, True, False]
    assert not raw.isnan().any()


def test_one_minus_p_of_a_sure_token():
    """1 - p = 1e-6: to six digits from an exact logp; from the kernel's, and from lse, as far as their fp32 reaches."""
    for shift in (0.0, 30.0):
        raw = torch.full((1, 1000), math.log(1e-6 / 999)) + shift
        raw[0, 3] = shift
        z = raw.double()
        exact = 1 - torch.softmax(z, 1)[0, 3].item()
        ids, exact_logp = torch.tensor([3]), torch.log_softmax(z, 1)[:, 3].float()
        logp, _, lse = finish(launch.partials(raw, ids, None))
        for given, tolerance in ((exact_logp, 2e-12), (logp, 1.2e-7), (None, 1.2e-7 if shift == 0 else 2e-6)):
            out = torch.empty_like(raw)
            launch.dlogits(raw, out, ids, None, PLAIN, lse, None, torch.ones(1), None, logp=given)
            assert out[0, 3].item() == pytest.approx(exact, abs=tolerance)


def divergence(kind: str, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """[R] in plain torch from log-probabilities; differentiable."""

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return (a * (log_a - log_b)).sum(-1)

    p, q = log_p.exp(), log_q.exp()
    if kind == "reverse":
        return kl(p, log_p, log_q)
    if kind == "forward":
        return kl(q, log_q, log_p)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * kl(q, log_q, log_m) + (1 - beta) * kl(p, log_p, log_m)


class Pair:
    """Student and teacher rows with every option of `OPTIONS`, and their divergence in plain torch."""

    def __init__(self, columns, dtype, option, *, near=False):
        transform, has_temperature = OPTIONS[option]
        shift = 0.0 if near else -40.0
        self.student = logits_of(columns, dtype, shift=shift)
        noise = logits_of(columns, FP32, seed=9, shift=shift)
        self.teacher = logits_of(columns, dtype, pad=8)
        self.teacher.copy_(self.student.float() + 1e-4 * noise if near else noise)
        self.weight, _, hot = rows_of(seed=3)
        self.sides = {"student_transform": transform, "teacher_transform": transform}
        if has_temperature:
            self.sides |= {"student_temperature": hot, "teacher_temperature": hot.flip(0).contiguous()}
            self.sides["teacher_transform"] = PLAIN

    def lse(self) -> tuple[Tensor, Tensor]:
        """As the kernels make them for whole rows."""
        parts = (
            launch.partials(
                raw, ids_of(raw.shape[1]), self.sides.get(f"{side}_temperature"), self.sides[f"{side}_transform"]
            )
            for side, raw in (("student", self.student), ("teacher", self.teacher))
        )
        return tuple(finish(part)[2] for part in parts)

    def reference(self, dtype: torch.dtype, kind: str, beta: float) -> tuple[Tensor, Tensor]:
        """Values [R] and the gradient of sum(weight * value) with respect to the student's raw logits."""
        leaf = self.student.to(dtype, copy=True).requires_grad_()
        log_p, log_q = (
            torch.log_softmax(z_of(x, self.sides[f"{side}_transform"], self.sides.get(f"{side}_temperature")), -1)
            for side, x in (("student", leaf), ("teacher", self.teacher.to(dtype)))
        )
        value = divergence(kind, log_p, log_q, beta)
        return value.detach(), torch.autograd.grad((self.weight * value).sum(), leaf)[0]

    def check(self, name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
        """The rule, with the room that fp32 needs for two lse's near -60: half an ulp of each goes into every p and q."""
        atol = (2e-5 if actual.dtype == FP32 else 4e-3) * float(exact.abs().max()) + 1e-9
        assert_no_worse(name, actual, rounded(eager, actual.dtype), exact, dtype=actual.dtype, atol=atol)


@pytest.mark.parametrize("kind", launch.KINDS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("columns", "dtype"), [(1, FP32), (7, BF16), (129, FP32), (5003, BF16)])
def test_divergence(columns, dtype, option, kind):
    pair = Pair(columns, dtype, option)
    options, lse = {"kind": kind, "beta": 0.3, **pair.sides}, pair.lse()
    exact, eager = (pair.reference(wide, kind, 0.3) for wide in (FP64, FP32))
    sums = launch.divergence_partials(pair.student, pair.teacher, *lse, **options)
    pair.check("value", sums[:, 0], eager[0], exact[0])
    # Three blocks in place; elsewhere also into memory of its own, and the sums from two tiles.
    outs = [launch.gradient_view(pair.student)]
    if columns < 1000:
        outs = [own(pair.student, FP32), own(pair.student, BF16), *outs]
        cut = columns // 3
        tiles = [(pair.student[:, part], pair.teacher[:, part]) for part in (slice(0, cut), slice(cut, columns))]
        total = sum(launch.divergence_partials(*tile, *lse, **options) for tile in tiles)
        assert torch.allclose(total, sums, rtol=1e-5, atol=1e-6)
    for out in outs:
        launch.divergence_dlogits(
            pair.student, pair.teacher, out, *lse, pair.weight, sums[:, 1].contiguous(), **options
        )
        pair.check(f"gradient {out.dtype}", out, eager[1], exact[1])


@pytest.mark.parametrize("kind", launch.KINDS)
def test_divergence_of_nearly_equal_rows(kind):
    """At 1e-8 nats the textbook sum in fp32 is wrong by more than the value itself; here five digits stand."""
    pair = Pair(5003, FP32, "plain", near=True)
    (exact, d_exact), (textbook, d_textbook) = (pair.reference(dtype, kind, 0.5) for dtype in (FP64, FP32))
    assert exact.max() < 1e-6 and ((textbook - exact).abs() > exact).any()
    sums = launch.divergence_partials(pair.student, pair.teacher, *pair.lse(), kind=kind)
    assert torch.allclose(sums[:, 0].double(), exact, rtol=1e-5, atol=0)
    out = own(pair.student, FP32)
    centre = sums[:, 1].contiguous()
    launch.divergence_dlogits(pair.student, pair.teacher, out, *pair.lse(), pair.weight, centre, kind=kind)
    limit = 3e-6 * d_exact.abs().max()
    assert (out - d_exact).abs().max() < limit < (d_textbook - d_exact).abs().max()
    same = launch.divergence_partials(pair.student, pair.student, pair.lse()[0], pair.lse()[0], kind=kind)
    assert (same[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("kind", "beta"), [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.02), ("jsd", 0.5), ("jsd", 0.98)]
)
def test_no_term_of_a_divergence_is_negative(kind, beta):
    """Each column alone as a tile: ratios from 1 over 1 + 1e-7 to 1e30, around every switch between formulas."""
    r = torch.tensor([1e-7, 1e-5, 1e-3, 0.03, 0.3, 0.49, 0.51, 0.7, 0.9, 1.1, 1.7, 5, 20, 60])
    r = torch.cat([r, -r])[:, None]
    for log_p in (-1e-3, -3.0, -20.0):
        student = torch.full_like(r, log_p)
        teacher = student + r
        zero = torch.zeros(len(r))
        value = launch.divergence_partials(student, teacher, zero, zero, kind=kind, beta=beta)[:, 0].double()
        assert (value >= 0).all()
        log_p64, log_q64 = student.double(), teacher.double()
        p, q = log_p64.exp(), log_q64.exp()
        extra = {"reverse": q - p, "forward": p - q, "jsd": 0 * p}[kind].squeeze(1)
        exact = divergence(kind, log_p64, log_q64, beta) + extra
        # Relative to itself, where float64's own cancellation leaves it a value: exp of -60 in fp32 keeps five digits.
        clear = (r.abs() > 1e-4).squeeze(1)
        assert torch.allclose(value[clear], exact[clear], rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", launch.KINDS)
def test_removed_columns_of_either_side(kind):
    """Where p is removed its log q stays finite and the reverse KL exact; a mass that the other side lacks is infinite."""
    raw, other = logits_of(300), logits_of(300, seed=5)
    raw[0, 5:9] = -INF  # p alone
    other[1, 50:60] = -INF  # q alone
    raw[2, 7:90], other[2, 7:90] = -INF, -INF  # both
    lse = torch.logsumexp(raw, 1), torch.logsumexp(other, 1)
    sums = launch.divergence_partials(raw, other, *lse, kind=kind)
    finite = {"reverse": [0, 2, 3, 4], "forward": [1, 2, 3, 4], "jsd": [0, 1, 2, 3, 4]}[kind]
    assert sums[:, 0].isfinite().nonzero().squeeze(1).tolist() == finite
    assert all(sums[r, 0] == INF for r in range(ROWS) if r not in finite)

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = raw.to(dtype, copy=True).requires_grad_()
        log_p, log_q = (torch.log_softmax(x.masked_fill(x == -INF, -1e4), -1) for x in (leaf, other.to(dtype)))
        value = divergence(kind, log_p, log_q, 0.5)
        return value.detach()[finite], torch.autograd.grad(value[finite].sum(), leaf)[0]

    exact, eager = reference(FP64), reference(FP32)
    assert_no_worse("value", sums[finite, 0], eager[0], exact[0], dtype=FP32)
    out = torch.empty_like(raw)
    weight = torch.zeros(ROWS).index_fill_(0, torch.tensor(finite), 1.0)
    launch.divergence_dlogits(raw, other, out, *lse, weight, sums[:, 1].contiguous(), kind=kind)
    assert_no_worse("gradient", out, eager[1], exact[1], dtype=FP32)
    assert (out[[r for r in range(ROWS) if r not in finite]] == 0).all()


def test_divergence_rows_of_weight_zero_are_not_read():
    raw, other = logits_of(3000), logits_of(3000, seed=5)
    lse = torch.logsumexp(raw, 1), torch.logsumexp(other, 1)
    raw[1], other[1] = math.nan, math.nan
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    launch.divergence_dlogits(raw, other, raw, *lse, weight, torch.zeros(ROWS), kind="forward")
    assert (raw == 0).all(1).tolist() == [False, True, False, False, False] and not raw.isnan().any()


def test_refusals():
    raw, ids, row = logits_of(20), ids_of(20), torch.zeros(ROWS)

    def grad(logits=raw, out=raw, entropy=row, g_entropy=row):
        launch.dlogits(logits, out, ids, None, PLAIN, row, entropy, row, g_entropy)

    buffer = torch.zeros(ROWS + 1, 20)
    for fault, call in {
        "ids: ": lambda: launch.partials(raw, ids.int(), None),
        "temperature: ": lambda: launch.partials(raw, ids, row[:3]),
        "logits: torch.float64": lambda: launch.partials(raw.double(), ids, None),
        "logits: strides": lambda: launch.partials(torch.zeros(20, ROWS).T, ids, None),
        "entropy: got None": lambda: grad(entropy=None),
        # One row later; one column later; fp32 over bf16; bf16 rows packed at the front.
        "overlaps logits": lambda: grad(buffer[:ROWS], buffer[1:]),
        "out: torch.float32.*overlaps": lambda: grad(raw[:, :10], raw[:, 1:11]),
        "out: torch.bfloat16.*overlaps": lambda: grad(
            buffer[:ROWS], buffer.view(-1).view(BF16)[: ROWS * 20].view(ROWS, 20)
        ),
        "out: torch.float32.*overlaps logits .torch.bfloat16": lambda: launch.dlogits(
            buffer.view(BF16)[:1, :20], buffer[:1], ids[:1], None, PLAIN, row[:1], None, row[:1], None
        ),
        "kind: got 'kl'": lambda: launch.divergence_partials(raw, raw, row, row, kind="kl"),
        "beta: got 1": lambda: launch.divergence_partials(raw, raw, row, row, kind="jsd", beta=1),
        "teacher: ": lambda: launch.divergence_partials(raw, raw[:, 1:], row, row, kind="jsd"),
        "overlaps teacher": lambda: launch.divergence_dlogits(
            raw, buffer[:ROWS], buffer[:ROWS], row, row, row, row, kind="jsd"
        ),
        "scale: got 0": lambda: Transform(scale=0),
        "softcap: got -1": lambda: Transform(softcap=-1),
    }.items():
        with pytest.raises(ValueError, match=fault):
            call()
    grad(raw[:1].repeat(ROWS, 1), logits_of(20))


def test_the_package_imports_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import fastreason_kernels.aot, fastreason_kernels.partials, fastreason_kernels.row_kernels.launch"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=400, env=environment)
