"""The doors: tables whose entries are loaded when they are asked for, and to which installed packages add theirs."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar

from carla_digr.errors import UserError, missing_package

T = TypeVar("T")


def load(reference: str) -> Any:
    """What "module:attribute" names.

    Raises:
        UserError: it needs a package that is not installed, whose extra is named.
    """
    module, _, attribute = reference.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        raise UserError(missing) from error


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name; own ones, and those of the entry points of a group.

    An entry of ours with the name of an entry point's wins, so that no package changes what a name of ours means.

    Args:
        what: what an entry is called in an error, such as "saliency method".
        group: of entry points, such as ``carla_digr.methods``.
        own: name -> "module:attribute", imported when it is asked for, or the entry itself.
    """

    def __init__(self, what: str, group: str, own: Mapping[str, Any]):
        self.what, self.group = what, group
        self._own = dict(own)

    @cached_property
    def _points(self) -> dict[str, metadata.EntryPoint]:
        found = {point.name: point for point in metadata.entry_points(group=self.group)}
        for name in sorted(found.keys() & self._own.keys()):
            warnings.warn(f"An installed package offers the {self.what} {name} too, whose name is taken.", stacklevel=2)
            del found[name]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *sorted(self._points.keys() - self._own.keys())])

    def __len__(self) -> int:
        return len(self._own.keys() | self._points.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._points

    def __getitem__(self, name: str) -> T:
        """The entry.

        Raises:
            KeyError: there is none of this name.
            UserError: the package that offers it cannot be loaded.
        """
        if name not in self._own:
            point = self._points[name]
            try:
                self._own[name] = point.load()
            except Exception as error:  # whatever a stranger's module raises
                package = point.dist.name if point.dist else point.value
                raise UserError(
                    f"The package {package}, which offers the {self.what} {name}, cannot be loaded "
                    f"({type(error).__name__}: {error}); mend or uninstall it."
                ) from error
        entry = self._own[name]
        if isinstance(entry, str):
            entry = self._own[name] = load(entry)
        return entry

    def loadable(self) -> dict[str, T]:
        """All entries; of those that cannot be loaded a warning says why."""
        found = {}
        for name in self:
            try:
                found[name] = self[name]
            except UserError as error:
                warnings.warn(str(error), stacklevel=2)
        return found

    def find(self, name: str) -> T:
        """The entry.

        Raises:
            UserError: there is none of this name, with the nearest and all others, or it cannot be loaded.
        """
        if name not in self:
            near = difflib.get_close_matches(name, list(self), 1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise UserError(f"There is no {self.what} '{name}'{hint}; choose one of {', '.join(self)}.")
        return self[name]
