"""Parent of one process that runs a script: whatever the script started ends with it, or with the service."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import defaultdict
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = 1, 2, 4, 32, 4096, 16384, 1 << 19
MNT_DETACH = 2
OPEN_TREE, MOVE_MOUNT = 428, 429  # system calls that the C library has no names for yet
AT_FDCWD, AT_RECURSIVE, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = -100, 0x8000, 1, 4
ROOM = "/tmp"  # noqa: S108 -- where a root is built, unseen by anybody: any directory that every machine has
PROCESSES = 64  # of one worker at once: more is taken for a fork bomb
LOOK = 100  # milliseconds between two looks at a worker that is being watched
PATIENCE = 5.0  # seconds that killed processes may take to vanish
ALLOWANCE = 48 * 1024 * 1024  # bytes for what the runtime itself still loads: pydantic, a thread's stack
FILE_SIZE = 1 << 30
OPEN_FILES = 1024

_libc = ctypes.CDLL(None, use_errno=True)


def main(channel_fd: int, control_fd: int, memory: int, shared: int) -> NoReturn:
    """Fork the worker and watch over it until it ends or the service lets go of ``control_fd``.

    The service writes ``w`` to have the worker's processes counted and weighed, ``s`` to stop that, and closes its
    end to have everything killed. The last thing it reads is how it ended: ``exited N``, ``killed N`` (a signal),
    ``memory`` or ``processes``. ``shared``: the worker is to see `show_shared`.
    """
    from watcher.scripts import worker  # a command's warden needs nothing of it, and starts three times as fast

    channel, control = socket.socket(fileno=channel_fd), socket.socket(fileno=control_fd)
    channel.set_inheritable(False)
    child = _fork(control, shared)
    if not child:
        worker.main(channel, memory)
    channel.close()
    _guard(child, control, memory)


def run(control_fd: int, memory: int, cpu: int, shared: int, *command: str) -> NoReturn:
    """As `main`, for any program: it gets this process's input and outputs, and ``cpu`` seconds of each processor."""
    control = socket.socket(fileno=control_fd)
    child = _fork(control, shared)
    if not child:
        for kind, most in (
            (resource.RLIMIT_CPU, cpu),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, FILE_SIZE),
            (resource.RLIMIT_NOFILE, OPEN_FILES),
        ):
            limit(kind, most)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # Python ignores them, and a program would inherit that
        try:
            os.execv(command[0], command)  # noqa: S606 -- without a shell, on purpose
        except OSError as error:
            sys.stderr.write(f"{command[0]}: {error.strerror}\n")
            os._exit(127)
    _guard(child, control, memory)


def limit(kind: int, most: int) -> None:
    """Set one of this process's limits for good, as far as it is allowed to."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _fork(control: socket.socket, shared: int) -> int:
    """Fork the process to watch over: in it, in a session of its own, 0."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans come to us, however they detached themselves
    control.set_inheritable(False)
    gc.freeze()
    warden = os.getpid()
    child = os.fork()
    if not child:
        control.close()
        os.setsid()
        if shared:
            show_shared()
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != warden:
            os._exit(1)
    return child


def show_shared() -> None:
    """Let ``/shared`` be ``./shared``, for this process and its children alone: Windmill's clients look there.

    The process gets a root directory of its own, which shows what the machine's shows and that link besides. Where
    there is a ``/shared`` already, or the kernel or a sandbox does not allow it, all stays as it is.
    """
    if os.path.lexists("/shared") or not os.path.isdir(ROOM):
        return
    here, user, group = os.getcwd(), os.geteuid(), os.getegid()
    if _libc.unshare(CLONE_NEWNS):
        if _libc.unshare(CLONE_NEWNS | CLONE_NEWUSER):
            return
        _libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else nobody could write the maps, or weigh this process
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as map_:
                map_.write(text)
    try:
        _make_root()
    except OSError:
        _libc.umount2(ROOM.encode(), MNT_DETACH)
    os.chdir(here)


def _make_root() -> None:
    """Build a root out of the old one's parts in a file system in memory, and change to it. Raises OSError."""
    _mount("none", "/", "", MS_REC | MS_SLAVE)
    flags = OPEN_TREE_CLONE | AT_RECURSIVE
    covered = _libc.syscall(OPEN_TREE, AT_FDCWD, ROOM.encode(), flags)  # what is there now is about to be
    if covered < 0:
        raise OSError(ctypes.get_errno(), "open_tree")
    _mount("none", ROOM, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=256k")
    for entry in os.scandir("/"):
        to = f"{ROOM}/{entry.name}"
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), to)
            continue
        os.mkdir(to) if entry.is_dir() else os.close(os.open(to, os.O_CREAT | os.O_WRONLY))
        if entry.path != ROOM:
            _mount(entry.path, to, "", MS_BIND | MS_REC)
        elif _libc.syscall(MOVE_MOUNT, covered, b"", AT_FDCWD, to.encode(), MOVE_MOUNT_F_EMPTY_PATH):
            raise OSError(ctypes.get_errno(), "move_mount")
    os.close(covered)
    os.symlink("/proc/self/cwd/shared", f"{ROOM}/shared")
    os.chdir(ROOM)
    if _libc.pivot_root(b".", b"."):
        raise OSError(ctypes.get_errno(), "pivot_root")
    _libc.umount2(b".", MNT_DETACH)
    os.chdir("/")
    _mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    names = (text.encode() for text in (source, target, kind))
    if _libc.mount(*names, ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), "mount", target)


def _guard(child: int, control: socket.socket, memory: int) -> NoReturn:
    """Watch over the child to its end, end all that is left, and say how."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the service ends a worker
    end = _watch(child, control, memory)
    _end_all(os.getpid())
    try:
        control.send(end.encode())
    except OSError:
        pass  # the service has gone
    os._exit(0)


def _watch(child: int, control: socket.socket, memory: int) -> str:
    """Wait until the worker ends, breaks a limit, or is to be killed, and say which."""
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    watching = False
    while True:
        ready = [fd for fd, _ in poll.poll(LOOK if watching else None)]
        if woken in ready:
            os.read(woken, 4096)
        status = _reap(child)
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            return f"exited {code}" if code >= 0 else f"killed {-code}"
        if control.fileno() in ready:
            order = control.recv(64)
            if not order:
                return "closed"
            watching = order.endswith(b"w")
        if watching and (broken := _broken(os.getpid(), memory)):
            return broken


def _reap(child: int) -> int | None:
    """Collect whatever ended; the worker's own status if it was among it."""
    status = None
    try:
        while True:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return status
            if pid == child:
                status = ended
    except ChildProcessError:
        return status


def _broken(root: int, memory: int) -> str:
    """Which limit all processes of the worker together break, if any."""
    family = descendants(root)
    if len(family) > PROCESSES:
        return "processes"
    return "memory" if sum(map(_own_memory, family)) > memory + ALLOWANCE else ""


def _own_memory(pid: int) -> int:
    """Bytes of a process; of what it shares with others its part, so that a fork is not counted twice."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as smaps:
            return sum(int(line.split()[1]) * 1024 for line in smaps if line.startswith(b"Pss:"))
    except (OSError, ValueError):
        return 0  # it ended meanwhile


def descendants(root: int) -> set[int]:
    """Every process below one, in whatever session or group it has put itself."""
    children = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    # The second field is the command in brackets, and may itself hold brackets and spaces.
                    parent = int(stat.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it ended meanwhile
            children[parent].append(int(name))
    found: set[int] = set()
    todo = [root]
    while todo:
        for pid in children[todo.pop()]:
            if pid not in found:
                found.add(pid)
                todo.append(pid)
    return found


def _end_all(root: int) -> None:
    """Kill everything below a process. Stopping it all first leaves nobody to fork while we look."""
    stopped: set[int] = set()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        _reap(0)
        alive = descendants(root)
        if not alive:
            return
        fresh = alive - stopped
        for pid in fresh or alive:
            _signal(pid, signal.SIGSTOP if fresh else signal.SIGKILL)
        stopped |= fresh
        if not fresh:
            time.sleep(0.001)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # it ended, or it is another user's: then systemd's control group is what ends it


if __name__ == "__main__":
    _control, _memory, _cpu, _shared = map(int, sys.argv[1:5])
    run(_control, _memory, _cpu, _shared, *sys.argv[5:])
