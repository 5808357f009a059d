"""The systemd unit: a hardened service of this installation's own command and configuration."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

CONFIG = Path("/etc/watcher/watcher.toml")
STATE = Path("/var/lib/watcher")
CREDENTIAL = Path("/etc/watcher/credentials/watcher-key.cred")

_TEMPLATE = """\
# Written by `watcher systemd-unit`. Change it with a drop-in (`systemctl edit watcher`), so that it can be renewed.
[Unit]
Description=Watcher: starts one flow run per new item
Documentation=man:systemd.service(5)
After=network-online.target time-sync.target
Wants=network-online.target
StartLimitIntervalSec=300
StartLimitBurst=10

[Service]
# Not notify-reload: systemd before 253 does not know it and would ignore the line.
Type=notify
NotifyAccess=main
ExecStart={command} serve --config {config}
ExecReload=/bin/kill -HUP $MAINPID
WorkingDirectory={state}
WatchdogSec=60s
WatchdogSignal=SIGABRT
TimeoutStartSec=120s
TimeoutStopSec=60s
KillMode=mixed
Restart=always
RestartSec=5s
# 78: the configuration is wrong. Starting again would not make it right.
RestartPreventExitStatus=78

# A user of its own that exists while the service runs; its files are in {state}.
DynamicUser=yes
User=watcher
StateDirectory=watcher
StateDirectoryMode=0700
RuntimeDirectory=watcher
ConfigurationDirectory=watcher
UMask=0077
{credential}
MemoryHigh=768M
MemoryMax=1G
TasksMax=256
LimitNOFILE=16384
LimitCORE=0
OOMPolicy=continue

NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
PrivateUsers=yes
PrivateIPC=yes
PrivateMounts=yes
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
LockPersonality=yes
# Scripts that start a browser or V8 need a drop-in with MemoryDenyWriteExecute=no.
MemoryDenyWriteExecute=yes
KeyringMode=private
SystemCallArchitectures=native
# Limits for scripts are set with prlimit64, which @resources does not hold.
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
# A second wall around cloud metadata services (169.254.0.0/16).
IPAddressDeny=link-local multicast

[Install]
WantedBy=multi-user.target
"""

_BACKUP = """\
# Written by `watcher systemd-unit --backup-service`: one backup, whenever watcher-backup.timer says so.
[Unit]
Description=Watcher: a backup of its database

[Service]
Type=oneshot
ExecStart={command} backup --keep {keep} --config {config}
# The user and the directory of watcher.service, which makes the copy while it runs.
DynamicUser=yes
User=watcher
StateDirectory=watcher
StateDirectoryMode=0700
ConfigurationDirectory=watcher
WorkingDirectory={state}
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
"""

TIMER = """\
# Written by `watcher systemd-unit --backup-timer`: when watcher-backup.service runs.
[Unit]
Description=Watcher: a backup each night

[Timer]
OnCalendar=*-*-* 03:00
RandomizedDelaySec=30min
Persistent=yes

[Install]
WantedBy=timers.target
"""
KEEP = 14  # backups

_NO_CREDENTIAL = f"""\
# The key that encrypts secret variables: see docs/operations.md, then take away the `#`.
#LoadCredentialEncrypted=watcher-key:{CREDENTIAL}
"""


def text(command: Path, config: Path, credential: Path | None) -> str:
    """The unit file. ``credential`` is the encrypted key's file; None leaves its line commented out."""
    line = f"LoadCredentialEncrypted=watcher-key:{_escape(credential)}\n" if credential else _NO_CREDENTIAL
    return _TEMPLATE.format(command=_quote(command), config=_quote(config), state=STATE, credential=line)


def backup(command: Path, config: Path) -> str:
    """The unit of one backup, for the timer."""
    return _BACKUP.format(command=_quote(command), config=_quote(config), state=STATE, keep=KEEP)


def warnings(command: Path, config: Path, *more: Path) -> list[str]:
    """What would keep that unit from starting on this machine; ``more`` is what it needs to see besides."""
    found = []
    for path in (command, config, *more):
        hidden = next((p for p in ("/home", "/root", "/run/user") if path.is_relative_to(p)), None)
        hidden = hidden or ("/tmp" if path.is_relative_to("/tmp") else None)  # noqa: S108
        if hidden:
            found.append(f"{path} is under {hidden}, which the service cannot see: see docs/operations.md, Install")
    if not config.exists():
        found.append(f"{config} does not exist yet: `watcher init /etc/watcher` writes one")
    return found


def this_command() -> Path:
    """The absolute path of the command that runs now."""
    here = Path(sys.argv[0])
    if here.name == "watcher" and here.exists():
        return here.absolute()
    beside = Path(sys.executable).with_name("watcher")
    return beside if beside.exists() else Path(shutil.which("watcher") or beside)


def _escape(path: Path) -> str:
    """As systemd reads settings: ``%`` is a specifier."""
    return os.fspath(path).replace("%", "%%")


def _quote(path: Path) -> str:
    """As systemd reads command lines: ``%`` and ``$`` doubled, quoted when there is need."""
    escaped = _escape(path).replace("\\", "\\\\").replace("$", "$$").replace('"', '\\"')
    return f'"{escaped}"' if any(c in escaped for c in " '\"\t;") else escaped
