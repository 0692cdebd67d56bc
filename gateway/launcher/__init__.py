"""The launcher: the one process that reaches the container engine and the volumes.

    gateway/web ── SEQPACKET, docs/wire.md ──▶ server ──▶ service ──▶ registry  instances on disk; the folder is the truth
                                                            │  ├────▶ leases    one run per instance at a time, in order
                                                            │  ├────▶ warmth    containers started before anybody asks
                                                            │  └────▶ engines   one sealed container per run
                                                  reaper ───┘  readiness         engine up or down; self-test before the first run

What comes in is a verb, an instance id and at most one stream socket. What a container is made of is decided by one pure
function (`specification`) from the settings alone: no byte from outside the process takes part in it. The launcher hands
the caller's socket to the container's stdin and stdout and never reads a request, a reply or a tenant's file; the kernel copies
one for a fork.

Whoever may speak to this process can create, run, copy, replace, extend and remove instances, and nothing else.
"""
