"""The data that moves between the parts of a run, and the names of tensor shapes. No heavy import.

`Prompt -> Sample -> Group -> Batch -> loss_sum`: a prompt is asked once and answered G times; the answers with their
rewards are a group; the trainer takes a batch of groups. All of it is plain data that goes over a socket as
MessagePack (never pickle).

Shape suffixes, used on every tensor name:

    P  prompts            G  samples per prompt      B  sequences
    T  tokens (packed)    D  hidden size             V  vocabulary

Whose probability it is goes first: `trainer_logp_T`, `sampler_logp_T`, `ref_logp_T`, `teacher_logp_T`. `logp` is a
natural logarithm in fp32.
"""

from typing import Any

import msgspec


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One problem: `text` is the bare problem, `answer` its gold answer where one is known.

    `id` is unique within its data source. `metadata` is JSON-able and travels to the reward functions (reasoning-gym
    keeps its whole entry there, so that its own scorer can be called).
    """

    id: str
    text: str
    answer: str | None = None
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)


class Grade(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one response: the combined `reward`, whether it counts as `correct`, and each part by name."""

    reward: float
    correct: bool
    parts: dict[str, float] = msgspec.field(default_factory=dict)
    timed_out: bool = False


class Sample(msgspec.Struct, kw_only=True):
    """One response. `token_ids`, `sampler_logp` and `token_versions` have one entry per generated token (EOS included).

    `sampler_logp` is the engine's log-probability of the token under the distribution that it sampled from (after
    temperature), `token_versions` the number of the weights that sampled it. `teacher_logp` is a teacher's server's
    log-probability of each token at temperature 1, where the run has such a teacher.
    """

    token_ids: list[int]
    sampler_logp: list[float]
    token_versions: list[int]
    text: str
    finish_reason: str
    grade: Grade | None = None
    teacher_logp: list[float] | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def reward(self) -> float:
        assert self.grade is not None, "the sample has not been graded"
        return self.grade.reward


class Group(msgspec.Struct, kw_only=True):
    """One prompt with its G responses.

    `ticket` numbers the groups of a run in the order in which they were issued; `version_issued` is the version of the
    weights at that moment, and so the oldest that can have sampled a token of it. `greedy_reward` is that of one more
    response, the likeliest token at each place, where the algorithm compares with it; of that response only its length in
    tokens and whether it was cut off are kept too.
    """

    ticket: int
    prompt: Prompt
    prompt_token_ids: list[int]
    samples: list[Sample]
    version_issued: int
    generate_s: float = 0.0
    grade_s: float = 0.0
    greedy_reward: float | None = None
    greedy_num_tokens: int | None = None
    greedy_truncated: bool = False

    @property
    def rewards_G(self) -> list[float]:
        return [sample.reward for sample in self.samples]

    @property
    def is_scored(self) -> bool:
        """Whether a teacher's server has scored every response."""
        return all(sample.teacher_logp is not None for sample in self.samples)

    @property
    def oldest_version(self) -> int:
        return min((v for s in self.samples for v in s.token_versions), default=self.version_issued)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine samples. `top_k = 0` means all tokens; `temperature = 0` the likeliest; `seed` makes it repeatable."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 16
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine returns for one sample of a request: token ids with their log-probabilities, and why it ended."""

    token_ids: list[int]
    logp: list[float]
    finish_reason: str
    token_versions: list[int]


class WeightUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """Weights ready to be loaded: a safetensors file, the version they make, and the checksum of every tensor."""

    path: str
    version: int
    checksum: str
    num_bytes: int


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says after it loaded weights: what it received, what it now holds, and how long each part took.

    `held_bytes` counts the bytes of those tensors that the engine keeps in their published layout and that were
    compared with the file one by one; the others (fused or repacked by the engine) are covered by `checksum`. `wake_s` is what
    it took to bring the memory back of an engine that slept.
    """

    version: int
    checksum: str
    num_tensors: int
    held_bytes: int
    pause_s: float = 0.0
    load_s: float = 0.0
    total_s: float = 0.0
    wake_s: float = 0.0


class EvalResult(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out accuracy: the mean of `num_samples` graded responses, with its standard error."""

    accuracy: float
    standard_error: float
    reward_mean: float
    num_samples: int
    num_prompts: int
    num_tokens: int
    truncated_share: float
    temperature: float
    wall_s: float
    version: int
