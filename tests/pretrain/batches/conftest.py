"""The corpus that the loader's tests share; built once per session."""

import pytest
from batches_corpus import Corpus, build_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))
