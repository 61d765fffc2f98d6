"""Names that choose checkpoints: those of the run's suite, or none."""

import pytest

from trichord.checkpoints.config import KeepBest
from trichord.core.errors import ConfigError
from trichord.evaluation.config import SuiteConfig
from trichord.evaluation.during import require_known_metric

SUITE = SuiteConfig.model_validate(
    {
        "name": "small",
        "sources": [{"name": "scans", "shards": "scans.tar"}],
        "tasks": [
            {"kind": "loss", "source": "scans"},
            {"kind": "retrieval", "source": "scans", "pair": "image-text"},
            {"kind": "caption", "source": "scans", "context": "image"},
        ],
    }
)


@pytest.mark.parametrize(
    "name",
    [
        "retrieval/image-text/R@1 (scans)",
        "caption/image/exact_match (scans)",
        "eval/scans/loss/next_token",
        "train/loss",
    ],
)
def test_what_the_suite_gives_and_what_is_no_evaluation_may_choose(name):
    require_known_metric(KeepBest(metric=name).metric, SUITE)


def test_what_no_suite_gives_is_told_with_what_there_is():
    with pytest.raises(ConfigError, match=r"small' does not give; it gives .*eval/scans/retrieval/image-text/R_at_1"):
        require_known_metric("eval/scans/retrieval/image-text/R_at_10", SUITE)
    with pytest.raises(ConfigError, match="this run evaluates nothing"):
        require_known_metric("eval/scans/loss/next_token", None)
