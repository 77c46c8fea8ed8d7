"""Metrics against closed forms, and their parts against torch-fidelity's own."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Evil
from torch import nn

from evaluation.distributed import Ranks
from evaluation.extractor import INCEPTION, Extractor, load_extractor
from evaluation.likelihood import Bound, likelihood_scores
from evaluation.metrics import (
    Statistics,
    Tally,
    frechet_distance,
    kernel_distance,
    load_statistics,
    precision_recall,
    save_arrays,
)


def normal(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def tally_of(features, logits=None, batch=7, **options):
    classes = 0 if logits is None else logits.shape[1]
    tally = Tally(len(features), features.shape[1], classes, **options)
    for rows in torch.randperm(len(features)).split(batch):  # in any order
        tally.add(rows.tolist(), features[rows], None if logits is None else logits[rows])
    return tally


def test_fid_of_gaussians_is_known():
    a = tally_of(normal(500, 6)).statistics()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    b = tally_of(normal(500, 6) + shift).statistics()
    assert frechet_distance(a, b) == pytest.approx(25, rel=1e-6)  # |mu - mu'|^2
    eye = np.eye(6)
    a, b = Statistics(1, np.zeros(6), 4 * eye), Statistics(1, np.zeros(6), 9 * eye)
    assert frechet_distance(a, b) == pytest.approx(6)  # 6 (2 - 3)^2


def test_streaming_is_the_batch_in_float64():
    features = normal(300, 5) + 1000  # far from 0, where sums lose digits
    found = tally_of(features, keep=300).statistics()
    exact = features.double().numpy()
    np.testing.assert_allclose(found.mu, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma, np.cov(exact, rowvar=False), atol=1e-8)
    assert torch.equal(found.features, features)  # in their own order


def test_inception_score_of_certain_and_balanced_classes_is_their_number():
    tally = Tally(40, 1, 4)
    rows = tally.split_of.argsort()  # ten splits of four, each with each class once
    tally.add(rows.tolist(), torch.zeros(40, 1), 1e4 * torch.eye(4).repeat(10, 1))
    assert tally.inception_score() == pytest.approx((4, 0))
    unsure = tally_of(torch.zeros(40, 1), torch.zeros(40, 4))
    assert unsure.inception_score() == pytest.approx((1, 0))


@pytest.mark.parametrize("count", [40, 203])
def test_splits_of_the_inception_score_are_torch_fidelitys(count):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * normal(count, 8)
    wanted = isc_features_to_metric(logits)
    found = tally_of(torch.zeros(count, 1), logits).inception_score()
    assert found == pytest.approx(tuple(wanted.values()), rel=1e-12)


def test_kid_is_unbiased():
    scores = [
        kernel_distance(normal(30, 3, seed), normal(30, 3, 500 + seed)).value for seed in range(30)
    ]
    mean, error = np.mean(scores), np.std(scores) / 30**0.5
    assert abs(mean) < 4 * error
    assert min(scores) < 0 < max(scores)
    assert kernel_distance(normal(60, 3), normal(60, 3, 1) + 1).value > 0.5


def test_precision_and_recall_of_a_part():
    real = torch.cat([normal(100, 2), normal(100, 2, 1) + 50])
    made = normal(100, 2, 2)  # one of the two clusters
    precision, recall = precision_recall(made, real)
    assert precision > 0.9
    assert 0.4 < recall < 0.51
    assert precision_recall(real, real) == (1, 1)


def test_shares_add_up_to_the_whole():
    features, logits = normal(31, 4), normal(31, 3, 1)
    whole = tally_of(features, logits, keep=10)
    parts = [Tally(31, 4, 3, keep=10) for _ in range(3)]
    for rank, part in enumerate(parts):
        rows = list(range(31))[rank::3]
        part.add(rows, features[rows], logits[rows])
    for mine, others in zip(
        whole.tensors(), zip(*(part.tensors() for part in parts), strict=True), strict=True
    ):
        torch.testing.assert_close(sum(others), mine, rtol=1e-12, atol=1e-12)
    spread = np.linspace(0, 30, 10).round().astype(int)
    assert torch.equal(whole.features, features[spread])


def test_ranks_share_rows_evenly():
    def ranks(rank):
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        alone = SimpleNamespace(
            global_rank=0, world_size=1, is_global_zero=rank == 0, strategy=strategy
        )
        found = Ranks(alone)
        found.rank, found.count = rank, 3
        return found

    shares = [ranks(rank).share(22, 4) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(22))
    assert max(len(batch) for share in shares for batch in share) == 4


def test_an_estimate_is_the_sum_where_terms_are_straight():
    t = torch.arange(0, 100, 9)
    whole = torch.arange(100.0, dtype=torch.float64)
    bound = Bound(t, (200 - whole)[t][None], t[None].double(), torch.zeros(1).double())
    found = likelihood_scores(bound, stride=9, timesteps=100)["nll-estimate (stride 9)"].value
    # below the first and above the last kept t it is level
    level = (200 - whole).clone()
    level[1:9] = 200 - 9
    assert found == pytest.approx(level.sum().item())


def test_statistics_come_back_from_a_file(tmp_path):
    statistics = tally_of(normal(20, 3), keep=20).statistics()
    save_arrays(tmp_path / "s.npz", **statistics._asdict())
    found = load_statistics(tmp_path / "s.npz")
    assert found.digest() == statistics.digest()
    assert found.count == 20
    assert torch.equal(found.features, statistics.features)
    np.savez(tmp_path / "other.npz", mu=statistics.mu, sigma=statistics.sigma)  # as TTUR's
    assert load_statistics(tmp_path / "other.npz").digest() == statistics.digest()
    np.savez(tmp_path / "bad.npz", mu=statistics.mu)
    np.savez(tmp_path / "evil.npz", mu=np.array([Evil()], dtype=object), sigma=statistics.sigma)
    for name in ("bad.npz", "evil.npz"):
        with pytest.raises(ValueError, match=name):
            load_statistics(tmp_path / name)


class Mean(nn.Module):
    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return x.float().mean(dim=(2, 3))


def test_gray_is_repeated_and_alpha_dropped():
    extractor = Extractor(Mean(), "mean", "")
    pixels = torch.arange(5, dtype=torch.uint8)[None, :, None, None].expand(2, 5, 4, 4)
    for channels, wanted in ((1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])):
        features, logits = extractor(pixels[:, :channels])
        assert features[0].tolist() == wanted
        assert logits is None
    with pytest.raises(ValueError, match=r"must be \[B, D\]"):
        Extractor(nn.Identity(), "identity", "")(pixels[:, :3])


def test_what_is_no_extractor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "no.pt").write_bytes(b"no")
    for name, weights, says in (
        ("inception", None, "nor one of: inception-v3-compat"),
        (str(tmp_path / "no.pt"), None, "not a TorchScript file"),
        (str(tmp_path / "evil.pth"), None, "not a TorchScript file"),
        (INCEPTION, tmp_path / "evil.pth", "does not hold weights"),
        (INCEPTION, tmp_path / "no.pt", "does not hold weights"),
        ("dinov2-vit-s-14", None, "runs it when it is loaded"),
    ):
        with pytest.raises(ValueError, match=says):
            load_extractor(name, weights)
    assert not (tmp_path / "stolen").exists()


def test_without_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.registry", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        load_extractor()
