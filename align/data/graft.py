"""Trees that begin alike, such as with the same system prompt, as one tree: what they share is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.data.trees import Tree


def graft(trees: Sequence[Tree]) -> list[Tree]:
    """Make one tree of all that begin alike, whose branches may share more among themselves.

    Only what none of them has to predict is shared. The loss over all labels stays what it was; the order of labels and
    paths may change, and `owners` tell which of `trees` each is of.
    """
    return _grafted([tree._replace(owners=(number,) * tree.path_count) for number, tree in enumerate(trees)])


def _grafted(trees: list[Tree]) -> list[Tree]:
    groups: dict[object, list[Tree]] = {}
    for number, tree in enumerate(trees):
        stem, marks = tree.segments[0], tree.trained[0]
        alone = len(stem) < 2 or marks[0]
        groups.setdefault((number,) if alone else int(stem[0]), []).append(tree)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups.values()]


def _joined(group: list[Tree]) -> Tree:
    stems, marks = [tree.segments[0] for tree in group], [tree.trained[0] for tree in group]
    free = min(int(trained.argmax()) if trained.any() else len(trained) for trained in marks)
    shortest = min(min(map(len, stems)) - 1, free)
    heads = np.stack([stem[:shortest] for stem in stems])
    differing = np.flatnonzero((heads != heads[0]).any(0))
    shared = int(differing[0]) if len(differing) else shortest
    segments, trained, targets, parents = [stems[0][:shared]], [np.zeros(shared, bool)], [], []
    branches = _grafted([_without(tree, shared) for tree in group])
    for tree in branches:
        own = len(segments)  # where this branch's stem now stands
        parents += [0, *(own + tree.parent(i) for i in range(1, len(tree.segments)))]
        segments += tree.segments
        trained += tree.trained
        targets += tree.targets or (0.0,) * tree.path_count
    known = tuple(targets) if any(tree.targets for tree in group) else ()
    owners = tuple(number for tree in branches for number in tree.owners)
    return Tree(tuple(segments), tuple(trained), known, tuple(parents), owners)


def _without(tree: Tree, tokens: int) -> Tree:
    """The tree without the first tokens of its stem."""
    (stem, *segments), (marks, *trained) = tree.segments, tree.trained
    return tree._replace(segments=(stem[tokens:], *segments), trained=(marks[tokens:], *trained))
