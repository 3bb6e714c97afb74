"""rosbags' reader of sqlite3 files within `bounds.Limits`; of a damaged one it reads a copy of the whole rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import apsw
from rosbags.interfaces import Connection
from rosbags.rosbag2 import ReaderError
from rosbags.rosbag2.storage_sqlite3 import Sqlite3Reader as Sqlite3

from carla_digr.recordings.bounds import CHANNELS, Limits, check_yaml, too_much

# rosbag2's tables, https://github.com/ros2/rosbag2, rosbag2_storage_sqlite3; older versions lack some
TABLES = {
    "schema": ("schema_version", "ros_distro"),
    "topics": ("id", "name", "type", "serialization_format", "offered_qos_profiles", "type_description_hash"),
    "message_definitions": ("id", "topic_type", "encoding", "encoded_message_definition", "type_description_hash"),
    "messages": ("id", "topic_id", "timestamp", "data"),
}
FIRST, LAST = -(2**63), 2**63 - 1  # of a row's number


class Sqlite3Reader(Sqlite3):
    """An sqlite3 file, of which only plain tables are read.

    Attributes:
        damaged: before which rows of which tables some could not be read.
    """

    path: Path

    def __init__(self, path: Path, limits: Limits | None = None):
        super().__init__(path)
        self.damaged: set[tuple[str, int]] = set()
        self._given = limits
        self._copy: TemporaryDirectory[str] | None = None  # of what is whole, if not all of it is
        self._left: apsw.Connection | None = None  # of the file, which others may be reading still

    def open(self) -> None:
        """Open it.

        Raises:
            UserError: it is beyond its limits.
            ReaderError: it is no recording.
            sqlite3.Error: it is damaged, and nothing of it is whole.
        """
        self._limits = self._given or Limits.of(self.path.stat().st_size)
        try:
            self._check()
            super().open()
        except (sqlite3.DatabaseError, ReaderError) as error:
            if not isinstance(error.__cause__ or error, (sqlite3.DatabaseError, apsw.Error)):
                raise
            self._leave_out_damage()

    def close(self) -> None:
        """Close it, and remove the copy if there is one."""
        super().close()
        if self._left is not None:
            self._left.close()
        if self._copy is not None:
            self._copy.cleanup()

    def _check(self) -> None:
        """Raise what `open` does."""
        limits = self._limits
        with closing(_connect(self.path)) as tables:
            kinds = {name: kind for _, name, kind, *_ in tables.execute("PRAGMA table_list")}
            for table in TABLES.keys() & kinds.keys():
                columns = tables.execute(f"PRAGMA table_xinfo({table})").fetchall()
                if kinds[table] != "table" or any(hidden for *_, hidden in columns):
                    raise ReaderError(f"its table {table} is computed")
            lengths = "SELECT count(*), coalesce(max(length(data)), 0), coalesce(sum(length(data)), 0) FROM messages"
            count, most, total = tables.execute(lengths).fetchone()
            topics = tables.execute("SELECT count(*) FROM topics").fetchone()[0]
            if count > limits.records or topics > CHANNELS or most > limits.at_once or total > limits.total:
                raise too_much(self.path, f"has {count} messages of {topics} topics")
            if "offered_qos_profiles" in _columns(tables, "topics"):
                texts = tables.execute("SELECT CAST(offered_qos_profiles AS BLOB) FROM topics")
                check_yaml(self.path, b"\n".join(text for (text,) in texts if text), limits)

    def _leave_out_damage(self) -> None:
        """Go on with a copy of the rows that are whole.

        Raises:
            UserError: they are beyond the limits.
            ReaderError, sqlite3.Error: there are none.
        """
        copy = TemporaryDirectory(prefix="carla-digr-")
        try:
            whole = Path(copy.name) / self.path.name
            self.damaged = salvage(self.path, whole, self._limits)
            self.path, self._left, self.dbconn, self._copy = whole, self.dbconn, None, copy
            self._check()
            self.connections, self.msgtypes = [], []
            super().open()
        except BaseException:
            copy.cleanup()
            raise

    def messages(
        self, connections: Collection[Connection], start: int | None = None, stop: int | None = None
    ) -> Generator[tuple[Connection, int, bytes], None, None]:
        """The messages in order of time, without those that cannot be read.

        Raises:
            apsw.Error: the copy of a damaged file cannot be read either.
        """
        by_id = {connection.id: connection for connection in connections}
        query = (
            f"SELECT id, topic_id, timestamp, data FROM messages WHERE topic_id IN ({','.join('?' * len(by_id))}) "  # noqa: S608
            f"AND timestamp >= ? AND timestamp < ? AND (timestamp, id) > (?, ?) ORDER BY timestamp, id"
        )
        last = (FIRST, FIRST)
        while True:
            tables = self.dbconn
            assert tables
            try:
                bounds = (FIRST if start is None else start, LAST if stop is None else stop, *last)
                for number, topic, time, data in tables.execute(query, (*by_id, *bounds)):
                    last = time, number
                    yield by_id[topic], time, data
                return
            except apsw.Error:
                if self._copy is not None and self.dbconn is tables:
                    raise
                if self.dbconn is tables:
                    self._leave_out_damage()


def salvage(path: Path, copy: Path, limits: Limits) -> set[tuple[str, int]]:
    """Copy the rows of rosbag2's tables that can be read to a new sqlite3 file.

    Returns:
        Before which rows of which tables some could not be read.

    Raises:
        UserError: they are beyond the limits.
        sqlite3.Error: the tables or all topics cannot be read.
    """
    damaged = set[tuple[str, int]]()
    with closing(_connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.execute("PRAGMA writable_schema = ON")  # or a file that has lost its end is not read at all
        count = total = 0
        for table, known in TABLES.items():
            columns = [name for name in known if name in _columns(source, table)]
            if not columns:
                continue
            kinds = (f"{name} INTEGER PRIMARY KEY" if name == "id" else name for name in columns)
            target.execute(f"CREATE TABLE {table}({', '.join(kinds)})")
            places = ", ".join("?" * len(columns))
            for row in _whole_rows(source, table, columns, damaged):
                count += 1
                total += sum(len(value) for value in row if isinstance(value, (bytes, str)))
                if count > limits.records or total > limits.total:
                    raise too_much(path, f"has more than {count - 1} rows")
                target.execute(f"INSERT OR IGNORE INTO {table} VALUES ({places})", row)  # noqa: S608
        if not target.execute("SELECT count(*) FROM topics").fetchone()[0]:
            raise sqlite3.DatabaseError("its topics cannot be read")
        target.execute("CREATE INDEX timestamp_idx ON messages (timestamp)")
        target.commit()
    return damaged


def _connect(path: Path) -> sqlite3.Connection:
    tables = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    tables.text_factory = lambda text: text.decode(errors="replace")
    return tables


def _columns(tables: sqlite3.Connection, table: str) -> list[str]:
    return [name for _, name, *_ in tables.execute(f"PRAGMA table_info({table})")]


def _whole_rows(
    source: sqlite3.Connection, table: str, columns: list[str], damaged: set[tuple[str, int]]
) -> Iterator[tuple]:
    """The rows of a table in order of their numbers, without those that cannot be read."""
    fields = ", ".join(columns)
    place = FIRST
    while place < LAST:
        try:
            rows = f"SELECT rowid, {fields} FROM {table} WHERE rowid >= ? ORDER BY rowid"  # noqa: S608
            for number, *row in source.execute(rows, (place,)):
                if number < place:  # a page that stands in its tree twice
                    raise sqlite3.DatabaseError("rows are not in order")
                place = number + 1
                yield tuple(row)
            return
        except sqlite3.DatabaseError:
            place = _after_damage(source, table, place)
            damaged.add((table, place))


def _after_damage(source: sqlite3.Connection, table: str, place: int) -> int:
    """The number from which on rows can be found again, past the one at ``place`` or after it that cannot be read."""

    def found(number: int) -> int | None:
        query = f"SELECT rowid FROM {table} WHERE rowid >= ? ORDER BY rowid LIMIT 1"  # noqa: S608
        with suppress(sqlite3.DatabaseError):
            return (source.execute(query, (number,)).fetchone() or (LAST,))[0]
        return None

    if (number := found(place)) is not None:  # its page is whole, its content is not
        return min(max(number, place) + 1, LAST)
    step = 1
    while found(min(place + step, LAST)) is None and place + step < LAST:
        step *= 2
    low, high = place, min(place + step, LAST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if found(middle) is None else (low, middle)
    return high
