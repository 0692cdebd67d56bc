"""The runner: what one container runs for one request, on one database. Untrusted from the first byte of SQL.

Theory of operation
-------------------
A runner is born with three things: its mode in argv, its limits in one environment variable, and one volume at /data that
holds two files. It ends within a deadline, after at most one answer.

    configuration   MAYFLY_RUNNER → Configuration; then the environment is emptied
    confine         drops everything the process will not need, for good: landlock, seccomp, rlimits. A layer that cannot be
                    applied is the answer `unconfined`, and nothing is read
    frames, wire    one request from descriptor 0; the deadline's clock starts when its last byte is here
    database        opens /data/db.sqlite with every switch set and read back, holds it against everybody else, and then reads it;
                    policy holds the tables
    execute         the script, statement by statement; failures says what each exception means
    operations      instead, where the request has an `op`: rows, batch, schema, export and bulk on the database, upload, verify and
                    salvage on the file; memory, image, trees and rebuild are theirs
    wire, frames    one reply to descriptor 1, and the process ends

Its mode says what kind it is. A read-only one cannot write, and four layers each see to that alone: the mount, Landlock's rules,
the database's descriptor, SQLite. A bulk one has more time.

Beside the main thread there is one more, the watchdog. It interrupts SQLite at the deadline, and when that does not help it
gives the answer `timeout` itself, or what an answer that has begun lacks, and ends the process. Above both stands a kill from
outside, which is not the runner's.

With engine zygote a runner is not started but cloned, from an interpreter that stands in a slot container without a volume.
`zygote` is that interpreter's life, `cloning` and `huge_pages` what makes it cheap to clone. `child` is the clone's confinement, as
a plan of system calls made ready beforehand, one for each kind. Its connection is opened and fortified before it is cloned, on an
empty file whose descriptor it then gives to the tenant's. From the request on its way is the one above, without the watchdog: the
kill from outside does its work.

What the layers are for: `policy` keeps SQL inside one database and inside its limits. `confine` holds when SQLite itself is
taken over: then the process can still read two capped files, write them if it may, and say something on descriptor 1, where
everything is taken for hostile input. Nothing of the tenant's is ever written anywhere else; there is no log.

Only the standard library and apsw are imported, all of it before the confinement, because after it no file can be opened.
"""
