"""What an engine node runs: the server of a run's recipe, for a trainer on other nodes.

    python -m grpo_ds.engine_node --announce FILE [the arguments of launch/train.py]

takes the same recipe and options as the run, so that model, dtype, lengths and engine.args agree, writes the server's
URL into FILE, and becomes the server. It listens on the address that leads to MASTER_ADDR, the first training node, and
answers only with the key in GRPO_DS_ENGINE_KEY (`grpo_ds.engine.key`). launch/slurm_engines.sbatch starts it on every
node of its second component and hands the URLs to the run as engine.urls.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

from grpo_ds.config import EngineConfig, Recipe, RecipeError
from grpo_ds.engine.base import EngineSettings
from grpo_ds.peers import address_towards


def command(recipe: Recipe, model_path: str, dtype: str, device: str) -> tuple[list[str], dict[str, str]]:
    """(command line without host and port, environment) of the recipe's server on a node of its own.

    Raises RecipeError for an engine that has no server.
    """
    config = replace(recipe.engine, urls=[])
    length = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
    trust = recipe.model.trust_remote_code
    settings = EngineSettings(model_path, dtype, length, Path(), device, recipe.train.seed, trust_remote_code=trust)
    if config.kind == "vllm":
        from grpo_ds.engine import vllm, vllm_wire

        words = vllm_wire.server_args(_whole_gpu(config, device, "gpu_memory_utilization"), settings)
        python = config.python or sys.executable
        return [python, "-m", vllm.VllmEngine.kind.module, *words], vllm.server_environment(device)
    if config.kind == "sglang":
        from grpo_ds.engine import process, sglang, sglang_wire

        words = sglang_wire.server_args(_whole_gpu(config, device, "mem_fraction_static"), settings)
        python = config.python or sglang.own_python()
        return [python, "-m", sglang.SglangEngine.kind.module, *words], process.server_env(device)
    raise RecipeError(
        f"engine.kind {config.kind} has no server that could run on a node of its own: take vllm or sglang"
    )


def _whole_gpu(config: EngineConfig, device: str, option: str) -> EngineConfig:
    """No trainer shares the GPU, so the engine takes what the engines themselves take; engine.args still wins."""
    return config if device == "cpu" else replace(config, args={option: 0.9} | config.args)


def main(argv: list[str]) -> None:
    """Does not return: the process becomes the server."""
    from grpo_ds.actor import backend
    from grpo_ds.recipe import read_recipe, resolve_path

    if argv[:1] != ["--announce"] or len(argv) < 2:
        sys.exit("usage: python -m grpo_ds.engine_node --announce FILE [the arguments of launch/train.py]")
    try:
        recipe, bases = read_recipe(argv[2:])
        model = str(resolve_path(recipe.model.path, bases) or recipe.model.path)
        words, env = command(recipe, model, backend.resolve_dtype(recipe.model), backend.device_kind())
        host = address_towards(os.environ["MASTER_ADDR"])
    except RecipeError as error:
        sys.exit(f"grpo_ds.engine_node: {error}")
    port = int(recipe.engine.args.get("port", 0)) or _free_port(host)
    words += ["--host", host, "--port", str(port)]
    _announce(Path(argv[1]), f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    os.execve(words[0], words, env)


def _free_port(host: str) -> int:
    """A port of this address that nobody uses at the moment."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


def _announce(file: Path, url: str) -> None:
    """In one step: somebody is waiting for the file."""
    draft = file.with_suffix(".new")
    draft.write_text(url + "\n")
    draft.replace(file)


if __name__ == "__main__":
    main(sys.argv[1:])
