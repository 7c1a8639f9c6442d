"""What stands in the way of a shard before it is on its way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from leukoflow.core.errors import StorageError
from leukoflow.flows import dispatch
from leukoflow.flows.dispatch import unpack_ahead
from leukoflow.runs.records import Shard, Source, SourceKind

SHARD = Shard(7, 112, 16)


def test_a_disk_that_is_full_while_a_tar_is_unpacked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def spool(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dispatch, "spool", spool)
    run = SimpleNamespace(
        root="/out/night",
        source=Source("night.tar.gz", SourceKind.COMPRESSED_TAR, "1-2", 10),
        binding=SimpleNamespace(command="leukoflow rerun /out night"),
    )
    with pytest.raises(StorageError, match=r"disk that holds /out/night is full.*again: leukoflow rerun /out night"):
        list(unpack_ahead(cast(Any, SimpleNamespace(run=run)), iter([SHARD])))
