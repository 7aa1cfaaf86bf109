"""Python processes that have torch imported when they start: forks of one that did, each a child of the caller.

Where a test is not about how Python starts, `run` and `Popen` stand for subprocess's, for commands that begin with
`sys.executable`; some seventy processes otherwise import torch in three seconds each, and PEFT in nine more. A process
is forked from a server, and forked again: the orphan becomes a child of the caller, which its status reaches.
"""

import atexit
import ctypes
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from unittest import mock

__all__ = ["PeftPopen", "Popen", "run"]

_PR_SET_CHILD_SUBREAPER = 36


class Popen(subprocess.Popen):
    """`subprocess.Popen`; with `has_children`, in the process too. Options of Python are -W, -c and -m."""

    # the second is what the first product of a gradient imports
    preload = ("torch", "torch.fx.experimental.symbolic_shapes")

    def __init__(self, *args, has_children=False, **options):
        self._has_children = has_children
        super().__init__(*args, **options)

    # the arguments up to `errwrite` are the same in Python 3.10 to 3.14, and so is the place of start_new_session
    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        shell, ends, is_leader = rest[2], rest[3:9], rest[14]
        if shell or preexec_fn or pass_fds or not isinstance(args, list) or args[0] != sys.executable:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        request = {
            "arguments": [str(one) for one in args[1:]],
            "cwd": os.path.abspath(cwd or "."),
            "environment": dict(os.environ if env is None else env),
            "is_leader": is_leader,
            "has_children": self._has_children,
        }
        own = [end if end >= 0 else number for number, end in enumerate((ends[0], ends[3], ends[5]))]
        self.pid = _ask(_server(self.preload), request, own)
        self._child_created = True
        self._close_pipe_fds(*ends)


class PeftPopen(Popen):
    """Has imported what training a model of transformers with PEFT imports, too."""

    preload = (*Popen.preload, "peft", "transformers.models.llama.modeling_llama")


def run(command, popen=Popen, *, timeout, has_children=False, **options):
    """`subprocess.run`."""
    with mock.patch.object(subprocess, "Popen", functools.partial(popen, has_children=has_children)):
        return subprocess.run(command, timeout=timeout, **options)


@functools.cache
def _server(preload):
    """The connection to a process that has imported modules; it ends when the connection does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(300)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno()), *preload]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()])
    atexit.register(lambda: (ours.close(), process.wait(60)))
    return ours


def _subreaper(is_one):
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(is_one), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _ask(server, request, files):
    """The id of a child that runs what is requested, its standard input, output and errors given."""
    _subreaper(True)
    try:
        socket.send_fds(server, [json.dumps(request).encode()], files)
        answer = server.recv(64)
    finally:
        _subreaper(False)
    assert answer, "the server has ended"
    return int(answer)


def _serve(connection):
    """Answers requests in the server, which ends with the last of them; returns one in each of the processes."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            sys.exit()
        reader, writer = os.pipe()
        if not (between := os.fork()):
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.001)
            request = json.loads(message)
            if request["is_leader"]:
                os.setsid()
            for number, file in enumerate(files):
                os.dup2(file, number)
            os.write(writer, str(os.getpid()).encode())
            connection.close()
            for file in (reader, writer, *files):
                os.close(file)
            return request
        for file in (writer, *files):
            os.close(file)
        os.waitpid(between, 0)
        connection.send(os.read(reader, 64))
        os.close(reader)


def _start(request, installed):
    """Run what is requested as Python's command line does."""
    arguments, environment = request["arguments"], request["environment"]
    os.chdir(request["cwd"])
    # a shell's background jobs ignore it, and so does what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # those of the server know whether its own files can seek
    encoding = environment.get("PYTHONIOENCODING")
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    if (threads := environment.get("OMP_NUM_THREADS", "")).isdigit():
        sys.modules["torch"].set_num_threads(int(threads))
    while arguments[0] == "-W":
        sys.warnoptions.append(arguments[1])
        warnings.simplefilter(arguments[1])
        arguments = arguments[2:]
    what, *rest = arguments
    how = {"-m": os.getcwd(), "-c": ""}
    more = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [how.get(what, os.path.dirname(os.path.abspath(what))), *more, *installed]
    sys.argv[:] = [what, *rest[1:]] if what in how else arguments
    if what == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        runpy.run_path(what, run_name="__main__")


def _main(connection, preload):
    installed = sys.path[1:]
    for name in preload:
        __import__(name)
    gc.freeze()
    request = _serve(connection)
    if request["has_children"]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            theirs.close()
            globals()["_server"] = lambda preload: ours
            subprocess.Popen = Popen
        else:
            ours.close()
            request = _serve(theirs)
    _start(request, installed)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
