"""Mayfly measured beside what it could be at worst, at best, and what else there is. Started by infra/bench.

Theory of operation. One process of ours makes the load; everything measured is a process of its own on the same machine:

    mayfly      the deployment that infra/bench brought up, over HTTP
    docker      the floor: create, start, wait, remove of the same container by the bare Engine API, without SQL (floor.py)
    ceiling     gateway.web's own application with SQL run in its process by the runner's own code, without a container (ceiling.py)
    datasette   the alternative, another SQLite over HTTP, as it comes
    blank       a constant answer: what the load generator itself costs (blank.py)

Absolute numbers belong to one machine at one moment, so the result is ratios. The sides take turns in short windows, A B A B; a
ratio is taken between neighbouring windows, and of those the median: what disturbs the machine disturbs both sides of it alike.

A window (load.py) begins when every caller has had one answer, which was checked and is not counted. Percentiles are exact, by
nearest rank over all samples. Every wait and loop has a bound in time and in number.
"""
