"""Which version of the weights sampled each token of the requests in flight, also across updates in mid-response."""

from typing import NamedTuple


class Mark(NamedTuple):
    """From token `first` on `version` samples.

    `first` None: at the update the engine had no token of the request, either because none had been sampled or because all
    had. An answer that began after more than `num_resumes` resumes tells that it was the former.
    """

    version: int
    first: int | None
    num_resumes: int = 0


class Stamps:
    """The marks of the requests in flight, by our names of them."""

    def __init__(self) -> None:
        self._marks: dict[str, list[Mark]] = {}

    def begin(self, request_id: str, version: int) -> None:
        """A request is about to be sent to an engine that samples with `version`."""
        self._marks[request_id] = [Mark(version, 0)]

    def switch(
        self, tokens_before: dict[str, int] | None, version: int, num_resumes: int, forgets_preempted: bool = False
    ) -> None:
        """A paused engine, resumed `num_resumes` times so far, has taken new weights.

        `tokens_before` has the number of tokens sampled so far of each request that the engine has begun, by its name of
        it. Where the engine cannot tell (None) the requests in flight keep the older stamp, which can only overstate their
        staleness, and never beyond that of the request's issue. So do those that are absent where it `forgets_preempted`:
        they may have sampled tokens.
        """
        if tokens_before is None:
            return
        counts = {our_name(theirs): count for theirs, count in tokens_before.items()}
        for request_id, marks in self._marks.items():
            if request_id in counts or not forgets_preempted:
                marks.append(Mark(version, counts.get(request_id), num_resumes))

    def end(self, request_id: str) -> list[Mark]:
        """Forget a request; returns its marks."""
        return self._marks.pop(request_id)


def our_name(theirs: str) -> str:
    """vLLM names a request "generate-tokens-<ours>-<random>"."""
    return theirs.removeprefix("generate-tokens-").rpartition("-")[0]


def stamp_versions(marks: list[Mark], num_tokens: int, num_resumes: int) -> list[int]:
    """The version of each of a response's tokens, whose answer began when the server had been resumed `num_resumes` times."""
    versions = [marks[0].version] * num_tokens
    for version, first, resumes_before in marks[1:]:
        if first is None:
            if num_resumes <= resumes_before:
                continue
            first = 0
        versions[first:] = [version] * max(0, num_tokens - first)
    return versions
