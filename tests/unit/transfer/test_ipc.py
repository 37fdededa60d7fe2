"""What of the ipc transport needs no GPU."""

from __future__ import annotations

import msgspec
import pytest

from transfer import cuda
from transfer.endpoint import DESCRIPTION_VERSION, Description, encode_description
from transfer.ipc import IpcTransport, _boot_id, _Export, _Metadata
from transfer.transport import PeerError

_ENCODE = msgspec.msgpack.encode


@pytest.mark.parametrize(
    "metadata", [b"", b"junk", _ENCODE(_Metadata(_boot_id(), 1, (_Export(b"", 0),)))]
)
def test_a_description_that_does_not_fit_is_the_peers_fault(
    metadata: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "num_devices", lambda: 1)
    transport = IpcTransport("here", {})
    description = Description(DESCRIPTION_VERSION, "ipc", "there", (), metadata)
    with pytest.raises(PeerError):
        transport.connect("there", encode_description(description))
