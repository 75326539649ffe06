"""launch/slurm_engines.sbatch on a real SLURM: one node trains, another one serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, command_line, variable, wait_for
from tests.slurm.watching import ENDS_S, START_S, is_rank, metrics, wait_rounds

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_engines_may_have_nodes_of_their_own(cluster: Cluster, home: Path) -> None:
    """A heterogeneous job: n1 trains, n2 serves, and the weights go from one to the other in a process group."""
    arguments = ["--recipe", "quickstart.yaml", "--train.rounds", "4", "--data.heldout", "null"]
    job = cluster.submit_with_engines(home, [*arguments, "--sync.transport", "group", "--sync.verify", "full"])
    wait_rounds(job, 1)
    ranks = [p for p in cluster.processes() if is_rank(p)]
    servers = [p for p in cluster.processes() if "grpo_ds.engine.serve" in command_line(p)]
    assert [variable(p, "SLURMD_NODENAME") for p in ranks] == ["n1"]
    assert {variable(p, "SLURMD_NODENAME") for p in servers} == {"n2"}
    secret = variable(ranks[0], "GRPO_DS_ENGINE_KEY")
    assert len(secret) == 64 and {variable(p, "GRPO_DS_ENGINE_KEY") for p in servers} == {secret}
    commands = "\n".join(command_line(p) for p in cluster.processes())
    assert job.wait(START_S) == "COMPLETED", job.screen
    wait_for("the end of ranks and servers", lambda: not cluster.processes(), ENDS_S)
    assert [m["round"] for m in metrics(job)] == list(range(4))
    assert all(m["logprob_gap"] < 1e-3 for m in metrics(job)), "the engine had the weights of every round"
    assert secret not in commands + job.screen
    assert not list((job.folder / "logs").glob("**/vllm_server.log")), "no engine was started on the training node"
