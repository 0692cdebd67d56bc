"""Mayfly's gateway: a private SQLite database for anyone who can send an HTTP request.

Theory of operation. Three processes, three levels of trust:

    caller ── HTTP ──▶ gateway.web       an ordinary user: no capabilities, no Docker socket, never opens a SQLite file
                          │  unix SOCK_SEQPACKET below the state folder; gateway.protocol, nine verbs
                          ▼
                       gateway.launcher  the only process that commands the container engine; owns the volumes; never sees SQL
                          │  one fixed container specification
                          ▼
                       runner            one container, one request, one volume; untrusted from the first byte of SQL

Engines. What the runner's container is depends on the host, and shows the same facts from the inside:

    docker    launcher ── Engine API ──▶ Docker container, for one request, with the volume mounted from its start
    zygote    launcher ── Engine API ──▶ slot container, which stands, without a volume: a zygote waits in it
                  │                          │  clones, ahead, into fresh user, mount, pid, ipc and uts namespaces
                  └── work: SEQPACKET ──▶ child, for one request: gets its socket and a detached mount of the volume

For that mount the launcher has CAP_SYS_ADMIN under zygote, and nothing else. The zygote never reads a tenant's byte.

Channels. The caller speaks HTTP to web and to nothing else. web asks the launcher for a container by an instance id and hands
over one end of a socket pair; the launcher gives that end to the container and never reads it. Request and reply travel over the
pair as frames, with the bytes of a file behind them where there is one (docs/wire.md), so SQL passes only between web and the
container it runs in. The launcher's packets have room for ids, a verb with its flags, a number and a descriptor: no image, path or
SQL can be asked for.

Trust. web believes the launcher, which checks web's user before it reads. Neither believes the runner: its reply has a size cap, a
deadline and a strict schema, and web builds the HTTP body itself. Token keys live with web alone, so the launcher cannot mint a
token; volumes live with the launcher alone, so web cannot read a database.

State. A directory per instance is the registry. Whatever is killed, in whatever order, every unexpired instance answers again
after a restart. gateway.settings is the only reader of the environment; gateway.web and gateway.launcher never import each other;
gateway.command, an operator's `mayfly verify` and `mayfly salvage`, takes the container's specification from the one and the
decoders of replies from the other, and needs neither to run.
"""

__version__ = "0.1.0"
