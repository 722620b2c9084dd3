"""Give the sixty models back in their own classes, or name the line that cannot follow: the table must stay true.

`classes.json` lists, for each model that is refused, the lines of code and what to keep whole so that they can follow.
After a change that is meant to alter it, write it anew with `python -m tests.zoo.classes` and read the difference.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.capture.export import without_cache
from graphopt.errors import PlanError
from graphopt.verify import difference
from tests.zoo import ZOO, quiet
from tests.zoo.captured import MODELS, captured
from tests.zoo.classes import CLASSES, given_back, patterns, pruned

pytestmark = pytest.mark.zoo

TABLE: dict[str, list[dict[str, Any]]] = json.loads(CLASSES.read_text())
REFUSED = [name for name, rounds in TABLE.items() if rounds and "never" not in rounds[-1]]


def check(name: str, small: nn.Module, after: nn.Module) -> None:
    """Compare outputs at another batch size than the example's, and the class and the names with the original's."""
    model, _ = captured(name)
    assert type(small) is type(model)
    assert small.state_dict().keys() == model.state_dict().keys()
    other = ZOO[name].inputs(batch=3)
    with torch.no_grad(), quiet(), without_cache(small, (other.args, other.kwargs)):
        found, expected = small(*other.args, **other.kwargs), after(*other.args, **other.kwargs)
    found, expected = ([t for t in pytree.tree_leaves(x) if isinstance(t, torch.Tensor)] for x in (found, expected))
    assert difference(expected, found, double=False).relative <= 1e-4


def test_the_table_lists_every_model() -> None:
    assert list(TABLE) == list(ZOO)


@pytest.mark.parametrize("name", MODELS)
def test_the_class_is_given_back_or_the_line_that_cannot_follow_is_named(name: str) -> None:
    model, typing = captured(name)
    plan, after = pruned(typing.graph)
    found = given_back(model, plan, typing.graph)
    if isinstance(found, PlanError):
        assert TABLE[name], str(found)
        # Which module of several alike is met first depends on what was pruned most.
        assert found.code in {each.get("code") for each in TABLE[name]}, str(found)
        assert found.exclude
        assert ".py:" in str(found)
        return
    assert not TABLE[name], "it was refused before"
    check(name, found, after.module)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in REFUSED])
def test_keeping_whole_what_the_refusals_name_gives_the_class_back(name: str) -> None:
    model, typing = captured(name)
    plan, after = pruned(typing.graph, patterns(TABLE[name]))
    found = given_back(model, plan, typing.graph)
    assert not isinstance(found, PlanError), str(found)
    check(name, found, after.module)
