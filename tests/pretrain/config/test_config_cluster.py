"""A cluster file says what goes into a batch script; nothing in it may break out of its line."""

import pytest

from trichord.config.load import load_cluster
from trichord.core.errors import ConfigError

CLUSTER = "name: small\nnodes: 2\ngpus_per_node: 4\n"


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(CLUSTER)
    return path


def test_little_is_enough(cluster):
    facts = load_cluster(cluster, ["slurm.partition=gpu"])
    assert (facts.num_gpus, facts.slurm.requeue, facts.slurm.memory) == (8, True, "0")
    assert facts.gpu is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("slurm.partition=two words", "slurm.partition"),
        ("slurm.partion=gpu", "partition"),
        ("slurm.sbatch=[constraint=ib]", "slurm.sbatch"),
        ('setup=["echo 1\\nrm x"]', "setup"),
        ("env={A-B: x}", "env"),
        ("slurm.time_limit=a day", "slurm.time_limit"),
        ("slurm.save_lead_s=5", "30"),
    ],
)
def test_mistakes_are_named(cluster, override, message):
    with pytest.raises(ConfigError, match=message):
        load_cluster(cluster, [override])
