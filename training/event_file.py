"""Files that grow by whole records: TensorBoard's events, one file per run, and metrics.jsonl.

Records are written directly: PyTorch's `SummaryWriter` writes in a thread, where a full disk ends
in a traceback instead of a message.
"""

import contextlib
import io
import os
import socket
import struct
import time

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from system.errors import UserError
from system.files import write_whole

FRAME = struct.Struct("<QI")  # a record's length and its checksum; data and its checksum follow
OURS = b"bits_per_byte"  # a tag that every event file of this program has named, since the first


def append_whole(path, data):
    """Append bytes to a file, all or none of them; a missing folder is created.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                # readers stop at half a record, so what was written of it is removed
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): free some space, then "
            "continue with --resume"
        ) from None


def is_own_event_file(path):
    """Whether this program wrote an event file: other programs give theirs the same names."""
    return OURS in path.read_bytes()


class EventFile:
    """The events of a run, in one file of the directory.

    Args:
        directory: a `Path`; this program's event files in it are merged into the new one.
        head: summaries at the start of the file; older events with their tags are dropped.
        kept_as: called with tag and step of every older event; returns its tag, None to drop it.
    """

    def __init__(self, directory, head, kept_as):
        # PyTorch's writer, which a user may have in the same process, ends its names in a number
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.ngt"
        self.path = directory / name
        self._head = [Event(summary=summary) for summary in head]
        replaced = {value.tag for event in self._head for value in event.summary.value}
        old = sorted(filter(is_own_event_file, directory.glob("events.out.tfevents.*")))
        kept = {}
        for path in old:
            for event in read_events(path):
                for value in event.summary.value:
                    tag = kept_as(value.tag, event.step)
                    if tag is not None and value.tag not in replaced:
                        value.tag = tag
                        kept[tag, event.step] = Event(
                            wall_time=event.wall_time,
                            step=event.step,
                            summary=Summary(value=[value]),
                        )
        write_whole(self.path, self._start() + _records(kept.values()))
        # only now: a crash before this line loses nothing
        for path in set(old) - {self.path}:
            path.unlink()

    def append(self, summaries, step):
        """Write summaries of one step; raises what `append_whole` raises."""
        now = time.time()
        events = [Event(wall_time=now, step=step, summary=summary) for summary in summaries]
        # somebody may have deleted the file during the run
        start = b"" if self.path.exists() else self._start()
        append_whole(self.path, start + _records(events))

    def _start(self):
        now = time.time()
        for event in self._head:
            event.wall_time = now
        return _records([Event(wall_time=now, file_version="brain.Event:2"), *self._head])


def _records(events):
    file = io.BytesIO()
    writer = RecordWriter(file)
    for event in events:
        writer.write(event.SerializeToString())
    return file.getvalue()


def read_events(path):
    """Yield the events of a file up to the first that is incomplete, as a crash leaves it."""
    data = path.read_bytes()
    start = 0
    while start + FRAME.size <= len(data):
        length, _ = FRAME.unpack_from(data, start)
        record = data[start + FRAME.size : start + FRAME.size + length]
        start += FRAME.size + length + 4
        if start > len(data) or length == 0:
            return
        try:
            yield Event.FromString(record)
        except DecodeError:
            return
