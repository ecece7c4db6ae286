"""What runs inside vLLM's worker: loading published weights into a live engine and proving that they arrived.

vLLM mixes this class into its worker (`--worker-extension-cls`) and calls it by name through `collective_rpc`. It needs
nothing of vLLM but the worker's `model_runner`, and so imports nothing of it.
"""

import os
import time
from pathlib import Path
from typing import Any

from fastreason.exchange import Digest, compare_held, read_weights

EXCHANGE_VARIABLE = "FASTREASON_EXCHANGE_DIR"


class WeightWorker:
    """Mixed into vLLM's worker; `model_runner` is the worker's."""

    model_runner: Any

    def fastreason_load(self, path: str, checksum: str) -> dict[str, Any]:
        """Load an exchange file into the running model; the engine must be paused.

        Returns the digest of what was handed to the model, the number of tensors, the bytes verified in place, the
        seconds, and for every unfinished request how many tokens it had sampled with the former weights.
        Raises ValueError if the file is outside the exchange folder, or if anything held differs from what was sent.
        """
        started = time.perf_counter()
        allowed = os.environ.get(EXCHANGE_VARIABLE, "")
        file = Path(path).resolve()
        if not allowed or not file.is_relative_to(Path(allowed).resolve()):
            raise ValueError(f"weights at {path!r} are outside the exchange folder {allowed!r}")
        digest = Digest()
        sent = dict(read_weights(file, digest))
        if digest.hexdigest() != checksum:
            raise ValueError(f"checksum of {path} is {digest.hexdigest()}, sent was {checksum}: the file changed")
        tokens_before = {
            request_id: len(state.output_token_ids) for request_id, state in self.model_runner.requests.items()
        }
        self.model_runner.reload_weights(weights_iterator=iter(sent.items()))
        model = self.model_runner.get_model()
        repack_embeddings(model)
        fused = getattr(model, "packed_modules_mapping", {})
        held_bytes, different = compare_held(model.named_parameters(), sent, fused)
        if different:
            raise ValueError(f"after loading, the engine holds other values than were sent in: {different[:5]}")
        return {
            "checksum": digest.hexdigest(),
            "num_tensors": digest.num_tensors,
            "held_bytes": held_bytes,
            "load_s": time.perf_counter() - started,
            "tokens_before": tokens_before,
        }


def repack_embeddings(model: Any) -> None:
    """Make the packed copies of embeddings and heads anew from their weights.

    On a CPU vLLM multiplies by a copy that it packed at start-up, and `reload_weights` packs again only where a weight of
    that very module was loaded. A tied head has none of its own: it would go on with the weights of the start.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
            module.quant_method.process_weights_after_loading(module)
