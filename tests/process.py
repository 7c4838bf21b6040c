"""The command in a process of its own, forked from the test's, which has everything imported: a start takes no time."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch


def start(arguments: Sequence[str], output: str = os.devnull, before: Callable[[], None] = lambda: None) -> int:
    """Start the command with its output in a file; its process id. `before` is called in the new process first."""
    import heretic.commands.run  # with all that a run needs

    assert heretic.commands.run
    pid = os.fork()
    if pid == 0:
        try:
            before()
            files = [os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)]
            for number, file in ((0, files[0]), (1, files[1]), (2, files[1])):
                os.dup2(file, number)
            run_and_exit(arguments)
        finally:
            os._exit(1)  # whatever was raised: this process must not go on as the test
    return pid


def wait(pid: int) -> int:
    """Wait for a process; its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def run_and_exit(arguments: Sequence[str]) -> NoReturn:
    """Be the command, on the standard streams of this process, whose previous life ends here."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        from heretic.main import run_command

        # In a fork, torch makes its pool of threads anew at the first use; two threads that come first at once would find none.
        torch.set_num_threads(torch.get_num_threads())
        code = run_command(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
