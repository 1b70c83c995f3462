"""A first look at the footer of a parquet file, in another process: with some damaged ones pyarrow aborts its process.

One child for each process that reads, started at the first file; it ends when its input does.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import pyarrow as pa, pyarrow.parquet as pq
sys.stdout.buffer.write(b".")
sys.stdout.buffer.flush()
while size := sys.stdin.buffer.read(8):
    footer = sys.stdin.buffer.read(int.from_bytes(size, "little"))
    try:
        file = pq.ParquetFile(pa.BufferReader(b"PAR1" + footer))
        for i in range(file.num_row_groups):
            for j in range(file.metadata.num_columns):
                file.metadata.row_group(i).column(j)
    except Exception:  # which the parent will see too
        pass
    sys.stdout.buffer.write(b".")
    sys.stdout.buffer.flush()
"""
_child: subprocess.Popen[bytes] | None = None


def aborts(f: Any) -> bool:
    """Whether pyarrow would abort on the footer of `f`, an open file that can seek.

    Raises:
        OSError: the file cannot be read, or the child cannot run.
    """
    size = f.seek(0, 2)
    f.seek(max(0, size - 8))
    end = f.read(8)
    length = int.from_bytes(end[:4], "little") + 8
    if end[4:] != b"PAR1" or length > size:
        return False  # no footer at all
    f.seek(size - length)
    footer = f.read(length)
    child = _started()
    assert child.stdin
    assert child.stdout
    try:
        child.stdin.write(len(footer).to_bytes(8, "little") + footer)
        child.stdin.flush()
        if child.stdout.read(1):
            return False
    except BrokenPipeError:
        pass
    if (code := child.wait()) in (-signal.SIGABRT, -signal.SIGSEGV):
        return True
    raise ChildProcessError(0, f"the process that looks at the footer ended with code {code}")


def _started() -> subprocess.Popen[bytes]:
    global _child
    if _child is None or _child.poll() is not None:
        command = [sys.executable, "-c", _CHILD, json.dumps(sys.path)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        _child = subprocess.Popen(command, **pipes)
        assert _child.stdout
        if not _child.stdout.read(1):
            raise ChildProcessError(0, f"a process that looks at parquet footers cannot be started: {_child.wait()}")
    return _child
