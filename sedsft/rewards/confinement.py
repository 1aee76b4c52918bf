"""Takes from this process all that code of strangers must not have. Linux on x86-64 or aarch64; what is taken never comes back.

Four walls, each of which must stand: a user and a network namespace of its own (no interface but a loopback that is down),
Landlock (reads what is installed, writes nothing), seccomp (no sockets, processes, signals, tracing, shared memory or new
namespaces) and resource limits.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_SECCOMP_FILTER = 2
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
_CAPABILITY_VERSION = 0x20080522
_EPERM, _ENOSYS = 1, 38
_CPU_S = 3600

# The Landlock system calls have one number on all architectures.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_RULE_PATH_BENEATH = 1
_READ = 1 << 0 | 1 << 2 | 1 << 3
"""Landlock's rights to execute (which mapping a library needs), to read files and to list folders."""
_READ_FILE = 1 << 2
_ABI_1 = (1 << 13) - 1
_RIGHTS = {1: _ABI_1, 2: _ABI_1 | 1 << 13, 3: _ABI_1 | 3 << 13, 4: _ABI_1 | 3 << 13}
_RIGHTS_ABI_5 = _ABI_1 | 7 << 13
"""All rights over files that a version of Landlock knows: whatever is handled and not granted is refused."""

_READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom")

# Numbers of system calls: x86-64, aarch64; -1 where there is none.
_REFUSED: dict[str, tuple[int, int]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "socketpair": (53, 199),
    "clone": (56, 220),
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "prctl": (157, 167),
    "prlimit64 of others": (302, 261),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "inotify_init1": (294, 26),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "personality": (135, 92),
}
_CLONE3 = 435
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(RuntimeError):
    """The kernel, or its settings, do not give one of the walls."""


def confine(memory_mb: int, parent_pid: int) -> None:
    """Build all walls around this process, which must have one thread, and tie its life to the thread that started it.

    Raises:
        Refused: names the wall that cannot be had; the process must end then.
    """
    if platform.system() != "Linux" or platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
        raise Refused(f"expected Linux on {' or '.join(_ARCHITECTURES)}, got {platform.system()} on {platform.machine()}")
    # Files below /proc of this process belong to root after a change of namespaces, so the folder is made before.
    empty = tempfile.mkdtemp(prefix="sedsft-reward-")
    os.chdir(empty)
    os.rmdir(empty)
    _checked(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC), "a user and a network namespace of its own")
    _drop_capabilities()
    _die_with(parent_pid)
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _read_only(_readable())
    _limit(memory_mb)
    _filter_calls()


def _checked(result: int, wall: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise Refused(
            f"expected the kernel to give a sandbox {wall}, got {os.strerror(number)}; allow it (unprivileged user namespaces, "
            "Landlock and seccomp: a container's own seccomp profile may forbid them), or score with the component `remote`"
        )
    return result


def _drop_capabilities() -> None:
    """Those over the new namespaces, which an owner of them has."""
    header = struct.pack("<Ii", _CAPABILITY_VERSION, 0)
    _checked(_libc.capset(header, bytes(24)), "without capabilities")


def _die_with(parent_pid: int) -> None:
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "that dies with its owner")
    if os.getppid() != parent_pid:
        os._exit(0)


def _readable() -> list[Path]:
    prefixes = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    return [path for path in (*prefixes, *map(Path, _READABLE)) if path.exists()]


def _read_only(paths: Sequence[Path]) -> None:
    """Refuse every access to files but reading those at or below `paths`. What is open stays open."""
    version = _checked(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1), "that reads only what is installed (Landlock)")
    handled = _RIGHTS.get(version, _RIGHTS_ABI_5)
    attribute = struct.pack("<Q", handled)
    ruleset = _checked(_libc.syscall(_LANDLOCK_CREATE, attribute, len(attribute), 0), "with rules over files")
    for path in paths:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("<Qi", _READ if path.is_dir() else _READ_FILE, folder)
        _checked(_libc.syscall(_LANDLOCK_ADD, ruleset, _RULE_PATH_BENEATH, rule, 0), f"that reads {path}")
        os.close(folder)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "that reads only what is installed (Landlock)")
    os.close(ruleset)


def _limit(memory_mb: int) -> None:
    """Hard limits: nobody in here can raise them."""
    limits = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: _CPU_S,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _filter_calls() -> None:
    """Refuse system calls by number. Unknown ones pass, but for those of other architectures, which end the process."""
    program = _program(*_ARCHITECTURES[platform.machine()])
    argument = _Program(len(program) // 8, program)
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(argument), 0, 0), "a filter of system calls")


def _program(column: int, architecture: int) -> bytes:
    """The filter as BPF: load a word, compare, jump, return. Offsets are those of `struct seccomp_data`."""
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS
    number_at, architecture_at, first_argument_at = 0, 4, 16

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    others = _REFUSED["prlimit64 of others"][column]
    numbers = [entry[column] for name, entry in _REFUSED.items() if entry[column] >= 0 and entry[column] != others]
    body = b"".join(op(equal, number, 0, 1) + op(answer, refuse) for number in numbers)
    return (
        op(load, architecture_at)
        + op(equal, architecture, 1, 0)
        + op(answer, kill)
        + op(load, number_at)
        # Numbers of the x32 interface, which has the architecture of x86-64.
        + op(at_least, 0x40000000, 0, 1)
        + op(answer, kill)
        # A C library that is told that it does not exist falls back to clone.
        + op(equal, _CLONE3, 0, 1)
        + op(answer, unknown)
        + body
        + op(equal, others, 0, 3)
        + op(load, first_argument_at)
        + op(equal, 0, 1, 0)
        + op(answer, refuse)
        + op(answer, allow)
    )
