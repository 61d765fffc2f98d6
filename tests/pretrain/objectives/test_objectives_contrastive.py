"""The contrastive losses against a naive double loop in float64, and their gradients against autograd of the whole."""

import math

import pytest
import torch
import torch.nn.functional as F

from trichord.objectives.config import ContrastiveConfig
from trichord.objectives.contrastive import FeatureTable, contrastive_gradients, rows_loss


def random_table(n, dim=8, groups=3, absent=0.3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    features = {m: F.normalize(torch.randn(n, dim, generator=gen), dim=1) for m in ("image", "audio", "text")}
    present = {m: torch.rand(n, generator=gen) > absent for m in features}
    return FeatureTable(features, present, torch.randint(groups, (n,), generator=gen))


def naive_infonce(table, query, target, scale):
    both = [i for i in range(len(table.group_ids)) if table.present[query][i] and table.present[target][i]]
    total = 0.0
    for a, b in ((query, target), (target, query)):
        for i in both:
            logits = {j: float(scale * table.features[a][i].double() @ table.features[b][j].double()) for j in both}
            log_sum = math.log(sum(math.exp(v) for v in logits.values()))
            positives = [j for j in both if table.group_ids[j] == table.group_ids[i]]
            total += 0.5 * -sum(logits[j] - log_sum for j in positives) / len(positives)
    return total


def naive_sigmoid(table, query, target, scale, bias):
    both = [i for i in range(len(table.group_ids)) if table.present[query][i] and table.present[target][i]]
    total = 0.0
    for i in both:
        for j in both:
            z = 1 if table.group_ids[i] == table.group_ids[j] else -1
            logit = float(scale * table.features[query][i].double() @ table.features[target][j].double()) + bias
            total += math.log1p(math.exp(-z * logit))
    return total


@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_infonce_equals_the_double_loop(absent):
    table = random_table(17, absent=absent)
    scale = torch.tensor([7.0])
    value = rows_loss("infonce", table, table, "image-text", scale, torch.zeros(1))
    assert float(value) == pytest.approx(naive_infonce(table, "image", "text", 7.0), rel=1e-5)


def test_sigmoid_equals_the_double_loop():
    table = random_table(13, absent=0.4)
    value = rows_loss("sigmoid", table, table, "audio-text", torch.tensor([5.0]), torch.tensor([-2.0]))
    assert float(value) == pytest.approx(naive_sigmoid(table, "audio", "text", 5.0, -2.0), rel=1e-5)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_nothing_to_compare_gives_zero_and_finite_gradients(kind):
    table = random_table(6)
    table = FeatureTable(table.features, {m: torch.zeros(6, dtype=torch.bool) for m in table.present}, table.group_ids)
    config = ContrastiveConfig(kind=kind)
    candidate_grads, mine = contrastive_gradients(config, table, table, torch.ones(1), torch.zeros(1))
    assert all(float(loss) == 0 for loss in mine.losses.values())
    for grad in [*candidate_grads.values(), *mine.features.values(), mine.logit_scale]:
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_gradients_of_parts_add_up_to_those_of_the_whole(kind):
    """Rows split over two 'ranks' and their candidate gradients summed = autograd over everything at once."""
    config = ContrastiveConfig(kind=kind, weight=0.7)
    table = random_table(20, absent=0.2)
    whole = {m: f.clone().requires_grad_() for m, f in table.features.items()}
    scale = torch.tensor([4.0], requires_grad=True)
    bias = torch.tensor([-1.0], requires_grad=True)
    full = FeatureTable(whole, table.present, table.group_ids)
    losses = []
    for pair in config.pairs:
        a, b = pair.split("-")
        count = (table.present[a] & table.present[b]).sum()
        losses.append(rows_loss(kind, full, full, pair, scale, bias) / count)
    (sum(losses) * config.weight / len(losses)).backward()

    summed = {m: torch.zeros_like(f) for m, f in table.features.items()}
    scale_grad = torch.zeros(1)
    for part in (slice(0, 7), slice(7, 20)):
        rows = FeatureTable(
            {m: f[part] for m, f in table.features.items()},
            {m: p[part] for m, p in table.present.items()},
            table.group_ids[part],
        )
        candidate_grads, mine = contrastive_gradients(config, rows, table, scale, bias)
        for m in summed:
            summed[m] += candidate_grads[m]
            summed[m][part] += mine.features[m]
        scale_grad += mine.logit_scale
    for m in summed:
        torch.testing.assert_close(summed[m], whole[m].grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scale_grad, scale.grad, rtol=1e-4, atol=1e-7)


def test_absent_items_do_not_matter():
    """Whatever garbage sits in an absent slot, loss and gradients stay the same."""
    table = random_table(12, absent=0.5)
    garbage = {
        m: torch.where(table.present[m][:, None], f, torch.full_like(f, 100.0)) for m, f in table.features.items()
    }
    config = ContrastiveConfig()
    scale, bias = torch.tensor([3.0]), torch.zeros(1)
    _, clean = contrastive_gradients(config, table, table, scale, bias)
    dirty_table = FeatureTable(garbage, table.present, table.group_ids)
    _, dirty = contrastive_gradients(config, dirty_table, dirty_table, scale, bias)
    assert clean.losses == dirty.losses
    for m in clean.features:
        present = table.present[m]
        torch.testing.assert_close(clean.features[m][present], dirty.features[m][present])
