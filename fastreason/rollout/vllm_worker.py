"""What runs inside vLLM's worker: loading published weights into a live engine and proving that they arrived.

vLLM mixes this class, or `vllm_adapter.AdapterWorker`, into its worker (`--worker-extension-cls`) and calls it by name through
`collective_rpc`. It needs the worker's `model_runner`, and for a description `model_config` and `vllm_config`.
"""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fastreason.exchange import Digest, SumDigest, compare_held, published_file, read_weights
from fastreason.rollout.identity import describe_server

if TYPE_CHECKING:
    import torch


class WeightWorker:
    """Mixed into vLLM's worker; `model_runner`, `model_config` and `vllm_config` are the worker's."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    # Checksum of the weights loaded last, None for those of the start, else what is amiss.
    fastreason_held: str | None = None
    fastreason_watching: "Watch | None" = None
    fastreason_ahead: "tuple[str, Future[tuple[dict[str, torch.Tensor], Digest]]] | None" = None

    def fastreason_beat(self) -> dict[str, Any]:
        """A sign of life from the engine's innermost process, and which weights it holds."""
        return {"checksum": self.fastreason_held}

    def fastreason_describe(self, probe: str) -> dict[str, Any]:
        """What this server serves, for a run elsewhere that is about to use it."""
        served = self.model_config
        dtype = str(served.dtype).removeprefix("torch.")
        lora = self.vllm_config.lora_config
        rank = lora.max_lora_rank if lora is not None else None
        return describe_server(served.model, served.tokenizer, served.max_model_len, dtype, probe, rank)

    def fastreason_prepare(self, path: str, checksum: str) -> dict[str, Any]:
        """Begin to read and check an exchange file while generation goes on; `fastreason_load` takes the result."""
        reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self.fastreason_ahead = (path, reader.submit(read_published, path, checksum))
        reader.shutdown(wait=False)
        return {}

    def fastreason_load(self, path: str, checksum: str) -> dict[str, Any]:
        """Load an exchange file into the running model; the engine must be paused.

        Returns the digest of what was handed to the model, the number of tensors, the bytes verified in place, the
        seconds (in all, and of the engine's own reload), and for every unfinished request how many tokens it had sampled
        with the former weights, None where that cannot be known, and whether one that is not among them may have some all
        the same. Raises ValueError if the file is outside the exchange
        folder, or if anything held differs from what was sent.
        """
        started = time.perf_counter()
        ahead, self.fastreason_ahead = self.fastreason_ahead, None
        sent, digest = ahead[1].result() if ahead and ahead[0] == path else read_published(path, checksum)
        tokens_before, forgets = count_tokens(self.model_runner), forgets_preempted(self.model_runner)
        self.fastreason_held = "being loaded"
        reloading = time.perf_counter()
        self._fastreason_take(path, sent)
        reload_s = time.perf_counter() - reloading
        held_bytes, different = self._fastreason_compare(path, sent)
        if different:
            raise ValueError(f"after loading, the engine holds other values than were sent in: {different[:5]}")
        self.fastreason_held = digest.hexdigest()
        return {
            "checksum": digest.hexdigest(),
            "num_tensors": digest.num_tensors,
            "held_bytes": held_bytes,
            "load_s": time.perf_counter() - started,
            "reload_s": reload_s,
            "tokens_before": tokens_before,
            "forgets_preempted": forgets,
        }

    def _fastreason_take(self, path: str, sent: "dict[str, torch.Tensor]") -> None:
        """Put what was read from an exchange file in the place of what the model has."""
        self.model_runner.reload_weights(weights_iterator=iter(sent.items()))
        repack_embeddings(self.model_runner.get_model())

    def _fastreason_compare(self, path: str, sent: "dict[str, torch.Tensor]") -> tuple[int, list[str]]:
        """The bytes of what was sent that lie in the model as they were sent, and the names of those that do not."""
        model = self.model_runner.get_model()
        return compare_held(model.named_parameters(), sent, getattr(model, "packed_modules_mapping", {}))

    def _fastreason_take_first(self) -> None:
        """Put back what the server started with: here the model's own files."""
        self.model_runner.reload_weights()
        repack_embeddings(self.model_runner.get_model())

    def fastreason_watch(self) -> dict[str, Any]:
        """From here on take the digest of whatever the model is handed, by whom ever; the engine must be paused."""
        self.fastreason_watching = Watch(self.model_runner)
        self.fastreason_held = "being loaded"
        return {}

    def fastreason_watched(self) -> dict[str, Any]:
        """The report of `fastreason_load` on what the model was handed since `fastreason_watch`."""
        assert self.fastreason_watching is not None, "nothing was being watched"
        report = self.fastreason_watching.end()
        self.fastreason_watching, self.fastreason_held = None, report["checksum"]
        return report

    def fastreason_give_up(self) -> dict[str, Any]:
        """Note that the weights are about to be lost: the engine falls asleep without keeping them."""
        self.fastreason_held = "given up"
        return {}

    def fastreason_restore(self) -> dict[str, Any]:
        """Load what it started with again, whatever has been loaded since; the engine must be paused."""
        self.fastreason_held = "being loaded"
        self._fastreason_take_first()
        self.fastreason_held = None
        return {}


class Watch:
    """Stands before a model's `load_weights` and adds what comes by to a digest of sums, which stays on the GPU."""

    def __init__(self, runner: Any) -> None:
        self._model, self._digest, self._started = runner.get_model(), SumDigest(), time.perf_counter()
        self._tokens_before, self._forgets = count_tokens(runner), forgets_preempted(runner)
        load = self._model.load_weights
        self._model.load_weights = lambda weights: load(self._pass(weights))

    def _pass(self, weights: "Iterable[tuple[str, torch.Tensor]]") -> "Iterator[tuple[str, torch.Tensor]]":
        for name, tensor in weights:
            self._digest.add(name, tensor)
            yield name, tensor

    def end(self) -> dict[str, Any]:
        del self._model.load_weights
        return {
            "checksum": self._digest.hexdigest(),
            "num_tensors": self._digest.num_tensors,
            "held_bytes": 0,
            "load_s": time.perf_counter() - self._started,
            "tokens_before": self._tokens_before,
            "forgets_preempted": self._forgets,
        }


def read_published(path: str, checksum: str) -> "tuple[dict[str, torch.Tensor], Digest]":
    """The tensors of an exchange file and their digest; raises ValueError where it is not `checksum`."""
    digest = Digest()
    sent = dict(read_weights(published_file(path), digest))
    if digest.hexdigest() != checksum:
        raise ValueError(f"checksum of {path} is {digest.hexdigest()}, sent was {checksum}: the file changed")
    return sent, digest


def count_tokens(runner: Any) -> dict[str, int] | None:
    """How many tokens each unfinished request has sampled, by the engine's name of the request.

    vLLM has two model runners, which keep this in different places; None for one that is neither.
    """
    if hasattr(runner, "requests"):
        return {name: len(state.output_token_ids) for name, state in runner.requests.items()}
    if hasattr(runner, "req_states"):
        states = runner.req_states
        total = states.total_len.gpu.tolist()
        return {name: total[i] - int(states.prompt_len.np[i]) for name, i in states.req_id_to_index.items()}
    return None


def forgets_preempted(runner: Any) -> bool:
    """Whether requests that were preempted, for lack of room, are missing from `count_tokens` until they go on.

    The runner with `requests` keeps them; the other one drops their state, and then they look like those that wait for their
    first token.
    """
    return not hasattr(runner, "requests")


def repack_embeddings(model: Any) -> None:
    """Make the packed copies of embeddings and heads anew from their weights.

    On a CPU vLLM multiplies by a copy that it packed at start-up, and `reload_weights` packs again only where a weight of
    that very module was loaded. A tied head has none of its own: it would go on with the weights of the start.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
            module.quant_method.process_weights_after_loading(module)
