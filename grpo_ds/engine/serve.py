"""Starts vLLM's API server: `python -m grpo_ds.engine.serve <vLLM's own flags>`, in the engine's environment.

vLLM's `vllm serve` does not start from the CPU wheel, and its server module makes every process that vLLM spawns
import the whole web server again: a spawned process repeats the top level of the main module. That repetition is put
to use here: each of vLLM's processes asks to be killed together with the one above it.
"""

from grpo_ds.engine.guard import die_with_parent

die_with_parent()

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
