"""What a description of shared memory claims is checked before it is mapped."""

import contextlib

import msgspec
import pytest

from transfer.endpoint import Description, encode_description
from transfer.memory import allocate_host
from transfer.shm import ShmTransport, _Metadata, _Place
from transfer.transport import PeerError, Region

PAGES, PAGE_BYTES = 256, 4096


@pytest.mark.parametrize("offset", [-(1 << 30), -1, 1, 1 << 40])
def test_a_region_outside_its_memory_is_refused(offset: int) -> None:
    with contextlib.ExitStack() as stack:
        ends = []
        for name in ("source", "target"):
            memory = allocate_host(PAGES * PAGE_BYTES)
            end = ShmTransport(name, {})
            stack.callback(end.close)
            end.register([Region(memory.address, PAGES, PAGE_BYTES)])
            ends.append((end, memory))
        (source, _), (target, _) = ends
        description = msgspec.msgpack.decode(target.describe(), type=Description)
        metadata = msgspec.msgpack.decode(description.metadata, type=_Metadata)
        moved = _Metadata(metadata.process, (_Place(metadata.places[0].file, offset),))
        changed = msgspec.structs.replace(description, metadata=msgspec.msgpack.encode(moved))
        with pytest.raises(PeerError, match="does not lie within"):
            source.connect("target", encode_description(changed))
