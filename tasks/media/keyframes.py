"""Keyframes: how to get there, and which of them reset a decoder, so that nothing after refers to what was before.

Containers call more than these a keyframe: H.264 and HEVC have open groups of pictures, whose later frames may refer to
the group before, and streams of intra refresh, which have no whole picture to start at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import av
import numpy as np
from av.container import InputContainer

from tasks.media.probe import video_stream
from tasks.media.timestamps import REORDER_DEPTH, FrameTable

#: By codec: the types of NAL units that hold a part of a picture, and those out of them that hold one of an IDR picture
#: (ITU-T H.264, table 7-1; H.265, table 7-1).
_PICTURES: Final = {"h264": (range(1, 6), (5,)), "hevc": (range(32), (19, 20))}

#: Codecs, by the names of their decoders, whose keyframes replace every picture that could be referred to.
_ALWAYS: Final = ("vp8", "vp9", "av1", "libdav1d")

#: Where the size of lengths of units stands in the decoder configuration of MP4 (ISO/IEC 14496-15). It begins with 1.
_LENGTH_SIZE_AT: Final = {"h264": 4, "hevc": 21}

_START_CODE: Final = b"\0\0\1"


def packets_from(container: InputContainer, index: int, table: FrameTable, keyframe: int) -> Iterator[av.Packet]:
    """Packets of a stream from that of a keyframe on.

    Args:
        container: The open file.
        index: Of the stream.
        table: Frame table of the stream.
        keyframe: Time of the keyframe, one out of `table`.

    Yields:
        Packets in decoding order; none if the container does not find that one.
    """
    stream = video_stream(container, index)
    times = table.stream_pts
    number = int(np.searchsorted(times, keyframe)) - REORDER_DEPTH
    early = times[number] if number >= 0 else 2 * times[0] - times[min(-number, len(times) - 1)]
    # MPEG-TS seeks by decoding times and lands too late: then a time that is early for any order of pictures finds it.
    for target in (keyframe, int(early)):
        container.seek(target, stream=stream, backward=True, any_frame=False)
        packets = container.demux(stream)
        for packet in packets:
            if packet.pts == keyframe:
                yield packet
                yield from packets
                return
            if packet.dts is not None and packet.dts > keyframe:
                break


def resets_decoder(packet: av.Packet) -> bool:
    """Whether nothing after a packet can refer to what was before it; `False` of codecs of which it is not known.

    Of H.264 and HEVC, whether it begins with a picture of instantaneous decoding refresh (IDR).
    """
    context = packet.stream.codec_context
    if context is None or context.name not in _PICTURES:
        return context is not None and context.name in _ALWAYS and packet.is_keyframe
    pictures, refreshing = _PICTURES[context.name]
    extradata, at = context.extradata or b"", _LENGTH_SIZE_AT[context.name]
    is_counted = extradata[:1] == b"\1" and len(extradata) > at
    data = bytes(packet)
    for first in _counted_units(data, (extradata[at] & 3) + 1) if is_counted else _marked_units(data):
        kind = first & 31 if context.name == "h264" else first >> 1 & 63
        if kind in pictures:
            return kind in refreshing
    return False


def _counted_units(data: bytes, length_size: int) -> Iterator[int]:
    """First byte of each unit, where its length stands before it."""
    position = 0
    while position + length_size < len(data):
        begin = position + length_size
        yield data[begin]
        position = begin + int.from_bytes(data[position:begin], "big")


def _marked_units(data: bytes) -> Iterator[int]:
    """First byte of each unit, where a start code stands before it."""
    position = data.find(_START_CODE)
    while 0 <= position < len(data) - len(_START_CODE):
        yield data[position + len(_START_CODE)]
        position = data.find(_START_CODE, position + len(_START_CODE))
