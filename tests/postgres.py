"""A PostgreSQL server of the tests' own: its data in a temporary folder, its port a free one, its owner not root."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest


def _program(name: str) -> Path:
    """Debian keeps them out of the path, by version."""
    found = [*sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), *filter(None, [shutil.which(name)])]
    if not found:
        pytest.skip(f"PostgreSQL is not installed ({name} is neither in /usr/lib/postgresql nor in the path)")
    return Path(found[-1])


class Server:
    """A server that can be stopped and started again. Skips the test if there can be none."""

    def __init__(self) -> None:
        self._control = _program("pg_ctl")
        self.folder = Path(tempfile.mkdtemp(prefix="heretic-postgres-"))
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # which the server refuses to be
            try:
                owner = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL cannot run as root, and there is no user postgres")
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            self._as = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]
        options = ["--username=heretic", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._run(_program("initdb"), "-D", self.folder / "data", *options)

    @property
    def url(self) -> str:
        return f"postgresql://heretic@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        settings = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run(self._control, "-D", self.folder / "data", "-o", settings, "-l", self.folder / "log", "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it; `immediate` as if it had crashed."""
        self._run(self._control, "-D", self.folder / "data", "-m", mode, "-w", "stop")

    def remove(self) -> None:
        if (self.folder / "data/postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder)

    def _run(self, *command: object) -> None:
        # Its own output goes to a file: the server would keep a pipe open.
        with (self.folder / "output").open("w") as output:
            result = subprocess.run(
                [str(word) for word in command],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                **self._as,
            )
        assert result.returncode == 0, (self.folder / "output").read_text()
