"""Recall and its chance level against hand-made cases and a simulation."""

import math

import pytest
import torch
import torch.nn.functional as F

from trichord.evaluation.retrieval import majority_share, recall_at_k


def test_perfect_and_shifted_galleries():
    eye = torch.eye(4)
    groups = torch.arange(4)
    assert recall_at_k(eye, eye, groups, groups, 1).value == 1.0
    shifted = recall_at_k(eye, eye.roll(1, 0), groups, groups, 1)
    assert shifted.value == 0.0
    assert shifted.chance == pytest.approx(0.25)


def test_equal_groups_are_all_right_answers():
    query = torch.eye(3)
    target = torch.eye(3)[[1, 0, 2]]
    recall = recall_at_k(query, target, torch.tensor([5, 5, 6]), torch.tensor([5, 5, 6]), 1)
    assert recall.value == 1.0
    assert recall.chance == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_queries_without_an_answer_are_left_out():
    recall = recall_at_k(torch.eye(2), torch.eye(2), torch.tensor([0, 9]), torch.tensor([0, 1]), 1)
    assert (recall.value, recall.queries) == (1.0, 1)
    assert math.isnan(recall_at_k(torch.eye(2), torch.eye(2), torch.tensor([7, 9]), torch.tensor([0, 1]), 1).value)


def test_chance_is_what_random_embeddings_score():
    gen = torch.Generator().manual_seed(0)
    query_groups, target_groups = torch.arange(2000) % 10, torch.arange(10)
    query = F.normalize(torch.randn(2000, 16, generator=gen), dim=1)
    target = F.normalize(torch.randn(10, 16, generator=gen), dim=1)
    recall = recall_at_k(query, target, query_groups, target_groups, 5)
    assert recall.chance == pytest.approx(0.5)
    assert recall.value == pytest.approx(0.5, abs=0.05)


def test_majority_share():
    assert majority_share(["a", "b", "a", "c"]) == 0.5
