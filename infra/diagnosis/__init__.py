"""What a host must have to carry Mayfly, as a table of checks: `infra/doctor` prints it, docs/doctor.md lists it.

Standard library alone, because it is for hosts on which nothing is installed yet. A check is a function of a `Host`, which is
all that is known of the machine: a root folder for /proc, /sys, /etc and the state, what Docker answered, and the few facts that
only a system call tells. So a test makes a machine out of files. Nothing here changes anything.
"""
