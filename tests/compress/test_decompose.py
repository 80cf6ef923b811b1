"""The closed forms against their definitions: optimal where they claim to be, exact at full width."""

import pytest
import torch

from netsuke.compress import decompose


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    """Correlated activations with a spectrum that falls, as real ones do."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(n, width, generator=rng, dtype=torch.float64) @ mix


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def test_roots_are_symmetric_roots_and_inverses():
    gram = gram_of(rows(200, 12, 0))
    root, inverse = decompose.sym_sqrt(gram, 1e-12)
    torch.testing.assert_close(root @ root, gram)
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ inverse, torch.eye(12, dtype=torch.float64))


def test_floor_bounds_null_directions():
    x = rows(5, 12, 1)  # rank 5
    root, inverse = decompose.sym_sqrt(gram_of(x), 1e-4)
    largest = torch.linalg.eigvalsh(gram_of(x))[-1]
    assert float(torch.linalg.eigvalsh(inverse)[-1]) == pytest.approx(float((1e-4 * largest) ** -0.5), rel=1e-9)
    torch.testing.assert_close(root @ inverse, torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_pair_svd_is_the_truncated_svd_of_the_whole_product(rank):
    x, a, b = rows(300, 16, 2), normal(16, 8, seed=3), normal(8, 20, seed=4)
    roots = decompose.sym_sqrt(gram_of(x), 1e-12)
    first, second, lost = decompose.pair_svd(roots, a, b, rank)
    assert first.shape == (16, rank) and second.shape == (rank, 20)
    product = roots[0] @ a @ b
    s = torch.linalg.svdvals(product)
    error = (product - roots[0] @ first @ second).square().sum()
    assert float(error) == pytest.approx(float(s[rank:].square().sum()), rel=1e-6)
    assert lost == pytest.approx(float(error / product.square().sum()), rel=1e-6)


def test_no_random_factorization_beats_pair_svd():
    x, a, b, rank = rows(300, 16, 2), normal(16, 8, seed=3), normal(8, 20, seed=4), 3
    first, second, _ = decompose.pair_svd(decompose.sym_sqrt(gram_of(x), 1e-12), a, b, rank)
    target = x @ a @ b
    ours = (target - x @ first @ second).square().sum()
    for seed in range(200):  # a random basis of the right form, each with its own best second factor
        inner = x @ a @ normal(8, rank, seed=1000 + seed)
        best = torch.linalg.lstsq(inner, target).solution
        assert float(ours) <= float((target - inner @ best).square().sum())


def test_whitened_svd_beats_plain_svd_on_the_data_and_is_exact_at_full_rank():
    x, w = rows(300, 16, 5), normal(16, 10, seed=6)
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    for rank in (2, 5):
        left, right = decompose.whitened_svd(gram_of(x), w, rank, 1e-12)
        plain = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert (x @ (w - left @ right)).norm() < (x @ (w - plain)).norm()
    left, right = decompose.whitened_svd(gram_of(x), w, 10, 1e-6)
    torch.testing.assert_close(left @ right, w)


def test_leverage_matches_its_definition_and_ranks_duplicates_low():
    x = rows(400, 9, 7)
    x = torch.cat((x, x[:, :1]), 1)  # channel 9 repeats channel 0: each predicts the other
    gram = gram_of(x)
    scores = decompose.ridge_leverage(gram, 1e-3)
    added = 1e-3 * gram.diagonal().mean()
    expected = (gram @ torch.linalg.inv(gram + added * torch.eye(10, dtype=torch.float64))).diagonal()
    torch.testing.assert_close(scores, expected)
    assert float(scores[0]) < 0.6 and float(scores[9]) < 0.6


def test_nystrom_is_least_squares_on_the_kept_channels():
    x, keep = rows(400, 12, 8), torch.tensor([0, 2, 3, 7])
    guess = decompose.nystrom(gram_of(x), keep, 0.0)
    torch.testing.assert_close(guess, torch.linalg.lstsq(x[:, keep], x).solution, rtol=1e-6, atol=1e-8)
    assert torch.equal(guess[:, keep], torch.eye(4, dtype=torch.float64))


def test_nystrom_of_all_channels_is_exact_at_any_ridge():
    guess = decompose.nystrom(gram_of(rows(5, 12, 9)), torch.arange(12), 0.1)
    assert torch.equal(guess, torch.eye(12, dtype=torch.float64))


def test_ridge_rises_until_the_factor_exists():
    gram = gram_of(rows(3, 12, 10)) - 1e-4 * torch.eye(
        12, dtype=torch.float64
    )  # slightly indefinite, as rounding makes it
    factor, added = decompose.safe_cholesky(gram, 0.0)
    assert added > 1e-4
    torch.testing.assert_close(factor @ factor.T, gram + added * torch.eye(12, dtype=torch.float64))
    assert bool(decompose.ridge_leverage(torch.zeros(4, 4), 1e-3).isfinite().all())


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        decompose.safe_cholesky(torch.full((3, 3), torch.nan), 1e-3)


def test_svd_is_the_nearest_matrix_and_the_randomised_one_is_as_near():
    w = rows(90, 60, 11) + 0.05 * normal(90, 60, seed=12)
    s = torch.linalg.svdvals(w)
    for rank in (1, 8, 60):
        u, kept, vt = decompose.svd(w, rank)
        assert float((w - (u * kept) @ vt).square().sum()) == pytest.approx(float(s[rank:].square().sum()), abs=1e-9)
    u, kept, vt = decompose.svd(w, 8, exact=10)
    near = float((w - (u * kept) @ vt).norm())
    assert near == pytest.approx(float(s[8:].norm()), rel=1e-3)
    again = decompose.svd(w, 8, exact=10)
    assert all(torch.equal(a, b) for a, b in zip((u, kept, vt), again))


def test_balanced_factors_have_the_same_product_and_equal_norms():
    first, second = normal(5, 12, seed=13) * 100, normal(9, 5, seed=14)
    first[3] = 0
    a, b = decompose.balanced(first, second)
    torch.testing.assert_close(b @ a, second @ first)
    live = torch.tensor([0, 1, 2, 4])
    torch.testing.assert_close(a.norm(dim=1)[live], b.norm(dim=0)[live])
    u, s, vt = decompose.svd(normal(9, 12, seed=15), 4)
    a, b = decompose.balanced(s[:, None] * vt, u)
    torch.testing.assert_close(a.norm(dim=1), s.sqrt())
