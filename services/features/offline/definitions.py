"""A project's features by the names that people give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from causemesh.catalogue import Catalogue
from causemesh.errors import Misdeclared
from services.features.domain.definitions import FeatureView, by_reference
from services.features.domain.parsing import parse_views
from services.features.domain.transforms import Transforms, parse_transforms

FILE = "features.yaml"


@dataclass(frozen=True)
class Definitions:
    """What a project declares: its topics, its feature views and its on-demand features."""

    catalogue: Catalogue
    views: tuple[FeatureView, ...]
    transforms: Transforms

    @classmethod
    def of(cls, project: Path, *, partitions: int | None = None) -> Definitions:
        """Read a project's folder. Raises Misdeclared, naming the file and what to change."""
        path = project / FILE
        if not path.exists():
            raise Misdeclared(f"{path} is missing; see examples/flights/{FILE} for its form")
        document = yaml.safe_load(path.read_text())
        views = tuple(parse_views(document))
        transforms = parse_transforms(document, list(_places(views)))
        return cls(Catalogue.load([project], partitions=partitions), views, transforms)

    def expand(self, names: Sequence[str]) -> list[str]:
        """The features that these names stand for: `view.feature` itself, `view` all of its own.

        Raises Misdeclared for a name that stands for nothing, saying what there is.
        """
        views = by_reference(self.views)
        known = {*_places(self.views), *self.transforms.names}
        found: dict[str, None] = {}
        for name in names:
            if name in views:
                found |= dict.fromkeys(f"{name}.{one.name}" for one in views[name].features)
            elif name in known:
                found[name] = None
            else:
                raise Misdeclared(f"no feature or view {name!r}; {self._near(name)}")
        if not found:
            raise Misdeclared(f"no feature is named; the views are {', '.join(sorted(views))}")
        return list(found)

    def place(self, name: str) -> tuple[str, int]:
        """The id of the view that a feature is of, and its place among that view's features."""
        return _places(self.views)[name]

    def view(self, view_id: str) -> FeatureView:
        """A view by its id."""
        return by_reference(self.views)[view_id]

    def _near(self, name: str) -> str:
        view = by_reference(self.views).get(name.partition(".")[0])
        if view is None:
            return f"the views are {', '.join(sorted(by_reference(self.views)))}"
        return f"{view.id} has {', '.join(one.name for one in view.features)}"


def _places(views: Sequence[FeatureView]) -> dict[str, tuple[str, int]]:
    """Every name of a view feature, and where it is: the view's id and the place in it."""
    return {
        f"{reference}.{feature.name}": (view.id, place)
        for reference, view in by_reference(views).items()
        for place, feature in enumerate(view.features)
    }
