"""minigpt.deeper.attention_patterns: the drawing, and the exercises of its notebook."""
import numpy as np
import pytest
import torch

from exercise_cells import exercises, said
from minigpt.deeper.attention_patterns import plot_heads


@pytest.fixture
def pyplot():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


def test_plot_heads_draws_every_head(pyplot):
    patterns = torch.rand(5, 4, 4)
    figure = plot_heads(patterns, list("abcd"), columns=3)
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == 5 and [ax.get_title() for ax in drawn] == [f"head {h}" for h in range(5)]
    for ax, pattern in zip(drawn, patterns):
        assert np.allclose(ax.images[0].get_array(), pattern)


def test_patterns_of_other_sides_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 8\)"):
        plot_heads(torch.rand(5, 8), list("abcde"))


def names():
    random = torch.Generator().manual_seed(0)
    return dict(torch=torch, Tensor=torch.Tensor, n=6, patterns=torch.rand(8, 8, 16, 16, generator=random),
                copied=torch.rand(8, 3, 8, 13, 13, generator=random))


@pytest.mark.parametrize("number, empty, check, solution", exercises("deeper/attention_patterns"), ids=lambda v: v[-1])
def test_exercise(number, empty, check, solution, capsys):
    assert said(empty, check, names(), capsys) == "not solved yet"
    assert said(solution, check, names(), capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def strongest_keys(p, q, n): return p[:, q].topk(n, largest=False).indices.tolist()", "head 0"),
    (2, "def spread(p): return -(p * p.log()).sum(-1).exp().mean(-1)", "should be 5.0"),
    (3, "def same_token(p, n): return p.diagonal(-n, -2, -1).mean(-1)", "should be")])
def test_a_wrong_solution_is_told_why(number, wrong, words, capsys):
    check = exercises("deeper/attention_patterns")[number - 1][2]
    assert words in said(wrong, check, names(), capsys)
