r"""What the graded responses to a benchmark say of a model. Pure: numbers in, numbers out.

With n responses to each of M problems, c_i of them right:

    pass@1  = mean_i c_i / n
    SEM     = std_j(s_j) / sqrt(n),  s_j = mean_i [response j to problem i is right]     (REDI, arXiv 2505.24850)
    pass@k  = mean_i 1 - C(n - c_i, k) / C(n, k)                                         (arXiv 2107.03374, unbiased)
    capability@k = mean_i 1 - (1 - c_i / n)^k                                            (arXiv 2505.14216)
    maj@k   = mean_i P(k responses drawn without replacement have the right answer as their most frequent one)

The SEM says how far the score would be off with other seeds on the same problems; the bootstrap interval, over problems,
how far with other problems. `std` has Bessel's correction.
"""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastreason.evaluation.rows import RIGHT, Classes, EvalSample, answer_class, grouped

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """The scores of one model on one benchmark; of what was not measured, None.

    `pass_at_1_formatted` counts a right response only if it ends properly with a marked answer, `pass_at_1_strict` as the
    stricter scorer does. `interval` and `pass_at_k_interval` are bootstrap intervals (95 %) over problems. Lengths are in
    tokens; `tokens_per_right` is all tokens over the number of right responses. `num_disagreements` counts responses on which
    the two scorers differ, `errors` those without a proper verdict, by reason.
    """

    n: int
    num_problems: int
    num_samples: int
    num_right: int
    pass_at_1: float
    sem: float | None
    interval: tuple[float, float]
    pass_at_1_formatted: float
    pass_at_1_strict: float | None
    pass_at_k: dict[int, float]
    pass_at_k_interval: dict[int, tuple[float, float]]
    capability_at_k: dict[int, float]
    maj_at_k: dict[int, float]
    formatted_share: float
    truncated_share: float
    num_tokens: int
    tokens_mean: float
    tokens_right_mean: float | None
    tokens_wrong_mean: float | None
    tokens_per_right: float | None
    num_disagreements: int
    errors: dict[str, int]


def score(rows: Sequence[EvalSample], classes: Classes, n: int, ks: Sequence[int] | None = None) -> Scores:
    """Score responses 0 to n - 1 to each problem. `ks`: powers of two up to n, and n, unless others are asked for.

    Raises ValueError without problems, where a problem lacks one of the n responses, and for a k below 1 or above n.
    """
    by_problem = grouped(rows, n)
    short = next((id for id, given in by_problem.items() if [row.sample for row in given] != list(range(n))), None)
    if not by_problem or short is not None:
        raise ValueError(f"n={n}: problem {short!r} has not each of these responses" if short else "no problem")
    ks = list(ks) if ks is not None else powers_of_two(n)
    if not all(1 <= k <= n for k in ks):
        raise ValueError(f"k of pass@k must be in 1 to n={n}: {ks}")
    given = list(by_problem.values())
    right_PG = np.array([[row.correct for row in each] for each in given])
    counts_P = right_PG.sum(1)
    pass_PK = np.array([[pass_at_k(n, int(c), k) for k in ks] for c in counts_P])
    majority_PK = np.array([majority_at_k([answer_class(row, classes) for row in each], RIGHT, ks) for each in given])
    low_K, high_K = bootstrap(pass_PK)
    low, high = bootstrap(counts_P[:, None] / n)
    return Scores(
        n=n,
        num_problems=len(given),
        num_samples=int(right_PG.size),
        num_right=int(counts_P.sum()),
        pass_at_1=float(right_PG.mean()),
        sem=sample_index_sem(right_PG),
        interval=(float(low[0]), float(high[0])),
        pass_at_k=dict(zip(ks, pass_PK.mean(0).tolist(), strict=True)),
        pass_at_k_interval={k: (float(a), float(b)) for k, a, b in zip(ks, low_K, high_K, strict=True)},
        capability_at_k={k: float(np.mean(1 - (1 - counts_P / n) ** k)) for k in ks},
        maj_at_k=dict(zip(ks, majority_PK.mean(0).tolist(), strict=True)),
        **response_figures([row for each in given for row in each]),
    )


def response_figures(rows: Sequence[EvalSample]) -> dict[str, Any]:
    """The scores that look at each response alone: formats, ends, lengths, disagreements."""
    lengths = {verdict: [row.num_tokens for row in rows if row.correct is verdict] for verdict in (True, False)}
    strict = [row.strict for row in rows if row.strict is not None]
    num_tokens = sum(row.num_tokens for row in rows)
    return {
        "pass_at_1_formatted": statistics.fmean(row.correct and row.formatted for row in rows),
        "pass_at_1_strict": _mean(strict),
        "formatted_share": statistics.fmean(row.formatted for row in rows),
        "truncated_share": statistics.fmean(row.truncated for row in rows),
        "num_tokens": num_tokens,
        "tokens_mean": num_tokens / len(rows),
        "tokens_right_mean": _mean(lengths[True]),
        "tokens_wrong_mean": _mean(lengths[False]),
        "tokens_per_right": num_tokens / len(lengths[True]) if lengths[True] else None,
        "num_disagreements": sum(row.graders_differ for row in rows),
        "errors": dict(sorted(Counter(row.error for row in rows if row.error is not None).items())),
    }


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    return sorted({*(2**e for e in range(n.bit_length())), n})


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n responses, drawn without replacement, have one of the c right ones.

    Unbiased for the chance that k new responses have a right one (arXiv 2107.03374).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n: n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def sample_index_sem(right_PG: NDArray[Any]) -> float | None:
    """std_j(s_j) / sqrt(n) with s_j the share of problems whose response j is right; None for one response a problem.

    right_PG: [problems, n], bool. The standard deviation is the sample's (n - 1).
    """
    n = right_PG.shape[1]
    return float(right_PG.mean(0).std(ddof=1) / math.sqrt(n)) if n > 1 else None


def bootstrap(values_PK: NDArray[Any], seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Percentile interval of each column's mean over problems, which are drawn with replacement.

    values_PK: [problems, columns]. The same seed gives the same interval; one problem gives its value twice.
    """
    num = len(values_PK)
    generator, counts = np.random.default_rng(seed), np.full(num, 1 / num)
    weights_RP = generator.multinomial(num, counts, size=NUM_RESAMPLES) / num
    tail = (1 - CONFIDENCE) / 2
    low_K, high_K = np.quantile(weights_RP @ values_PK.astype(float), [tail, 1 - tail], axis=0)
    return low_K, high_K


def majority_at_k(votes: Sequence[Hashable | None], right: Hashable, ks: Sequence[int]) -> list[float]:
    r"""The chance that the most frequent answer of k of the votes, drawn without replacement, is `right`; for each k.

    None votes for nothing. Of several most frequent answers one is taken, each as likely as the others; where nothing is voted
    for, none. Exact: for every number m of right votes among the k,

        C(c, m) * sum_t [x^{k-m} y^t] prod_{other answers of size s} (sum_{i<m} C(s, i) x^i + C(s, m) x^m y) / (1 + t) / C(n, k)

    with c right votes, the empty ones a factor (1 + x)^{s}, and t the number of answers that tie.
    """
    n, sizes = len(votes), Counter(vote for vote in votes if vote is not None)
    num_right = sizes.pop(right, 0)
    num_empty = n - num_right - sum(sizes.values())
    top = max(ks)
    wins_K = np.zeros(top + 1)
    for m in range(1, min(num_right, top) + 1):
        others = _won_or_shared(list(sizes.values()), num_empty, m, top - m)
        wins_K[m:] += math.comb(num_right, m) * others
    return [float(wins_K[k] / math.comb(n, k)) for k in ks]


def _won_or_shared(sizes: Sequence[int], num_free: int, m: int, degree: int) -> NDArray[Any]:
    """[x^j] of the sum over t of the product above, for j = 0 to `degree`: ways to draw j others, a tie of t + 1 shared."""
    # An answer of fewer than m votes can be drawn freely, as those that vote for nothing.
    num_free += sum(size for size in sizes if size < m)
    rivals = [size for size in sizes if size >= m]
    most = min(len(rivals), degree // m)
    ways_TJ = np.zeros((most + 1, degree + 1))
    ways_TJ[0] = [math.comb(num_free, j) for j in range(degree + 1)]
    for size in rivals:
        drawn_TJ = np.zeros_like(ways_TJ)
        for i in range(min(m - 1, degree) + 1):
            drawn_TJ[:, i:] += math.comb(size, i) * ways_TJ[:, : degree + 1 - i]
        if m <= degree:
            drawn_TJ[1:, m:] += math.comb(size, m) * ways_TJ[:-1, : degree + 1 - m]
        ways_TJ = drawn_TJ
    return (ways_TJ / (1 + np.arange(most + 1))[:, None]).sum(0)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
