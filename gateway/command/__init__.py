"""`mayfly verify FILE` and `mayfly salvage FILE`: an operator's look into a database file that may be hostile.

Neither the gateway nor the launcher takes part, and no service has to run. One Docker container of the runner image is started by
the launcher's own specification, but that its volume is memory of its own, which ends with it. This process reads FILE's bytes,
sends them as one request (docs/wire.md, `verify_file` and `salvage_file`), and takes the answer for what it is, hostile input:
frames by the gateway's decoders, a file's bytes by their size and hash. It never opens a database.

    __main__    arguments, exit codes, the report on stdout
    files       FILE in, OUT out
    sandbox     the container, from nothing to gone
    dialogue    what is said to it, and what it may answer
"""
