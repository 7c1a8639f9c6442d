"""Cache of the views of fields: one page asks for several pictures of the same field."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from leukoflow.tasks.review import field_view
from leukoflow.tasks.review.field_view import FieldView
from leukoflow.tasks.review.table import RunTable

_MAX_BYTES = 128 << 20  # bytes of views that are kept


class _Views:
    """Keep the views of fields used last; a second request for one that is being made waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, ...], Future[FieldView]] = OrderedDict()

    def get(self, key: tuple[str, ...], make: Callable[[], FieldView]) -> FieldView:
        with self._lock:
            future = self._kept.get(key)
            mine = future is None
            if future is None:
                future = self._kept[key] = Future()
            self._kept.move_to_end(key)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
            self._shrink()
        return future.result()

    def _shrink(self) -> None:
        with self._lock:
            done = [(k, f) for k, f in self._kept.items() if f.done() and f.exception() is None]
            total = sum(_weight(f.result()) for _, f in done)
            for key, future in done[:-1]:
                if total <= _MAX_BYTES:
                    break
                total -= _weight(future.result())
                self._kept.pop(key, None)


def _weight(view: FieldView) -> int:
    return sum(
        a.nbytes for t in view.tiles for a in (t.original, t.normalized, t.semantic, t.cells, t.maps)
    )  # fmt: skip


_views = _Views()


def field_of(table: RunTable, ordinal: int) -> FieldView:
    """Return the view of a field of a run. Raises NotFoundError."""
    key = (table.out, table.run_key, table.stamp, str(ordinal))
    return _views.get(key, lambda: field_view.view(table, ordinal))
