"""Which verified responses become training data, and what a job's responses say of the model. Pure: no file, no clock.

It sees verdicts, lengths and whether there is a text, never the text. Filters act in a fixed order and count what they drop,
so that the counts add up to what came in.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


class Judged(Protocol):
    """A response without its text: number, verdict, length, and whether it was refused, cut off, never judged, or is blank."""

    @property
    def sample(self) -> int: ...
    @property
    def correct(self) -> bool: ...
    @property
    def truncated(self) -> bool: ...
    @property
    def num_tokens(self) -> int | None: ...
    @property
    def num_chars(self) -> int: ...
    @property
    def empty(self) -> bool: ...
    @property
    def refused(self) -> bool: ...
    @property
    def timed_out(self) -> bool: ...


@dataclass
class Passage:
    """How many entered, how many each filter dropped, in the order in which they act, and how many are left."""

    num_in: int
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def num_out(self) -> int:
        return self.num_in - sum(self.dropped.values())

    def drop(self, name: str, num: int) -> None:
        """Count `num` more under `name`; a filter that dropped nothing is listed too."""
        self.dropped[name] = self.dropped.get(name, 0) + num

    def as_dict(self) -> dict[str, Any]:
        return {"in": self.num_in, "dropped": dict(self.dropped), "out": self.num_out}


# Which responses are neither right nor wrong, in the order in which they are left out.
UNUSABLE: dict[str, Callable[[Judged], bool]] = {
    "refused": lambda response: response.refused,
    "cut_off": lambda response: response.truncated,
    "empty": lambda response: response.empty,
    "timed_out": lambda response: response.timed_out,
}


@dataclass(frozen=True)
class Selection:
    """(id, response number) of the positives, (id, chosen, rejected) of the pairs, and what became of the rest."""

    positives: list[tuple[str, int]]
    pairs: list[tuple[str, int, int]]
    responses: Passage
    questions: Passage
    paired: Passage


def select(
    judged: Mapping[str, Sequence[Judged]],
    keep: int,
    order: Literal["first", "shortest"] = "first",
    truncated: Literal["drop", "keep"] = "drop",
) -> Selection:
    """At most `keep` right responses of each question, and a pair of its first right and its first wrong one.

    In the order of `judged`, one question after the other. "shortest": by tokens, or characters where tokens are not known of
    all, the earlier of two alike. The pair is of the first ones either way (arXiv 2505.24850); at most 8 are kept in
    arXiv 2505.14216. A response that one of `UNUSABLE` names is neither right nor wrong. Left out: removal of responses that
    are alike.
    """
    positives: list[tuple[str, int]] = []
    pairs: list[tuple[str, int, int]] = []
    responses = Passage(sum(map(len, judged.values())), dict.fromkeys((*UNUSABLE, "wrong", "beyond_keep"), 0))
    questions = Passage(len(judged), dict.fromkeys(("no_response", "no_right_response"), 0))
    paired = Passage(len(judged), dict.fromkeys(("no_right_response", "no_wrong_response"), 0))
    for id, given in judged.items():
        whole = sorted(given, key=lambda r: r.sample)
        for name, unusable in UNUSABLE.items():
            if name != "cut_off" or truncated == "drop":
                num = len(whole)
                whole = [response for response in whole if not unusable(response)]
                responses.drop(name, num - len(whole))
        right, wrong = [r for r in whole if r.correct], [r for r in whole if not r.correct]
        chosen = _shortest(right)[:keep] if order == "shortest" else right[:keep]
        positives += [(id, response.sample) for response in chosen]
        responses.drop("wrong", len(wrong))
        responses.drop("beyond_keep", len(right) - len(chosen))
        if not right:
            answered = not all(response.refused for response in given)
            questions.drop("no_right_response" if answered else "no_response", 1)
        if right and wrong:
            pairs.append((id, right[0].sample, wrong[0].sample))
        else:
            paired.drop("no_wrong_response" if right else "no_right_response", 1)
    return Selection(positives, pairs, responses, questions, paired)


def _shortest(responses: Sequence[Judged]) -> list[Judged]:
    counted = all(response.num_tokens is not None for response in responses)
    return sorted(responses, key=lambda r: (r.num_tokens if counted else r.num_chars, r.sample))


def accuracy_figures(judged: Mapping[str, Sequence[Judged]]) -> dict[str, Any]:
    """pass@1 = mean over questions of the share of right responses, and how far that may be off.

    `standard_error` is that of the questions' means, since responses to one question are not independent: their sample
    standard deviation over the root of their number; None for fewer than two. `solved_share` is the share of questions with a
    right response, `truncated_share` that of responses cut off. Lengths are in tokens, of the responses whose count is known;
    a figure that nothing was measured for is None. A question that was refused says nothing of the model; a
    response whose grading timed out counts as wrong, as in training.
    """
    responses = [[response for response in given if not response.refused] for given in judged.values()]
    answered = [given for given in responses if given]
    shares = [statistics.fmean(response.correct for response in given) for given in answered]
    given = [response for each in answered for response in each]
    lengths = {
        verdict: [r.num_tokens for r in given if r.correct is verdict and r.num_tokens is not None]
        for verdict in (True, False)
    }
    return {
        "pass_at_1": _mean(shares),
        "standard_error": statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None,
        "solved_share": _mean([any(response.correct for response in each) for each in answered]),
        "truncated_share": _mean([response.truncated for response in given]),
        "num_questions": len(answered),
        "num_responses": len(given),
        "num_tokens": sum(map(sum, lengths.values())),
        "tokens_right_mean": _mean(lengths[True]),
        "tokens_wrong_mean": _mean(lengths[False]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
