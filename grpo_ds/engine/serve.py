"""Starts vLLM's API server, in the engine's environment; also the command for an engine on a node of its own:

    export GRPO_DS_ENGINE_KEY=$(openssl rand -hex 32)         # the same value where the run is started
    python -m grpo_ds.engine.serve --model PATH --dtype bfloat16 --max-model-len N --host 0.0.0.0 --port 8000

and, in the recipe, `engine.urls: [http://that-node:8000]`. The flags are vLLM's own; those that grpo_ds depends on are
added here (`vllm_wire.NEEDED`, and the routes for weight updates). With the variable no route answers without the key,
not even /health and /metrics; without it another host than loopback is refused (`grpo_ds.engine.key`).

vLLM's `vllm serve` does not start from the CPU wheel, and its server module makes every process that vLLM spawns
import the whole web server again: a spawned process repeats the top level of the main module. That repetition is put
to use here: each of vLLM's processes asks to be killed together with the one above it.
"""

import os
import sys

from grpo_ds.engine.guard import die_with_parent

if __name__ != "__main__":  # the first process ends with its guard, or belongs to the user's terminal
    die_with_parent()


def command(words: list[str]) -> list[str]:
    """vLLM's arguments for ours; ends the process for a host that must not be listened on."""
    from grpo_ds.engine.key import listen_words, shared_key
    from grpo_ds.engine.vllm_wire import NEEDED, flag
    from grpo_ds.engine.wire import command_line

    words = listen_words(words)
    middleware = ["--middleware", "grpo_ds.engine.key.RequireKey"] if shared_key() else []
    return [*words, *middleware, *command_line(NEEDED, {}, flag)]


if __name__ == "__main__":
    sys.argv[1:] = command(sys.argv[1:])
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes for weight updates

    from vllm.entrypoints.launchers.api_server.entry import main

    main()
