"""The config of a run in which only the algorithm matters."""

from fastreason.config import parse_config


def config(samples_per_prompt=2, max_staleness=1, teacher=None, critic=None, temperature=1.0, **algorithm):
    return parse_config(
        {
            "model": {"path": "none"},
            "data": {"task": "chain_sum"},
            "rollout": {
                "samples_per_prompt": samples_per_prompt,
                "max_new_tokens": 5,
                "max_staleness": max_staleness,
                "temperature": temperature,
            },
            "train": {"steps": 1, "prompts_per_step": 2},
            "algorithm": algorithm,
            "teacher": teacher or {},
            "critic": critic or {},
        }
    )
